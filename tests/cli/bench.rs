//! `bench` on the tiny model: all parts run, and the output can be parsed.

use std::ffi::OsString;

use serde_json::Value;

use crate::fixture::{CommandOutput, Run};

const QUICK: [&str; 5] = ["bench", "model", "--quick", "--tokens", "16"];

/// Runs the command with an empty PATH, so that no Python is found.
fn without_python(run: &Run, arguments: &[&str]) -> CommandOutput {
    let mut command = run.command(arguments);
    command.env("PATH", "").env_remove("VIRTUAL_ENV");
    run.output(&mut command)
}

#[test]
fn without_python_potstill_is_measured_alone() {
    let run = Run::new();
    let output = without_python(&run, &QUICK);
    assert_eq!(output.code, 0, "{}", output.stderr);
    for part in [
        "step | f32",
        "step | bf16",
        "prefill | f32",
        "prefill | bf16",
        "decode-32 | f32",
        "decode-1 | f32",
        "capture | f32",
    ] {
        let line = output
            .stdout
            .lines()
            .find(|l| l.starts_with(&format!("| {part} |")));
        let line = line.unwrap_or_else(|| panic!("no {part} in {}", output.stdout));
        assert!(line.ends_with("threads | not measured |  |  |"), "{line}");
    }
    for part in [
        "pip install torch transformers",
        "| the whole step |",
        "| the most in a step, f32 |",
        "one text of 16 tokens, loss at 15 of them",
    ] {
        assert!(output.stdout.contains(part), "{part}: {}", output.stdout);
    }
    assert!(
        output.stderr.contains("decode-32 f32: Potstill, "),
        "{}",
        output.stderr
    );
}

#[test]
fn memory_is_measured_by_length_where_it_is_asked_for() {
    let run = Run::new();
    let output = without_python(&run, &["bench", "model", "--only", "memory", "--json"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    let value: Value = serde_json::from_str(&output.stdout).unwrap();
    let rows = value["memory"].as_array().unwrap();
    let tokens: Vec<u64> = rows
        .iter()
        .map(|row| row["tokens"].as_u64().unwrap())
        .collect();
    assert_eq!(tokens, [3, 6, 12, 24, 48]);
    if cfg!(target_os = "linux") {
        for row in rows {
            let bytes = |key: &str| row["potstill"][key].as_u64().unwrap();
            assert!(bytes("peak_bytes") >= bytes("before_bytes"), "{row}");
            assert!(bytes("before_bytes") > 1 << 20, "{row}");
        }
    }
    assert_eq!(value["rows"].as_array().unwrap().len(), 0);
}

/// A folder that has only `config.json` gives a random model, and the shape for the loss.
#[test]
fn the_loss_and_steps_with_it_need_no_weights() {
    let run = Run::new();
    std::fs::remove_file(run.path("model/model.safetensors")).unwrap();
    let parts = "--only=loss,loss-memory,step-plain";
    let output = without_python(&run, &[&QUICK[..], &[parts, "--json"]].concat());
    assert_eq!(output.code, 0, "{}", output.stderr);
    let value: Value = serde_json::from_str(&output.stdout).unwrap();
    let [loss, step] = [0, 1].map(|part| {
        let contests = value["contests"].as_array().unwrap();
        let named = |contest: &&Value| contest["part"] == ["loss", "step-plain"][part];
        contests.iter().find(named).unwrap()
    });
    assert_eq!(loss["shape"]["rows"], 16, "{loss}");
    let ours = &loss["sides"][0];
    for seconds in ["seconds", "products"] {
        assert!(ours[seconds][0].as_f64().unwrap() > 0.0, "{ours}");
    }
    if cfg!(target_os = "linux") {
        assert!(ours["above_bytes"].as_u64().is_some(), "{ours}");
    }
    assert_eq!(step["sides"][1]["how"], "plain");
    assert_eq!(step["sides"][1]["same"], true, "{step}");
    assert_eq!(value["loss_memory"].as_array().unwrap().len(), 1);
    let notes = value["notes"].to_string();
    assert!(notes.contains("they are random"), "{notes}");
}

#[test]
fn a_python_that_cannot_is_an_error_only_where_it_was_named() {
    let run = Run::new();
    let output = run.potstill(&["bench", "model", "--quick", "--python", "nowhere/python"]);
    assert_eq!(output.code, 1);
    assert!(
        output
            .stderr
            .contains("nowhere/python cannot run the PyTorch side"),
        "{}",
        output.stderr
    );
    assert_eq!(output.stdout, "");
}

#[test]
fn a_process_that_measures_needs_a_request() {
    let run = Run::new();
    let output = run.potstill(&["bench", "model", "--child"]);
    assert_eq!(output.code, 1);
    assert!(
        output.stderr.contains("`potstill bench` starts itself"),
        "{}",
        output.stderr
    );
}

#[test]
fn both_sides_compute_the_same() {
    let Some(python) = std::env::var_os("POTSTILL_PYTHON") else {
        eprintln!("skipped: POTSTILL_PYTHON is not set");
        return;
    };
    let run = Run::new();
    let mut command = run.command(&QUICK);
    command.args([OsString::from("--python"), python, "--json".into()]);
    let output = run.output(&mut command);
    assert_eq!(output.code, 0, "{}", output.stderr);
    let value: Value = serde_json::from_str(&output.stdout).unwrap();
    let rows = value["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 7);
    for row in rows {
        assert_eq!(row["same"], true, "{row}");
        assert!(row["ratio"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[test]
fn the_loss_is_the_same_on_both_sides_in_both_types() {
    let Some(python) = std::env::var_os("POTSTILL_PYTHON") else {
        eprintln!("skipped: POTSTILL_PYTHON is not set");
        return;
    };
    for dtype in ["f32", "bf16"] {
        let run = Run::new();
        let mut command = run.command(&QUICK);
        command.args(["--only", "loss", "--type", dtype, "--json", "--python"]);
        let output = run.output(command.arg(&python));
        assert_eq!(output.code, 0, "{}", output.stderr);
        let value: Value = serde_json::from_str(&output.stdout).unwrap();
        let loss = &value["contests"][0];
        for index in [1, 2] {
            assert_eq!(loss["sides"][index]["same"], true, "{loss}");
        }
        assert!(
            loss["against"]["ratio"][0].as_f64().unwrap() > 0.0,
            "{loss}"
        );
    }
}
