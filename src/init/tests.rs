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
    write::run_file(&Answers {
        name: "mine".to_owned(),
        data: "data.jsonl".to_owned(),
        detected,
        teacher: "models/teacher".to_owned(),
        facts: TeacherFacts {
            layers,
            vocabulary: 49_152,
            context: 2048,
            has_template,
        },
    })
}

#[test]
fn five_shapes_are_known() {
    let mut said = String::new();
    for (name, line) in SHAPES {
        let found = detected(line).unwrap();
        assert_eq!(found.name, name);
        said += &format!("{}, answers: {}\n", found.columns, found.has_answers);
    }
    insta::assert_snapshot!(said, @r#"
    { instruction = "instruction", input = "input", output = "output" }, answers: true
    { messages = "conversations" }, answers: true
    { messages = "messages" }, answers: false
    { question = "question", answer = "answer" }, answers: false
    { text = "text" }, answers: false
    "#);
}

#[test]
fn data_that_is_not_known_is_refused() {
    let said = |line| detected(line).unwrap_err().to_string();
    let columns = said(r#"{"a": "x", "b": 1}"#);
    assert!(
        columns.contains("no column is known to hold the prompts"),
        "{columns}"
    );
    assert!(said("a,b").contains("data.jsonl:1"), "{}", said("a,b"));
    assert!(said("").contains("the file has no lines"), "{}", said(""));
}

#[test]
fn what_is_written_can_be_read_and_has_every_key() {
    for (_, line) in SHAPES {
        for (layers, has_template) in [(30, true), (1, false)] {
            let text = written(detected(line).unwrap(), layers, has_template);
            let file = parse(Path::new("run.toml"), &text).unwrap();
            assert_eq!(file.run.name.as_str(), "mine");
            assert_eq!(file.student.every.is_some(), layers > 1);
            assert_eq!(file.teacher.unwrap().template.is_none(), has_template);
        }
    }
    insta::assert_snapshot!(written(detected(SHAPES[3].1).unwrap(), 30, true));
}

/// A default that is commented out is a default that can be written.
#[test]
fn lines_that_are_commented_out_can_be_used() {
    let text = written(detected(SHAPES[4].1).unwrap(), 30, true);
    let used: String = text
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(set) if set.contains(" = ") && !set.contains('…') => format!("{set}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    assert_ne!(used, text);
    let file = parse(Path::new("run.toml"), &used).unwrap();
    assert_eq!(file, parse(Path::new("run.toml"), &text).unwrap());
}

#[test]
fn an_answer_that_cannot_be_used_is_asked_for_again() {
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
    let name = known(None, "a name", Some("data"), &mut ask, &console, read).unwrap();
    assert_eq!((name.as_str(), questions), ("data", 2));
    let given = known(
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
fn names_are_proposed_that_can_be_folders() {
    let proposed = ["data/train set.jsonl", "${A}/x.jsonl", ".jsonl", ""].map(proposed_name);
    assert_eq!(proposed, ["train-set", "x", "jsonl", "run"]);
}

#[test]
fn paths_are_written_as_the_run_file_reads_them() {
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
