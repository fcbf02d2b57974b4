use std::path::Path;

use super::columns::{Detected, detect};
use super::*;
use crate::progress::OutputOptions;
use crate::run_file::parse;

const SHAPES: [(&str, &str); 5] = [
    (
        "alpaca",
        r#"{"instruction": "Add.", "input": "1 2", "output": "3"}"#,
    ),
    (
        "sharegpt",
        r#"{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}"#,
    ),
    (
        "messages",
        r#"{"messages": [{"role": "user", "content": "Hi"}]}"#,
    ),
    (
        "question and answer",
        r#"{"question": "1 + 1?", "answer": 2}"#,
    ),
    ("text", r#"{"text": "Once upon a time"}"#),
];

fn detected(line: &str) -> anyhow::Result<Detected> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.jsonl");
    std::fs::write(&path, format!("{line}\n\n{line}\n")).unwrap();
    detect(&path)
}

fn written(detected: Detected, layers: usize, has_template: bool) -> String {
    write::run_file(&inputs(detected, layers, has_template))
}

fn inputs(detected: Detected, layers: usize, has_template: bool) -> RunFileInputs {
    RunFileInputs {
        name: "mine".to_owned(),
        data: "data.jsonl".to_owned(),
        detected,
        teacher: "models/teacher".to_owned(),
        facts: TeacherFacts {
            layers,
            vocabulary: 49_152,
            context: 2048,
            has_template,
            thinking_switch: None,
        },
    }
}

#[test]
fn a_thinking_switch_is_proposed_and_not_set() {
    let mut inputs = inputs(detected(SHAPES[3].1).unwrap(), 30, true);
    inputs.facts.thinking_switch = Some("enable_thinking");
    let text = write::run_file(&inputs);
    let line = "# template_arguments = { enable_thinking = false }";
    assert!(text.contains(line), "{text}");
    let reads = "which reads `enable_thinking`; this lets the teacher answer without reasoning.";
    assert!(text.contains(reads), "{text}");
    let file = parse(Path::new("run.toml"), &text).unwrap();
    assert!(file.teacher.unwrap().template_arguments.is_empty());
    let text = text.replace(line, line.trim_start_matches("# "));
    let file = parse(Path::new("run.toml"), &text).unwrap();
    assert!(!file.teacher.unwrap().template_arguments.is_empty());
}

#[test]
fn five_layouts_are_detected() {
    let mut layouts = String::new();
    for (name, line) in SHAPES {
        let found = detected(line).unwrap();
        assert_eq!(found.shape, name);
        layouts += &format!("{}, answers: {}\n", found.columns, found.has_answers);
    }
    insta::assert_snapshot!(layouts, @r#"
    { instruction = "instruction", input = "input", output = "output" }, answers: true
    { messages = "conversations" }, answers: true
    { messages = "messages" }, answers: false
    { question = "question", answer = "answer" }, answers: true
    { text = "text" }, answers: false
    "#);
}

#[test]
fn unknown_layouts_are_refused() {
    let error = |line| detected(line).unwrap_err().to_string();
    let columns = error(r#"{"a": "x", "b": 1}"#);
    assert!(
        columns.contains("no column is known to hold the prompts"),
        "{columns}"
    );
    assert!(error("a,b").contains("data.jsonl:1"), "{}", error("a,b"));
    assert!(error("").contains("the file has no lines"), "{}", error(""));
}

#[test]
fn the_written_file_can_be_parsed_and_has_every_key() {
    for (_, line) in SHAPES {
        for (layers, has_template) in [(30, true), (1, false)] {
            let text = written(detected(line).unwrap(), layers, has_template);
            let file = parse(Path::new("run.toml"), &text).unwrap();
            assert_eq!(file.run.name.as_str(), "mine");
            assert_eq!(file.student.layers.is_some(), layers > 1);
            assert_eq!(file.teacher.unwrap().template.is_none(), has_template);
        }
    }
    insta::assert_snapshot!(written(detected(SHAPES[3].1).unwrap(), 30, true));
}

/// Uncommenting the defaults changes nothing.
#[test]
fn defaults_can_be_uncommented() {
    let text = written(detected(SHAPES[4].1).unwrap(), 30, true);
    let is_key = |set: &str| {
        let key = set.split(" = ").next().unwrap_or_default();
        key.chars().all(|c| c.is_ascii_lowercase() || c == '_')
    };
    let used: String = text
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(set) if set.contains(" = ") && is_key(set) && !set.contains('…') => {
                format!("{set}\n")
            }
            _ => format!("{line}\n"),
        })
        .collect();
    assert_ne!(used, text);
    let file = parse(Path::new("run.toml"), &used).unwrap();
    assert_eq!(file, parse(Path::new("run.toml"), &text).unwrap());
}

#[test]
fn the_question_is_repeated_after_a_bad_answer() {
    let console = Console::new(OutputOptions {
        quiet: true,
        ..OutputOptions::default()
    });
    let mut answers = ["../x", ""].into_iter();
    let mut questions = 0;
    let mut ask = |_: &str, default: Option<&str>| {
        questions += 1;
        let answer = answers.next().unwrap();
        Ok(match answer.is_empty() {
            true => default.unwrap().to_owned(),
            false => answer.to_owned(),
        })
    };
    let read = |name: &str| {
        RunName::try_from(name.to_owned()).map_err(refusal)?;
        Ok(name.to_owned())
    };
    let name = given_or_asked(None, "a name", Some("data"), &mut ask, &console, read).unwrap();
    assert_eq!((name.as_str(), questions), ("data", 2));
    let given = given_or_asked(
        Some("../x".to_owned()),
        "a name",
        None,
        &mut |_, _| unreachable!(),
        &console,
        read,
    );
    assert!(given.is_err());
}

#[test]
fn proposed_names_are_valid_folder_names() {
    let proposed = ["data/train set.jsonl", "${A}/x.jsonl", ".jsonl", ""].map(proposed_name);
    assert_eq!(proposed, ["train-set", "x", "jsonl", "run"]);
}

#[test]
fn paths_are_rewritten_relative_to_the_run_file() {
    let beside = |folder: &str, path: &str| beside(Path::new(folder), path).unwrap();
    assert_eq!(beside("", "a.jsonl"), "a.jsonl");
    assert_eq!(beside("runs", "/a.jsonl"), "/a.jsonl");
    assert_eq!(beside("runs", "${A}/a.jsonl"), "${A}/a.jsonl");
    let absolute = beside("runs", "a.jsonl");
    assert!(
        Path::new(&absolute).is_absolute() && absolute.ends_with("a.jsonl"),
        "{absolute}"
    );
}
