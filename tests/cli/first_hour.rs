//! The commands of a first session: `init` and `completions`.

use std::fs;

use serde_json::{Value, json};

use crate::fixture::Run;

/// Runs `init` with the fixture's model and the given data, then `check`.
fn init_and_check(data: &str) -> (String, String) {
    let run = Run::new();
    fs::remove_file(run.path("run.toml")).unwrap();
    run.write("mine.jsonl", data);
    let arguments = ["init", "--data", "mine.jsonl", "--teacher", "model"];
    let output = run.potstill(&arguments);
    assert_eq!(output.code, 0, "{}", output.stderr);
    let checked = run.potstill(&["check", "run.toml"]);
    assert_eq!(checked.code, 0, "{}", checked.stderr);
    (output.stderr, checked.stdout)
}

#[test]
fn check_accepts_what_init_writes() {
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
        let (stderr, checked) = init_and_check(data);
        assert!(
            stderr.contains(&format!("looks like {columns}")),
            "{stderr}"
        );
        assert!(checked.contains("run       mine in runs/mine"), "{checked}");
    }
}

#[test]
fn init_fails_without_a_terminal_to_ask() {
    let run = Run::new();
    let output = run.potstill(&["init", "new.toml", "--name", "x"]);
    insta::assert_snapshot!(
        "no_terminal",
        format!("exit code {}\n{}", output.code, output.stderr)
    );
    assert!(!run.path("new.toml").exists());
}

#[test]
fn init_does_not_overwrite_files() {
    let run = Run::new();
    let before = fs::read_to_string(run.path("run.toml")).unwrap();
    let flags = ["--data", "prompts.jsonl", "--teacher", "model"];
    let output = run.potstill(&[&["init"], &flags[..]].concat());
    insta::assert_snapshot!(
        "existing_file",
        format!("exit code {}\n{}", output.code, output.stderr)
    );
    assert_eq!(before, fs::read_to_string(run.path("run.toml")).unwrap());
    let output = run.potstill(&[&["init", "--force"], &flags[..]].concat());
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert_ne!(before, fs::read_to_string(run.path("run.toml")).unwrap());
}

#[test]
fn init_refuses_unusable_data_and_teachers() {
    let run = Run::new();
    let init = |data: &str, teacher: &str| {
        let output = run.potstill(&["init", "n.toml", "--data", data, "--teacher", teacher]);
        format!("exit code {}: {}", output.code, output.stderr)
    };
    let all = [
        init("none.jsonl", "model"),
        init("prompts.jsonl", "none"),
        init("prompts.jsonl", "."),
        init("model/config.json", "model"),
    ];
    insta::assert_snapshot!("unusable_inputs", all.concat());
    assert!(!run.path("n.toml").exists());
}

#[test]
fn completions_for_every_shell() {
    let run = Run::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = run.potstill(&["completions", shell]);
        assert_eq!((output.code, output.stderr.as_str()), (0, ""), "{shell}");
        for word in ["potstill", "render", "dry-run"] {
            assert!(output.stdout.contains(word), "{shell}: {word}");
        }
    }
    assert_eq!(run.potstill(&["completions", "cmd"]).code, 2);
}

/// A closed stdout, as in `potstill schema | head -1`, is not an error.
#[cfg(unix)]
#[test]
fn stdout_may_be_closed() {
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

/// Runs the common layouts of public data from file to report, with `init` and the few settings that a
/// teacher with random weights needs.
#[test]
fn run_accepts_what_init_writes() {
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
        let output = run.potstill(&[&["init", "run.toml"], &flags[..]].concat());
        assert!(
            output.stderr.contains(&format!("looks like {shape}")),
            "{}",
            output.stderr
        );
        run.edit("max_new_tokens = 24", "max_new_tokens = 6");
        run.edit("# keep = \"finished\"", "keep = \"all\"");
        run.edit("# test = 0.1", "test = 0.4");
        run.edit("[train]\n", "[train]\nsteps = 2\n");
        run.run();
        assert!(run.path("runs/tiny/report.html").is_file(), "{shape}");
    }
}
