//! Rows that cannot be trained on, hostile text files of a model, and models without room: `render`, `check` and `run`
//! refuse them in the same words, before anything is computed.

use std::fs;

use serde_json::{Value, json};

use super::fixture::Run;

/// A template that a teacher could have, in the form of Llama 2.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}";

fn with_template(template: &str) -> Run {
    let run = Run::new();
    run.edit("template = \"plain\"", "template = \"template.jinja\"");
    run.write("template.jinja", template);
    run
}

fn edit_json(run: &Run, file: &str, edit: impl FnOnce(&mut Value)) {
    let path = run.path(file);
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

/// Asserts that the three commands refuse the run with `expected`, and that nothing was collected. Returns the message.
fn refused(run: &Run, expected: &str) -> String {
    let message = |command: &str| {
        let rows: &[&str] = if command == "render" {
            &["--rows", "12"]
        } else {
            &[]
        };
        let output = run.potstill(&[&[command, "run.toml"], rows].concat());
        assert_ne!(output.code, 0, "{command} accepts it: {expected}");
        let at = output.stderr.find("error: ").unwrap_or_default();
        output.stderr[at..].to_owned()
    };
    let messages = ["render", "check", "run"].map(message);
    for message in &messages {
        assert!(message.contains(expected), "{message}");
    }
    assert!(fs::metadata(run.path("runs/tiny/completions")).is_err());
    messages[1].clone()
}

#[test]
fn rows_that_cannot_be_trained_on_are_refused_in_the_same_words() {
    assert_eq!(with_template(TEMPLATE).run().code, 0);
    let assistant = |text: &str| TEMPLATE.replace("{{ m.content }}", text);
    for (template, expected) in [
        (
            assistant("{% if m.role == 'user' %}{{ m.content }}{% endif %}"),
            "prompts.jsonl:1: the template drops text of the answer",
        ),
        (
            assistant("{% if m.role != 'user' %}{{ m.content }}{% endif %}"),
            "prompts.jsonl:1: the template drops the user's message",
        ),
        (
            TEMPLATE.replace("{{ eos_token }}", ""),
            "prompts.jsonl:1: no EOS token that carries loss ends the answer",
        ),
        (
            TEMPLATE.replace("{{ bos_token }}", "{% if messages[0].content.endswith('7: once') %}{{ raise_exception('no sevens') }}{% endif %}<s>"),
            "prompts.jsonl:8: chat template template.jinja refuses the conversation: no sevens",
        ),
        (
            format!("{{% set s = 'ab' %}}{}{TEMPLATE}", "{% set s = s ~ s %}".repeat(60)),
            "too many bytes of text",
        ),
    ] {
        let message = refused(&with_template(&template), expected);
        let first = "error: the loss mask of these rows is wrong with chat template template.jinja:";
        assert!(message.starts_with(first), "{message}");
    }
}

#[test]
fn an_eos_that_the_tokenizer_does_not_know_as_a_token_is_refused() {
    let run = with_template(TEMPLATE);
    edit_json(&run, "model/tokenizer.json", |json| {
        let added = json["added_tokens"].as_array_mut().unwrap();
        added.retain(|token| token["content"] != "</s>");
    });
    refused(&run, "no EOS token that carries loss ends the answer");
}

#[test]
fn rows_of_a_form_that_comes_late_are_refused_too() {
    let run = with_template(&format!(
        "{{% if messages[0].role == 'system' %}}{{{{ raise_exception('no system\u{1b}[2J') }}}}{{% endif %}}{TEMPLATE}"
    ));
    run.edit(
        "columns = { text = \"text\" }",
        "columns = { messages = \"messages\" }",
    );
    let user = |i: usize| json!({ "role": "user", "content": format!("Story {i}") });
    let mut lines: Vec<Value> = (0..40).map(|i| json!({ "messages": [user(i)] })).collect();
    lines.push(json!({ "messages": [{ "role": "system", "content": "Be kind." }, user(40)] }));
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    run.write("prompts.jsonl", &text);
    let expected =
        "prompts.jsonl:41: chat template template.jinja refuses the conversation: no system";
    for command in ["check", "run"] {
        let output = run.potstill(&[command, "run.toml"]);
        assert_ne!(output.code, 0);
        assert!(output.stderr.contains(expected), "{}", output.stderr);
        assert!(!output.stderr.contains('\u{1b}'), "{}", output.stderr);
    }
}

#[test]
fn token_ids_that_are_none_are_refused() {
    for file in ["config.json", "generation_config.json"] {
        for key in ["eos_token_id", "bos_token_id", "pad_token_id"] {
            for value in [
                json!([]),
                json!(1.5),
                json!("2"),
                json!(-7),
                json!(VOCABULARY),
                json!(4_294_967_296_u64),
            ] {
                let run = Run::new();
                edit_json(&run, &format!("model/{file}"), |json| {
                    json[key] = value.clone()
                });
                let message = refused(&run, &format!("`{key}`"));
                assert!(message.contains(file), "{message}");
            }
        }
    }
}

const VOCABULARY: usize = super::fixture::VOCABULARY;

#[test]
fn hostile_tokenizers_are_refused() {
    let grow = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aaaaaaaa" });
    let mut deep = json!({ "type": "Lowercase" });
    for _ in 0..200 {
        deep = json!({ "type": "Sequence", "normalizers": [deep] });
    }
    for (part, value, expected) in [
        (
            "normalizer",
            json!({ "type": "Sequence", "normalizers": vec![grow; 12] }),
            "times as long",
        ),
        ("normalizer", deep, "recursion limit"),
        (
            "pre_tokenizer",
            json!({ "type": "Split", "pattern": { "Regex": "(a+)+$" }, "behavior": "Isolated", "invert": false }),
            "repeated already",
        ),
        (
            "pre_tokenizer",
            json!({ "type": "FixedLength", "length": 0 }),
            "is 0",
        ),
    ] {
        let run = Run::new();
        edit_json(&run, "model/tokenizer.json", |json| json[part] = value);
        refused(&run, expected);
    }
}

/// Pipes and devices could be waited for or read without end, wherever a file is named.
#[cfg(unix)]
#[test]
fn pipes_and_devices_are_not_read() {
    let refused = |run: &Run, arguments: &[&str]| {
        let output = run.potstill(arguments);
        assert_ne!(output.code, 0, "{arguments:?}");
        let says = output.stderr.contains("is not a regular file");
        assert!(says, "{arguments:?}: {}", output.stderr);
    };
    let pipe = |run: &Run, name: &str| {
        let path = run.path(name);
        let _ = fs::remove_file(&path);
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
    };
    refused(&Run::new(), &["check", "/dev/zero"]);
    let run = Run::new();
    run.edit("template = \"plain\"", "template = \"/dev/zero\"");
    refused(&run, &["check", "run.toml"]);
    for file in [
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ] {
        let run = Run::new();
        pipe(&run, &format!("model/{file}"));
        refused(&run, &["run", "run.toml"]);
    }
    let run = Run::new();
    fs::rename(run.path("model/model.safetensors"), run.path("model/part")).unwrap();
    pipe(&run, "model/pipe");
    let index = json!({ "metadata": {}, "weight_map": { "model.embed_tokens.weight": "pipe" } });
    run.write("model/model.safetensors.index.json", &index.to_string());
    refused(&run, &["run", "run.toml"]);
}
