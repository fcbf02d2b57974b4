//! Losses other than the default, from the run file to the metrics, and `check-loss`.

use std::fs;

use crate::fixture::{CommandOutput, Run};

const DEFAULT: &str = "learning_rate = 1e-2";
const SIGNALS: &str = "signals = { top_k = 6 }";

/// Builds a run with this loss and these signals.
fn run(loss: &str, signals: &str) -> Run {
    let run = Run::new();
    run.edit(DEFAULT, &format!("{DEFAULT}\nloss = {{ {loss} }}"));
    run.edit(SIGNALS, &format!("signals = {{ {signals} }}"));
    run
}

fn check(run: &Run) -> CommandOutput {
    let output = run.potstill(&["check-loss", "run.toml"]);
    assert_eq!(output.code, 0, "{}{}", output.stdout, output.stderr);
    assert!(!output.stdout.contains("FAILED"), "{}", output.stdout);
    output
}

/// Reads the lines of the student's `metrics.jsonl`.
fn metrics(run: &Run) -> Vec<serde_json::Value> {
    let path = run.path("runs/tiny/students/student/metrics.jsonl");
    let text = fs::read_to_string(path).unwrap();
    let lines = text.lines().map(serde_json::from_str);
    lines.collect::<Result<_, _>>().unwrap()
}

#[test]
fn a_mixture_at_a_temperature_is_checked_and_trained() {
    let run = run(
        "forward_kl = 0.5, jsd = { weight = 0.25, beta = 0.5 }, adaptive_kl = {}, cross_entropy = 0.25, label_smoothing = 0.1, temperature = 2.0, temperature_squared = true",
        "top_k = 6, temperatures = [1.5, 2.0]",
    );
    let output = check(&run);
    assert!(output.stdout.starts_with("on a small random model\nok "));
    assert!(!output.stdout.contains("the run's own"));
    assert!(!run.path("runs").exists(), "nothing is left behind");

    let trained = run.potstill(&["run", "run.toml"]);
    assert_eq!(trained.code, 0, "{}", trained.stderr);
    for line in metrics(&run) {
        let value = |name: &str| line["divergences"][name].as_f64().unwrap();
        let of = |name: &str| line[name].as_f64().unwrap();
        assert!(value("jsd") > 0.0 && value("adaptive_kl") > 0.0);
        let divergences = 0.5 * of("forward_kl") + 0.25 * value("jsd") + value("adaptive_kl");
        // The rest is the smoothed cross-entropy.
        let rest = of("loss") - 4.0 * divergences;
        assert!((rest / 0.25 - of("cross_entropy")).abs() < 2.0, "{line}");
    }
    let output = check(&run);
    assert!(
        output
            .stdout
            .contains("on the run's own student and signals\nok ")
    );
}

#[test]
fn draws_from_the_tail_are_trained_on() {
    let run = run(
        "forward_kl = 1.0, tail = \"draws\"",
        "top_k = 6, tail_draws = 8",
    );
    check(&run);
    let trained = run.potstill(&["run", "run.toml"]);
    assert_eq!(trained.code, 0, "{}", trained.stderr);
    check(&run);
    // Another loss uses the same signals.
    run.edit("tail = \"draws\"", "tail = \"renormalize\"");
    let trained = run.potstill(&["run", "run.toml"]);
    assert_eq!(trained.code, 0, "{}", trained.stderr);
}

#[test]
fn both_forms_train_the_same_student() {
    let losses = ["\"fused\"", "\"plain\""].map(|form| {
        let run = run("forward_kl = 1.0, cross_entropy = 0.5", "top_k = 6");
        run.edit(DEFAULT, &format!("{DEFAULT}\nloss_form = {form}"));
        let trained = run.potstill(&["run", "run.toml"]);
        assert_eq!(trained.code, 0, "{}", trained.stderr);
        let of = |line: &serde_json::Value| line["loss"].as_f64().unwrap();
        metrics(&run).iter().map(of).collect::<Vec<f64>>()
    });
    let [fused, plain] = losses;
    assert_eq!(fused.len(), 6);
    for (a, b) in fused.iter().zip(&plain) {
        assert!((a - b).abs() < 1e-4, "{fused:?} and {plain:?}");
    }
}

/// The signals were collected before the run file asked for a temperature.
#[test]
fn a_temperature_that_was_not_stored_is_an_error() {
    let run = Run::new();
    for stage in ["import", "collect", "curate"] {
        let output = run.potstill(&[stage, "run.toml"]);
        assert_eq!(output.code, 0, "{}", output.stderr);
    }
    run.edit(
        DEFAULT,
        &format!("{DEFAULT}\nloss = {{ forward_kl = 1.0, temperature = 2.0 }}"),
    );
    let output = run.potstill(&["train", "run.toml"]);
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(
        output.stderr.contains("add `temperatures = [2]`"),
        "{}",
        output.stderr
    );
}
