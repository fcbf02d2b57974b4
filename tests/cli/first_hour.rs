//! What a newcomer types first: `init`, `completions`.

use std::fs;

use serde_json::{Value, json};

use crate::fixture::Run;

/// `init` over the fixture's model and some data, then `check`.
fn init_and_check(data: &str) -> (String, String) {
    let run = Run::new();
    fs::remove_file(run.path("run.toml")).unwrap();
    run.write("mine.jsonl", data);
    let arguments = ["init", "--data", "mine.jsonl", "--teacher", "model"];
    let said = run.potstill(&arguments);
    assert_eq!(said.code, 0, "{}", said.stderr);
    let checked = run.potstill(&["check", "run.toml"]);
    assert_eq!(checked.code, 0, "{}", checked.stderr);
    (said.stderr, checked.stdout)
}

#[test]
fn init_writes_what_check_finds_fine() {
    for (data, columns) in [
        ("{\"text\": \"Once\"}\n", "text"),
        (
            "{\"question\": \"1 + 1?\", \"answer\": 2}\n",
            "question and answer",
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}\n",
            "messages",
        ),
    ] {
        let (said, checked) = init_and_check(data);
        assert!(said.contains(&format!("looks like {columns}")), "{said}");
        assert!(checked.contains("run       mine in runs/mine"), "{checked}");
    }
}

#[test]
fn init_asks_nothing_where_nobody_sits() {
    let run = Run::new();
    let said = run.potstill(&["init", "new.toml", "--name", "x"]);
    insta::assert_snapshot!(
        "nobody_to_ask",
        format!("exit code {}\n{}", said.code, said.stderr)
    );
    assert!(!run.path("new.toml").exists());
}

#[test]
fn init_writes_over_nothing() {
    let run = Run::new();
    let before = fs::read_to_string(run.path("run.toml")).unwrap();
    let flags = ["--data", "prompts.jsonl", "--teacher", "model"];
    let said = run.potstill(&[&["init"], &flags[..]].concat());
    insta::assert_snapshot!(
        "a_file_is_there",
        format!("exit code {}\n{}", said.code, said.stderr)
    );
    assert_eq!(before, fs::read_to_string(run.path("run.toml")).unwrap());
    let said = run.potstill(&[&["init", "--force"], &flags[..]].concat());
    assert_eq!(said.code, 0, "{}", said.stderr);
    assert_ne!(before, fs::read_to_string(run.path("run.toml")).unwrap());
}

#[test]
fn init_refuses_what_could_not_run() {
    let run = Run::new();
    let said = |data: &str, teacher: &str| {
        let said = run.potstill(&["init", "n.toml", "--data", data, "--teacher", teacher]);
        format!("exit code {}: {}", said.code, said.stderr)
    };
    let all = [
        said("none.jsonl", "model"),
        said("prompts.jsonl", "none"),
        said("prompts.jsonl", "."),
        said("model/config.json", "model"),
    ];
    insta::assert_snapshot!("what_could_not_run", all.concat());
    assert!(!run.path("n.toml").exists());
}

#[test]
fn completions_for_every_shell() {
    let run = Run::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let said = run.potstill(&["completions", shell]);
        assert_eq!((said.code, said.stderr.as_str()), (0, ""), "{shell}");
        for word in ["potstill", "render", "dry-run"] {
            assert!(said.stdout.contains(word), "{shell}: {word}");
        }
    }
    assert_eq!(run.potstill(&["completions", "cmd"]).code, 2);
}

/// `potstill schema | head -1` is not an error.
#[cfg(unix)]
#[test]
fn a_reader_may_leave() {
    use std::process::{Command, Stdio};
    let mut child = Command::new(env!("CARGO_BIN_EXE_potstill"))
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
}

/// The shapes of public data, from file to report: a stranger's `init`, the two settings that a
/// teacher of random weights needs, `run`.
#[test]
fn init_writes_what_runs() {
    type Row = fn(usize) -> Value;
    let shapes: [(&str, Row); 5] = [
        (
            "alpaca",
            |i| json!({ "instruction": format!("Add 1 to {i}"), "input": "", "output": "Fine" }),
        ),
        ("sharegpt", |i| {
            json!({ "id": i, "conversations": [{ "from": "human", "value": format!("Hi {i}") },
                                                  { "from": "gpt", "value": "Hello" }] })
        }),
        ("messages", |i| {
            json!({ "messages": [{ "role": "system", "content": "Be kind." },
                                     { "role": "user", "content": format!("Hi {i}") },
                                     { "role": "assistant", "content": "Hello" }] })
        }),
        (
            "question and answer",
            |i| json!({ "question": format!("{i} + 1?"), "answer": i + 1, "id": i }),
        ),
        (
            "text",
            |i| json!({ "text": format!("Once {i}"), "url": "x" }),
        ),
    ];
    for (shape, row) in shapes {
        let run = Run::new();
        let rows: String = (0..12).map(|i| format!("{}\n", row(i))).collect();
        run.write("tiny.jsonl", &rows);
        let flags = ["--force", "--data", "tiny.jsonl", "--teacher", "model"];
        let said = run.potstill(&[&["init", "run.toml"], &flags[..]].concat());
        assert!(
            said.stderr.contains(&format!("looks like {shape}")),
            "{}",
            said.stderr
        );
        run.edit("max_new_tokens = 24", "max_new_tokens = 6");
        run.edit("# keep = \"finished\"", "keep = \"all\"");
        run.edit("# heldout = 0.1", "heldout = 0.4");
        run.edit("# steps = 100", "steps = 2");
        run.run();
        assert!(run.path("runs/tiny/report.html").is_file(), "{shape}");
    }
}
