//! `own_text` of `[eval]`, the unigram, and the controls on request, with a tiny random model.

use std::fs;

use serde_json::Value;

use crate::fixture::Run;

fn json(run: &Run, path: &str) -> Value {
    let text = fs::read_to_string(run.path(path)).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn every_model_is_measured_on_its_own_text() {
    let run = Run::new();
    run.edit(
        "steps = 6",
        "steps = 6\ncontrols = [\"sft\", \"same_token\", \"smoothing\", \"shuffled\"]",
    );
    run.edit(
        "resamples = 100",
        "resamples = 100\nown_text = { prompts = 3, max_new_tokens = 2 }",
    );
    let output = run.run();
    assert!(
        output
            .stderr
            .contains("train smoothing: label smoothing of "),
        "{}",
        output.stderr
    );
    let results = |model: &str| {
        let file = format!("runs/tiny/students/{model}/eval/own_text_results.json");
        json(&run, &file)
    };
    for model in [
        "untrained",
        "student",
        "sft",
        "same_token",
        "smoothing",
        "shuffled",
    ] {
        let results = results(model);
        assert_eq!(results["prompts"], 3, "{model}");
        // Only the tokens of the answers count, not those of the prompts.
        let tokens = results["tokens"].as_u64().unwrap();
        assert!((3..=6).contains(&tokens), "{model}: {results}");
        let kl = results["reverse_kl"].as_f64().unwrap();
        assert!(kl > 0.0 && kl < 6.0, "{model}: {results}");
    }
    assert_ne!(results("student"), results("untrained"));
    let unigram = json(&run, "runs/tiny/students/unigram/eval/test_results.json");
    assert!(unigram["kl"]["mean"].as_f64().unwrap() > 0.0, "{unigram}");
    let report = json(&run, "runs/tiny/report.json");
    let students = report["students"].as_array().unwrap();
    let names: Vec<&str> = (students.iter())
        .filter_map(|student| student["name"].as_str())
        .collect();
    assert_eq!(
        names,
        [
            "untrained",
            "unigram",
            "student",
            "sft",
            "same_token",
            "smoothing",
            "shuffled"
        ]
    );
    assert!(run.run().stderr.contains("nothing to do"));
}

#[test]
fn own_text_needs_a_teacher_in_this_process() {
    let run = Run::new();
    run.edit(
        "path = \"model\"",
        "url = \"http://localhost:1/v1\"\nmodel = \"m\"",
    );
    run.edit(
        "resamples = 100",
        "resamples = 100\nown_text = { prompts = 3, max_new_tokens = 2 }",
    );
    let output = run.potstill(&["check", "run.toml"]);
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(
        output
            .stderr
            .contains("`own_text` in [eval]: only a teacher in this process"),
        "{}",
        output.stderr
    );
}
