//! `plan`: memory, time and cost before a run, and advice that makes it fit.

use serde_json::Value;

use crate::fixture::{CommandOutput, Run};

/// The event `plan` of a command with `--json`.
fn plan_of(output: &CommandOutput) -> Value {
    let mut events = output.stdout.lines().map(|line| {
        let event: Value = serde_json::from_str(line).unwrap();
        event
    });
    let plan = events.find(|event| event["event"] == "plan");
    assert!(plan.is_some(), "{}\n{}", output.stdout, output.stderr);
    plan.unwrap()
}

fn numbers(value: &Value) -> Vec<u64> {
    let list = value.as_array().unwrap().iter();
    list.map(|number| number.as_u64().unwrap()).collect()
}

#[test]
fn a_plan_sums_up_and_writes_nothing() {
    let run = Run::new();
    run.edit("seed = 3", "seed = 3\nusd_per_hour = 2.5");
    let output = run.potstill(&["plan", "run.toml"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    for line in [
        "parameters  ",
        "memory      ",
        "tokens      6 steps of 4 sequences",
        "operations  ",
        "time        ",
        "collect     24 answers",
        "cost        ",
        "DeepSeek-V3 was trained in 2.788 million H800-hours on 14.8 trillion tokens: 0.188 H800-hours and $0.377 for a million tokens, $5.576 million at $2 an hour",
    ] {
        assert!(output.stdout.contains(line), "{line}\n{}", output.stdout);
    }
    assert!(!run.path("runs").exists());
    let output = run.potstill(&["plan", "run.toml", "--json"]);
    let plan = plan_of(&output);
    let parts = plan["memory"].as_object().unwrap();
    let sum: u64 = parts.values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(plan["memory_bytes"], sum);
    assert_eq!(plan["fits"], true);
    assert_eq!(plan["advice"].as_array().unwrap().len(), 0);
    // The student and the SFT control.
    assert_eq!((&plan["steps"], &plan["trainings"]), (&6.into(), &2.into()));
    let of = |name: &str| plan[name].as_f64().unwrap();
    let tokens = 2.0 * 6.0 * 4.0 * of("tokens_per_sequence");
    assert!((of("tokens") / tokens - 1.0).abs() < 1e-9);
    assert!((of("usd") / of("device_hours") - 2.5).abs() < 1e-9);
    let per_million = of("usd") / of("tokens") * 1e6;
    assert!((of("usd_per_million_tokens") / per_million - 1.0).abs() < 1e-9);
    // No MFU on a CPU.
    assert!(of("flops_per_token") > 4.0 * of("parameters") && plan["mfu"].is_null());
    assert!(of("step_seconds") > 0.0 && of("collect_hours") > 0.0);
    assert!(!run.path("runs").exists());
}

#[test]
fn advice_that_is_followed_fits() {
    let run = Run::new();
    run.edit("micro_batch = 2", "micro_batch = 4");
    let whole = plan_of(&run.potstill(&["plan", "run.toml", "--json"]));
    let peak = whole["memory_bytes"].as_u64().unwrap();
    let program = whole["memory"]["program"].as_u64().unwrap();
    // Three quarters of what the program does not need itself.
    let limit = program + (peak - program) / 4 * 3;
    let gigabytes = format!("{:.9}", limit as f64 / 1e9);
    let arguments = ["plan", "run.toml", "--json", "--memory-gb", &gigabytes];
    let output = run.potstill(&arguments);
    let plan = plan_of(&output);
    assert_eq!(plan["fits"], false, "{plan}");
    assert!(plan.get("step_seconds").is_none());
    let peaks = numbers(&plan["advice_bytes"]);
    assert!(peaks.last().unwrap() <= &limit, "{plan}");
    let mut text = std::fs::read_to_string(run.path("run.toml")).unwrap();
    for change in plan["advice"].as_array().unwrap() {
        let change = change.as_str().unwrap();
        let (key, _) = change.split_once(" = ").unwrap();
        let kept = text
            .lines()
            .filter(|line| !line.starts_with(&format!("{key} = ")));
        let kept: Vec<&str> = kept.collect();
        text = kept
            .join("\n")
            .replace("[train]", &format!("[train]\n{change}"))
            + "\n";
    }
    run.write("run.toml", &text);
    let plan = plan_of(&run.potstill(&arguments));
    assert_eq!(plan["fits"], true, "{plan}\n{text}");
    assert_eq!(plan["memory_bytes"], *peaks.last().unwrap());
    let people = run.potstill(&["plan", "run.toml", "--memory-gb", "0.001"]);
    assert!(
        people.stdout.contains("it does not fit") && people.stdout.contains("to fit"),
        "{}",
        people.stdout
    );
}

#[test]
fn rows_of_the_run_directory_are_used_and_left_as_they_are() {
    let run = Run::new();
    run.run();
    let before = run.published();
    let output = run.potstill(&["plan", "run.toml"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert!(
        output
            .stdout
            .contains("(from the rows of the run directory)"),
        "{}",
        output.stdout
    );
    assert!(!output.stdout.contains("collect     "), "{}", output.stdout);
    assert!(run.published() == before);
    let report = std::fs::read_to_string(run.path("runs/tiny/report.md")).unwrap();
    assert!(
        report.contains("## Cost of training") && report.contains("DeepSeek-V3"),
        "{report}"
    );
}

#[test]
fn wrong_amounts_are_refused() {
    let run = Run::new();
    for flag in ["--memory-gb", "--usd-per-hour", "--answer-tokens"] {
        for value in ["0", "-1", "much"] {
            let output = run.potstill(&["plan", "run.toml", &format!("{flag}={value}")]);
            assert_eq!(output.code, 2, "{flag} {value}: {}", output.stderr);
        }
    }
}
