//! Arguments of chat templates, and what `check` says about the tokens of teacher and student.

use std::fs;

use serde_json::{Value, json};

use crate::fixture::{Run, VOCABULARY, write_model, write_tokenizer};

const CHATML: [&str; 5] = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"];
/// A template in the manner of Qwen3's: without reasoning, the prompt ends with an empty one.
const SWITCHED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and enable_thinking is false %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}";

/// Builds a run whose teacher has the template [`SWITCHED`], with these further keys in `[teacher]`.
fn run(keys: &str) -> Run {
    let run = Run::new();
    write_model(&run.path("model"), VOCABULARY + 2);
    write_tokenizer(&run.path("model"), &CHATML, "<|im_end|>");
    run.write("model/chat_template.jinja", SWITCHED);
    run.edit("template = \"plain\"\n", keys);
    run.write(
        "prompts.jsonl",
        "{\"text\": \"2?\"}\n{\"text\": \"3?\"}\n{\"text\": \"4?\"}\n{\"text\": \"5?\"}\n",
    );
    run
}

const OFF: &str = "template_arguments = { enable_thinking = false }\n";

#[test]
fn arguments_reach_prompts_and_are_part_of_the_stages_keys() {
    let (open, off) = (run(""), run(OFF));
    let rendered = |run: &Run| run.potstill(&["render", "run.toml", "--rows", "1"]);
    assert!(!rendered(&open).stdout.contains("think"));
    let shown = rendered(&off);
    assert_eq!(shown.code, 0, "{}", shown.stderr);
    assert!(
        shown.stdout.contains("assistant\n  <think></think>⟦"),
        "{}",
        shown.stdout
    );

    let collect = |run: &Run| run.potstill(&["collect", "run.toml"]);
    let hash = |run: &Run| {
        let manifest = fs::read_to_string(run.path("runs/tiny/completions_manifest.json")).unwrap();
        serde_json::from_str::<Value>(&manifest).unwrap()["key"].clone()
    };
    assert_eq!(open.potstill(&["import", "run.toml"]).code, 0);
    let first = collect(&open);
    assert_eq!(first.code, 0, "{}", first.stderr);
    let before = hash(&open);
    assert!(before.is_string());
    assert_eq!(collect(&open).code, 0);
    assert_eq!(hash(&open), before);
    open.edit("path = \"model\"\n", &format!("path = \"model\"\n{OFF}"));
    assert_eq!(collect(&open).code, 0);
    assert_ne!(hash(&open), before);
}

#[test]
fn check_names_the_switch_and_arguments_that_change_nothing() {
    let check = |keys: &str| {
        let output = run(keys).potstill(&["check", "run.toml"]);
        assert_eq!(output.code, 0, "{}", output.stderr);
        output.stdout + &output.stderr
    };
    let open = check("");
    assert!(
        open.contains("the teacher's template reads `enable_thinking`, which is not set"),
        "{open}"
    );
    assert!(check(OFF).contains("thinking  `enable_thinking` is false"));
    let misspelt = check("template_arguments = { enable_thinkin = false }\n");
    assert!(
        misspelt.contains("does not read `enable_thinkin`")
            && misspelt.contains("hint: did you mean `enable_thinking`?"),
        "{misspelt}"
    );
}

#[test]
fn check_compares_the_tokens_of_teacher_and_student() {
    let run = run("");
    write_model(&run.path("student"), VOCABULARY + 9);
    write_tokenizer(&run.path("student"), &CHATML, "<|im_end|>");
    run.edit("layers = { every = 2 }", "path = \"student\"");
    let set = |file: &str, json: Value| run.write(file, &json.to_string());
    run.write("student/chat_template.jinja", SWITCHED);
    let check = || {
        let output = run.potstill(&["check", "run.toml"]);
        assert_eq!(output.code, 0, "{}", output.stderr);
        output.stdout + &output.stderr
    };
    let same = check();
    assert!(!same.contains("warning"), "{same}");
    assert!(
        same.contains("the student has 261 tokens and 268 rows in its embedding; the 7 rows of padding are never sampled"),
        "{same}"
    );

    set(
        "model/generation_config.json",
        json!({ "eos_token_id": [4, 1] }),
    );
    run.write(
        "student/chat_template.jinja",
        "{{ messages[0].content }}<|im_end|>",
    );
    let differ = check();
    assert!(
        differ.contains("the teacher ends answers with 1 \"<s>\", 2 \"</s>\", 4 \"<|im_end|>\", and the student's files do not name 1 \"<s>\""),
        "{differ}"
    );
    assert!(
        differ.contains("teacher: 1 \"<s>\", 4 \"<|im_end|>\" in generation_config.json; 2 \"</s>\" in config.json"),
        "{differ}"
    );
    assert!(
        differ.contains("the student learns prompts as the teacher's chat template writes them"),
        "{differ}"
    );
}

#[test]
fn arguments_with_another_meaning_are_refused() {
    let refused = |keys: &str, part: &str| {
        let output = run(keys).potstill(&["check", "run.toml"]);
        assert_eq!(output.code, 2);
        assert!(
            output.stderr.contains("`template_arguments` in [teacher]")
                && output.stderr.contains(part),
            "{}",
            output.stderr
        );
    };
    refused(
        "template_arguments = { messages = [] }\n",
        "`messages` is set for each conversation",
    );
    refused(
        "template_arguments = { date = 2026-01-01 }\n",
        "hint: write a date as text",
    );
    let run = run("");
    run.edit(
        "layers = { every = 2 }",
        &format!("layers = {{ every = 2 }}\n{OFF}"),
    );
    let output = run.potstill(&["check", "run.toml"]);
    assert!(
        output
            .stderr
            .contains("so it needs the teacher's arguments"),
        "{}",
        output.stderr
    );
}
