//! A run on the device, killed in the middle of training and resumed, beside one on the CPU.

use std::fs;
use std::time::{Duration, Instant};

use potstill::datasets::{Completion, Signal, read_shard};
use serde_json::Value;

use crate::device;
use crate::fixture::Run;

/// Few tokens and few different shapes, because most of the time goes into compiling kernels. The teacher is the
/// quickstart's, whose distributions are sharp, so that losses are far from zero.
const RUN_FILE: &str = r#"[run]
name = "tiny"
seed = 3

[import]
path = "problems.jsonl"
columns = { question = "question", answer = "answer" }

[teacher]
path = "TEACHER"

[collect]
max_new_tokens = 8
batch = 16

[score]
top_k = 8
batch = 8

[curate]
keep = "all"
test = 0.5

[student]
random = { hidden_size = 32, intermediate_size = 64, layers = 2, heads = 2, key_value_heads = 1 }

[train]
steps = 8
batch = 4
micro_batch = 2
learning_rate = 1e-2
checkpoint_every = 2
controls = []

[eval]
resamples = 100
"#;

/// Problems of the quickstart's data that are used.
const PROBLEMS: usize = 8;

fn small_run() -> Run {
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/quickstart");
    let run = Run::new();
    run.write(
        "run.toml",
        &RUN_FILE.replace("TEACHER", &format!("{examples}/teacher")),
    );
    let problems = fs::read_to_string(format!("{examples}/problems.jsonl")).unwrap();
    let problems: Vec<&str> = problems.lines().take(PROBLEMS).collect();
    run.write("problems.jsonl", &problems.join("\n"));
    run
}

/// Runs all stages on the device. The first process is killed with SIGKILL behind a checkpoint of the training.
fn run_with_a_kill(run: &Run) {
    let arguments = ["run", "run.toml", "--device", &device()];
    let mut child = run.start(&arguments);
    let checkpoint = run.path("runs/tiny/students/student/checkpoints/step-00000004");
    let began = Instant::now();
    while !checkpoint.exists() {
        let running = child.try_wait().unwrap().is_none();
        assert!(running && began.elapsed() < Duration::from_secs(1800));
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    println!("killed after {:.0} s", began.elapsed().as_secs_f64());
    let output = run.potstill(&arguments);
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert!(
        output.stderr.contains("train student: 5/8 steps"),
        "{}",
        output.stderr
    );
    println!(
        "resumed, and done after {:.0} s",
        began.elapsed().as_secs_f64()
    );
}

fn completions(run: &Run) -> Vec<Completion> {
    let shard = run.path("runs/tiny/completions/shard-00000.parquet");
    let rows = read_shard(&shard).unwrap();
    rows.map(Result::unwrap).collect()
}

/// Log-probabilities and entropies of all positions.
fn signals(run: &Run) -> Vec<f32> {
    let shard = run.path("runs/tiny/signals/shard-00000.parquet");
    let signals = read_shard(&shard).unwrap();
    let signals: Vec<Signal> = signals.map(Result::unwrap).collect();
    let rows = signals.iter().flat_map(|signal| &signal.rows);
    rows.flat_map(|row| [row.logprobs, &[row.tail_logprob, row.entropy]].concat())
        .collect()
}

/// The values of a key in `metrics.jsonl`, in the order of the steps.
fn metric(run: &Run, key: &str) -> Vec<f64> {
    let text = fs::read_to_string(run.path("runs/tiny/students/student/metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines
        .map(|line: Value| line[key].as_f64().unwrap())
        .collect()
}

/// KL on test, in nats per token.
fn test_kl(run: &Run) -> f64 {
    let path = run.path("runs/tiny/students/student/eval/test_results.json");
    let results: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    results["kl"]["mean"].as_f64().unwrap()
}

/// Largest difference of a training's numbers from the CPU's, as a share of them. llvmpipe was seen to differ by 1e-7 of
/// the losses and of the KL on test, and 4e-7 of a gradient's norm: the rounding error of an f32 sum of some hundred
/// products. Over ten times as much is allowed, and a wrong kernel is further off. CUDA may compute products of f32 in
/// TF32, whose numbers have 11 bits.
fn tolerance() -> f64 {
    match device().as_str() {
        "cuda" => 1e-2,
        _ => 1e-5,
    }
}

/// Largest difference of the signals in nats. llvmpipe was seen to differ by 7e-6: the log of a small tail mass has the
/// rounding error of the mass, which is a difference from 1, relative to it.
fn signal_tolerance() -> f64 {
    10.0 * tolerance()
}

/// Asserts that numbers of the device are near those of the CPU, in units of `unit(CPU's)`.
fn assert_near(
    what: &str,
    of_device: &[f64],
    of_cpu: &[f64],
    tolerance: f64,
    unit: fn(f64) -> f64,
) {
    assert_eq!(of_device.len(), of_cpu.len(), "{what}");
    let pairs = of_device.iter().zip(of_cpu);
    let differences = pairs.map(|(a, b)| (a - b).abs() / unit(*b));
    let largest = differences.fold(0.0, f64::max);
    println!("{what}: {largest:.1e} from the CPU's, of {tolerance:.0e} that are allowed");
    assert!(largest <= tolerance, "{what}: {of_device:?} and {of_cpu:?}");
}

/// Compares what the training on the device came to with that on the CPU.
fn assert_same_training(what: &str, gpu: &Run, cpu: &Run) {
    for key in ["loss", "gradient_norm"] {
        let [of_gpu, of_cpu] = [gpu, cpu].map(|run| metric(run, key));
        assert_eq!(of_gpu.len(), 8);
        assert_near(
            &format!("{what}, {key}"),
            &of_gpu,
            &of_cpu,
            tolerance(),
            f64::abs,
        );
    }
    let [of_gpu, of_cpu] = [gpu, cpu].map(|run| [test_kl(run)]);
    assert_near(
        &format!("{what}, KL on test"),
        &of_gpu,
        &of_cpu,
        tolerance(),
        f64::abs,
    );
}

#[test]
fn a_run_on_the_device_is_that_on_the_cpu() {
    let (cpu, gpu) = (small_run(), small_run());
    cpu.run();
    run_with_a_kill(&gpu);

    // The random numbers of an answer follow from its seed, and rounding changes none of these tokens.
    let texts = |run| completions(run).into_iter().map(|row| row.answer);
    assert!(texts(&gpu).eq(texts(&cpu)));
    let [of_gpu, of_cpu] =
        [&gpu, &cpu].map(|run| -> Vec<f64> { signals(run).into_iter().map(f64::from).collect() });
    assert_near(
        "signals, nats",
        &of_gpu,
        &of_cpu,
        signal_tolerance(),
        |_| 1.0,
    );
    assert_same_training("whole model", &gpu, &cpu);
    assert!(gpu.path("runs/tiny/report.html").exists());

    // The same answers and distributions train an adapter.
    let began = Instant::now();
    for (run, device) in [(&cpu, "cpu"), (&gpu, device().as_str())] {
        run.edit(
            "controls = []",
            "controls = []\n\n[train.adapter]\nrank = 4",
        );
        let output = run.potstill(&["run", "run.toml", "--device", device]);
        assert_eq!(output.code, 0, "{}", output.stderr);
    }
    println!("adapter after {:.0} s", began.elapsed().as_secs_f64());
    assert_same_training("adapter", &gpu, &cpu);
}
