//! `--json` and `--quiet`.

use serde_json::Value;

use crate::fixture::{Run, Said};

fn events(said: &Said) -> Vec<Value> {
    let lines = said.stdout.lines();
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
fn json_tells_every_stage() {
    let run = Run::new();
    let said = run.potstill(&["run", "run.toml", "--json"]);
    assert_eq!(said.code, 0, "{}", said.stderr);
    let told = events(&said);
    // Sorted, since students are trained side by side.
    let of = |name: &str| -> Vec<&str> {
        let named = told.iter().filter(|e| e["event"] == name);
        let mut stages: Vec<&str> = named.map(|e| e["stage"].as_str().unwrap()).collect();
        stages.sort_unstable();
        stages
    };
    assert_eq!(of("started"), of("finished"));
    for stage in ["import", "collect", "train student", "eval sft", "report"] {
        assert!(of("finished").contains(&stage), "{stage}");
    }
    assert!(of("progress").contains(&"collect"));
    assert!(names(&told).contains(&"verdict"));
    let collect = told
        .iter()
        .find(|e| e["event"] == "finished" && e["stage"] == "collect");
    let collect = collect.unwrap();
    assert_eq!(collect["counts"]["answers"], 24);
    assert!(collect["seconds"].as_f64().unwrap() > 0.0);
    assert!(collect["unix_seconds"].as_f64().unwrap() > 1.7e9);
    let last = told.last().unwrap();
    assert_eq!(
        (&last["event"], &last["outcome"]),
        (&"ended".into(), &"done".into())
    );
    assert!(said.stderr.contains("collect: "), "people are told as well");

    let again = run.potstill(&["run", "run.toml", "--json", "--quiet"]);
    assert_eq!(again.stderr, "");
    let told = events(&again);
    assert!(!names(&told).contains(&"started"));
    assert!(names(&told).contains(&"up_to_date"));
    assert_eq!(told.last().unwrap()["outcome"], "up_to_date");
}

#[test]
fn json_tells_errors_too() {
    let run = Run::new();
    run.edit("steps = 6", "step = 6");
    let said = run.potstill(&["run", "run.toml", "--json", "--quiet"]);
    assert_eq!(said.code, 2);
    let told = events(&said);
    assert_eq!(names(&told), ["error", "ended"]);
    assert!(
        told[0]["text"]
            .as_str()
            .unwrap()
            .contains("did you mean `steps`")
    );
    assert_eq!(told[1]["exit_code"], 2);
    assert!(
        said.stderr.starts_with("error: run.toml:27:1"),
        "{}",
        said.stderr
    );
}

#[test]
fn quiet_leaves_the_verdict() {
    let run = Run::new();
    let said = run.potstill(&["run", "run.toml", "--quiet"]);
    assert_eq!((said.code, said.stderr.as_str()), (0, ""));
    assert!(said.stdout.contains("held-out KL"), "{}", said.stdout);
    let both = run.potstill(&["run", "run.toml", "--quiet", "--verbose"]);
    assert_eq!(both.code, 2);
}

/// No event is without a section in `docs/events.md`: the page is made from all of them, and
/// what a run says is among them.
#[test]
fn events_are_documented() {
    let page = potstill::events::page();
    let run = Run::new();
    let mut told = events(&run.potstill(&["check", "run.toml", "--json"]));
    told.extend(events(&run.potstill(&["run", "run.toml", "--json"])));
    for event in told {
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
