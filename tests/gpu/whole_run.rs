//! A run on the device, killed in the middle of training and resumed, beside one on the CPU.

use std::fs;
use std::time::{Duration, Instant};

use potstill::datasets::{Completion, Signal, read_shard};
use serde_json::Value;

use crate::device;
use crate::fixture::Run;

/// Few tokens, and few different shapes: most of the time goes into compiling kernels for each shape.
fn small_run() -> Run {
    let run = Run::new();
    run.write_prompts(8);
    run.edit("max_new_tokens = 12", "max_new_tokens = 8");
    run.edit("batch = 5\nsignals = { top_k = 6 }", "batch = 16");
    run.edit("[curate]", "[score]\ntop_k = 6\nbatch = 4\n\n[curate]");
    run.edit("steps = 6", "steps = 8");
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
    println!(
        "done after {:.0} s\n{}",
        began.elapsed().as_secs_f64(),
        output.stderr
    );
}

fn completions(run: &Run) -> Vec<Completion> {
    let shard = run.path("runs/tiny/completions/shard-00000.parquet");
    let rows = read_shard(&shard).unwrap();
    rows.map(Result::unwrap).collect()
}

fn signals(run: &Run) -> Vec<Signal> {
    let shard = run.path("runs/tiny/signals/shard-00000.parquet");
    let rows = read_shard(&shard).unwrap();
    rows.map(Result::unwrap).collect()
}

/// The values of a key in `metrics.jsonl`, in the order of the steps.
fn metric(run: &Run, student: &str, key: &str) -> Vec<f64> {
    let path = format!("runs/tiny/students/{student}/metrics.jsonl");
    let text = fs::read_to_string(run.path(&path)).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines
        .map(|line: Value| line[key].as_f64().unwrap())
        .collect()
}

fn largest<T: Copy>(pairs: impl IntoIterator<Item = (T, T)>, difference: fn(T, T) -> f64) -> f64 {
    let differences = pairs.into_iter().map(|(a, b)| difference(a, b));
    differences.fold(0.0, f64::max)
}

fn absolute(a: f32, b: f32) -> f64 {
    f64::from((a - b).abs())
}

fn relative(a: f64, b: f64) -> f64 {
    (a - b).abs() / b.abs()
}

#[test]
fn a_run_on_the_device_is_that_on_the_cpu() {
    let (cpu, gpu) = (small_run(), small_run());
    cpu.run();
    run_with_a_kill(&gpu);

    // The random numbers of an answer follow from its seed, and rounding does not change one of these tokens.
    let texts = |run| completions(run).into_iter().map(|row| row.answer);
    assert!(texts(&gpu).eq(texts(&cpu)));
    let (of_cpu, of_gpu) = (signals(&cpu), signals(&gpu));
    let numbers = |signals: &[Signal]| -> Vec<f32> {
        let rows = signals.iter().flat_map(|signal| &signal.rows);
        rows.flat_map(|row| {
            [row.tail_logprob, row.entropy]
                .into_iter()
                .chain(row.logprobs.clone())
        })
        .collect()
    };
    let (of_cpu, of_gpu) = (numbers(&of_cpu), numbers(&of_gpu));
    assert_eq!(of_cpu.len(), of_gpu.len());
    let signals = largest(of_gpu.into_iter().zip(of_cpu), absolute);
    println!("signals: {signals:.1e} nats");
    for student in ["student", "sft"] {
        for key in ["loss", "gradient_norm"] {
            let (of_cpu, of_gpu) = (metric(&cpu, student, key), metric(&gpu, student, key));
            assert_eq!(of_gpu.len(), 8);
            let difference = largest(of_gpu.into_iter().zip(of_cpu), relative);
            println!("{student} {key}: {difference:.1e}");
        }
    }
}
