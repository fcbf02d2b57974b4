//! Output with `--json` and with `--quiet`.

use serde_json::Value;

use crate::fixture::{CommandOutput, Run};

fn events(output: &CommandOutput) -> Vec<Value> {
    let lines = output.stdout.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn names(events: &[Value]) -> Vec<&str> {
    events
        .iter()
        .map(|e| e["event"].as_str().unwrap())
        .collect()
}

#[test]
fn json_has_events_of_each_stage() {
    let run = Run::new();
    let output = run.potstill(&["run", "run.toml", "--json"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    let all = events(&output);
    // Sorted, since students are trained in parallel.
    let of = |name: &str| -> Vec<&str> {
        let named = all.iter().filter(|e| e["event"] == name);
        let mut stages: Vec<&str> = named.map(|e| e["stage"].as_str().unwrap()).collect();
        stages.sort_unstable();
        stages
    };
    assert_eq!(of("started"), of("finished"));
    for stage in ["import", "collect", "train student", "eval sft", "report"] {
        assert!(of("finished").contains(&stage), "{stage}");
    }
    assert!(of("progress").contains(&"collect"));
    assert!(names(&all).contains(&"verdict"));
    let collect = all
        .iter()
        .find(|e| e["event"] == "finished" && e["stage"] == "collect");
    let collect = collect.unwrap();
    assert_eq!(collect["counts"]["answers"], 24);
    assert!(collect["seconds"].as_f64().unwrap() > 0.0);
    assert!(collect["unix_seconds"].as_f64().unwrap() > 1.7e9);
    let last = all.last().unwrap();
    assert_eq!(
        (&last["event"], &last["outcome"]),
        (&"ended".into(), &"done".into())
    );
    assert!(
        output.stderr.contains("collect: "),
        "stderr has the lines for people"
    );

    let again = run.potstill(&["run", "run.toml", "--json", "--quiet"]);
    assert_eq!(again.stderr, "");
    let all = events(&again);
    assert!(!names(&all).contains(&"started"));
    assert!(names(&all).contains(&"up_to_date"));
    assert_eq!(all.last().unwrap()["outcome"], "up_to_date");
}

#[test]
fn json_has_errors() {
    let run = Run::new();
    run.edit("steps = 6", "step = 6");
    let output = run.potstill(&["run", "run.toml", "--json", "--quiet"]);
    assert_eq!(output.code, 2);
    let all = events(&output);
    assert_eq!(names(&all), ["error", "ended"]);
    assert!(
        all[0]["text"]
            .as_str()
            .unwrap()
            .contains("did you mean `steps`")
    );
    assert_eq!(all[1]["exit_code"], 2);
    assert!(
        output.stderr.starts_with("error: run.toml:27:1"),
        "{}",
        output.stderr
    );
}

#[test]
fn quiet_prints_errors_and_what_was_asked_for() {
    let run = Run::new();
    for command in ["run", "report", "eval"] {
        let output = run.potstill(&[command, "run.toml", "--quiet"]);
        assert_eq!((output.code, output.stderr.as_str()), (0, ""));
        assert_eq!(output.stdout, "", "{command}");
    }
    let plan = run.potstill(&["check", "run.toml", "--quiet"]);
    assert_eq!((plan.code, plan.stderr.as_str()), (0, ""));
    assert!(plan.stdout.contains("teacher"), "{}", plan.stdout);
    let both = run.potstill(&["run", "run.toml", "--quiet", "--verbose"]);
    assert_eq!(both.code, 2);
}

/// Each event that a run emits has a section in `docs/events.md` that lists its fields.
#[test]
fn events_are_documented() {
    let page = potstill::events::page();
    let run = Run::new();
    let mut all = events(&run.potstill(&["check", "run.toml", "--json"]));
    all.extend(events(&run.potstill(&["run", "run.toml", "--json"])));
    for event in all {
        let name = event["event"].as_str().unwrap();
        let section = page.split(&format!("## `{name}`")).nth(1);
        let section = section.unwrap_or_else(|| panic!("{name} is not documented"));
        let section = section.split("\n## ").next().unwrap();
        for field in event.as_object().unwrap().keys() {
            let known = ["event", "unix_seconds"].contains(&field.as_str());
            assert!(
                known || section.contains(&format!("| `{field}` |")),
                "{name}: {field}"
            );
        }
    }
}
