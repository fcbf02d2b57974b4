//! Settings that a GPU cannot compute are refused before anything is computed, with an error that names the setting.

use crate::device;
use crate::fixture::Run;

/// Changes the run file and expects `potstill run` to refuse it.
fn refuses(from: &str, to: &str, message: &str) {
    let run = Run::new();
    run.edit(from, to);
    let output = run.potstill(&["run", "run.toml", "--device", &device()]);
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(output.stderr.contains(message), "{}", output.stderr);
    assert!(output.stderr.contains("\nhint: "), "{}", output.stderr);
    assert!(!run.path("runs/tiny/prompts").exists());
}

#[test]
fn types_that_the_device_does_not_compute_in_are_refused() {
    let found = potstill::model::device(&device()).unwrap();
    if found.supports_dtype(potstill::model::DType::BF16) {
        println!("the device computes in bf16");
        return;
    }
    let message = "the device does not compute in bf16";
    refuses(
        "template = \"plain\"",
        "template = \"plain\"\ndtype = \"bf16\"",
        message,
    );
    refuses("steps = 6", "steps = 6\nprecision = \"bf16\"", message);
}

#[test]
fn what_needs_a_cpu_is_refused() {
    let several = "replicas are computed by threads of a CPU";
    refuses("steps = 6", "steps = 6\nreplicas = 2", several);
    let blocks = "products with quantised weights are computed on a CPU alone";
    refuses(
        "[eval]",
        "[train.adapter]\nbase = \"q8_0\"\n\n[eval]",
        blocks,
    );
}

#[test]
fn a_device_of_another_build_is_refused() {
    let run = Run::new();
    let output = run.potstill(&["run", "run.toml", "--device", "abacus"]);
    assert_eq!(output.code, 2, "{}", output.stderr);
    let message = format!(
        "no device `abacus`: this build computes on cpu, {}",
        device()
    );
    assert!(output.stderr.contains(&message), "{}", output.stderr);
}
