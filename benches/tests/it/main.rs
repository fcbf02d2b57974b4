//! The program on the quickstart's teacher: every part runs, and its output can be read.

// Clippy counts functions that tests share as library code.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

const QUICK: [&str; 3] = ["--quick", "--tokens", "16"];

/// Exit code and output of a finished process.
struct Finished {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Finished {
    fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        serde_json::from_str(&self.stdout).unwrap()
    }
}

fn teacher() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/quickstart/teacher")
}

fn bench(model: &Path, arguments: &[&[&str]]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_potstill-bench"));
    command.arg(model).args(arguments.concat());
    command
}

fn finish(mut command: Command) -> Finished {
    let output = command.output().unwrap();
    Finished {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs where no Python is found.
fn without_python(model: &Path, arguments: &[&[&str]]) -> Finished {
    let mut command = bench(model, arguments);
    command.env("PATH", "").env_remove("VIRTUAL_ENV");
    finish(command)
}

#[test]
fn without_python_potstill_is_measured_alone() {
    let finished = without_python(&teacher(), &[&QUICK]);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    for part in [
        "step | f32",
        "step | bf16",
        "prefill | f32",
        "prefill | bf16",
        "decode-32 | f32",
        "decode-1 | f32",
        "capture | f32",
    ] {
        let start = format!("| {part} |");
        let line = finished.stdout.lines().find(|l| l.starts_with(&start));
        let line = line.unwrap_or_else(|| panic!("no {part} in {}", finished.stdout));
        assert!(line.ends_with("threads | not measured |  |  |"), "{line}");
    }
    for text in [
        "pip install torch transformers",
        "| the whole step |",
        "| peak in a step, f32 |",
        "one text of 16 tokens, loss at 15 of them",
    ] {
        assert!(
            finished.stdout.contains(text),
            "{text}: {}",
            finished.stdout
        );
    }
    let progress = "decode-32 f32: Potstill, ";
    assert!(finished.stderr.contains(progress), "{}", finished.stderr);
}

#[test]
fn memory_is_measured_by_length_on_request() {
    let value = without_python(&teacher(), &[&["--only", "memory", "--json"]]).json();
    let rows = value["memory"].as_array().unwrap();
    let tokens: Vec<u64> = rows
        .iter()
        .map(|row| row["tokens"].as_u64().unwrap())
        .collect();
    assert_eq!(tokens, [12, 24, 48, 96, 192]);
    if cfg!(target_os = "linux") {
        for row in rows {
            let bytes = |key: &str| row["potstill"][key].as_u64().unwrap();
            assert!(bytes("peak_bytes") >= bytes("before_bytes"), "{row}");
            assert!(bytes("before_bytes") > 1 << 20, "{row}");
        }
    }
    assert_eq!(value["comparisons"].as_array().unwrap().len(), 0);
}

/// A folder with `config.json` alone is enough: the weights are random, and the loss needs only the shape.
#[test]
fn the_loss_and_steps_with_it_need_no_weights() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        teacher().join("config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    let parts = ["--only=loss,loss-memory,step-plain", "--json"];
    let value = without_python(folder.path(), &[&QUICK, &parts]).json();
    let comparisons = value["comparisons"].as_array().unwrap();
    let part = |name: &str| comparisons.iter().find(|c| c["part"] == name).unwrap();
    let (loss, step) = (part("loss"), part("step-plain"));
    assert_eq!(loss["shape"]["rows"], 16, "{loss}");
    let potstill = &loss["results"][0];
    for seconds in ["seconds", "products"] {
        let seconds = &potstill[seconds][0];
        assert!(seconds.as_f64().unwrap() > 0.0, "{potstill}");
    }
    if cfg!(target_os = "linux") {
        assert!(potstill["above_bytes"].as_u64().is_some(), "{potstill}");
    }
    assert_eq!(step["results"][1]["implementation"], "plain");
    assert_eq!(step["results"][1]["same"], true, "{step}");
    assert_eq!(value["loss_memory"].as_array().unwrap().len(), 1);
    let notes = value["notes"].to_string();
    assert!(notes.contains("they are random"), "{notes}");
}

#[test]
fn a_python_without_torch_is_an_error_if_it_was_named() {
    let named = ["--python", "nowhere/python"];
    let finished = finish(bench(&teacher(), &[&QUICK, &named]));
    assert_eq!(finished.code, Some(1));
    let message = "error: nowhere/python cannot run the PyTorch side";
    assert!(finished.stderr.contains(message), "{}", finished.stderr);
    assert_eq!(finished.stdout, "");
}

#[test]
fn a_measuring_process_needs_a_request() {
    let finished = finish(bench(&teacher(), &[&["--worker"]]));
    assert_eq!(finished.code, Some(1));
    let message = "`potstill-bench` starts itself";
    assert!(finished.stderr.contains(message), "{}", finished.stderr);
}

/// Runs beside the PyTorch of `POTSTILL_PYTHON`; `None`, with a message, where that is not set.
fn beside_pytorch(arguments: &[&str]) -> Option<Value> {
    let Some(python) = std::env::var_os("POTSTILL_PYTHON") else {
        eprintln!("skipped: POTSTILL_PYTHON is not set");
        return None;
    };
    let mut command = bench(&teacher(), &[&QUICK, &["--json"], arguments]);
    command.arg("--python").arg(python);
    Some(finish(command).json())
}

#[test]
fn both_sides_compute_the_same() {
    let Some(value) = beside_pytorch(&[]) else {
        return;
    };
    let comparisons = value["comparisons"].as_array().unwrap();
    assert_eq!(comparisons.len(), 7);
    for comparison in comparisons {
        assert_eq!(comparison["results"][1]["same"], true, "{comparison}");
        let ratio = &comparison["against"]["ratio"][0];
        assert!(ratio.as_f64().unwrap() > 0.0, "{comparison}");
    }
}

#[test]
fn the_loss_is_the_same_on_both_sides_in_both_types() {
    for float in ["f32", "bf16"] {
        let Some(value) = beside_pytorch(&["--only", "loss", "--type", float]) else {
            return;
        };
        let loss = &value["comparisons"][0];
        for index in [1, 2] {
            assert_eq!(loss["results"][index]["same"], true, "{loss}");
        }
        let ratio = &loss["against"]["ratio"][0];
        assert!(ratio.as_f64().unwrap() > 0.0, "{loss}");
    }
}
