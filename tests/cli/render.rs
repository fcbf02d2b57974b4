//! `potstill render` with the chat templates of real families and with faulty templates.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::fixture::{Run, VOCABULARY, write_model, write_tokenizer};

const CHATML: [&str; 5] = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"];

/// Builds a run with one question, whose teacher has this chat template over ChatML tokens.
fn run(template: &str, eos: &str) -> Run {
    let run = Run::new();
    write_model(&run.path("model"), VOCABULARY + 2);
    write_tokenizer(&run.path("model"), &CHATML, eos);
    run.edit("template = \"plain\"", "template = \"chat.jinja\"");
    run.write("chat.jinja", template);
    run.write(
        "prompts.jsonl",
        "{\"q\": \"2 + 2?\", \"a\": \"It is\\n4.\"}\n",
    );
    run.edit(
        "{ text = \"text\" }",
        "{ question = \"q\", answer = \"a\" }",
    );
    run
}

fn family(name: &str) -> String {
    let path = format!("datasets/tests/data/templates/{name}.jinja");
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn add_reasoning(run: &Run) {
    run.edit(
        "samples = 2",
        "samples = 2\nreasoning = { open = \"<think>\\n\", close = \"\\n</think>\\n\\n\" }",
    );
}

fn rendered(run: &Run) -> String {
    let output = run.potstill(&["render", "run.toml"]);
    format!(
        "exit code {}\n{}{}",
        output.code, output.stdout, output.stderr
    )
}

#[test]
fn correct_masks() {
    insta::assert_snapshot!("smollm2", rendered(&run(&family("smollm2"), "<|im_end|>")));
    insta::assert_snapshot!("qwen", rendered(&run(&family("qwen2.5"), "<|im_end|>")));
    insta::assert_snapshot!("keeps_reasoning", {
        let run = run(&family("reasoning"), "<|im_end|>");
        add_reasoning(&run);
        rendered(&run)
    });
    // The template does not handle reasoning, so the markers of the run file delimit it.
    insta::assert_snapshot!("marks_reasoning", {
        let run = run(&family("smollm2"), "<|im_end|>");
        add_reasoning(&run);
        rendered(&run)
    });
    insta::assert_snapshot!("tools", {
        let run = run(&family("qwen2.5"), "<|im_end|>");
        let tool = json!({ "type": "function", "function": { "name": "add", "parameters": {} } });
        let messages = json!([
            { "role": "system", "content": "Use tools." },
            { "role": "user", "content": "2 + 2?" },
            { "role": "assistant", "content": "", "tool_calls": [
                { "id": "1", "type": "function", "function": { "name": "add", "arguments": "{}" } }] },
            { "role": "tool", "tool_call_id": "1", "content": "4" }]);
        run.write(
            "prompts.jsonl",
            &json!({ "messages": messages, "tools": [tool] }).to_string(),
        );
        run.edit(
            "{ question = \"q\", answer = \"a\" }",
            "{ messages = \"messages\" }",
        );
        rendered(&run)
    });
}

#[test]
fn wrong_masks() {
    let chatml = |turn: &str, opened: &str| {
        format!(
            "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{turn}\n{{% endfor %}}{{% if add_generation_prompt %}}{opened}{{% endif %}}"
        )
    };
    let open = "<|im_start|>assistant\n";
    insta::assert_snapshot!(
        "another_eos",
        rendered(&run(&chatml("{{ m.content }}<|im_end|>", open), "</s>"))
    );
    insta::assert_snapshot!("strips_reasoning", {
        let turn = "{{ m.content }}{% if false %}{{ m.reasoning_content }}{% endif %}<|im_end|>";
        let run = run(&chatml(turn, open), "<|im_end|>");
        add_reasoning(&run);
        rendered(&run)
    });
    insta::assert_snapshot!(
        "not_a_prefix",
        rendered(&run(
            &chatml("{{ m.content }}<|im_end|>", "<|im_start|>assistant: "),
            "<|im_end|>"
        ))
    );
    insta::assert_snapshot!(
        "marks_elsewhere",
        rendered(&run(
            &chatml(
                "{% if m.role == 'user' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>",
                open
            ),
            "<|im_end|>"
        ))
    );
    // The prompt is not a prefix of the conversation, so only the marks select the tokens with loss.
    insta::assert_snapshot!(
        "trains_on_the_prompt",
        rendered(&run(
            "<s>{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ messages[0].content }}\n{{ m.content }}<|im_end|>{% endgeneration %}{% elif messages | length == 1 %}{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}answer:{% endif %}",
            "<|im_end|>"
        ))
    );
}

#[test]
fn published_answers_are_printed_as_they_were_sampled() {
    let run = Run::new();
    for stage in ["import", "collect"] {
        assert_eq!(run.potstill(&[stage, "run.toml"]).code, 0);
    }
    let output = run.potstill(&["render", "run.toml", "--rows", "2"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    let rows: Vec<&str> = output
        .stdout
        .lines()
        .filter(|l| l.starts_with("prompts.jsonl:"))
        .collect();
    insta::assert_snapshot!("published_rows", rows.join("\n"));
}

#[test]
fn the_limit_of_the_run_file_applies() {
    let run = Run::new();
    run.edit("columns = {", "limit = 2\ncolumns = {");
    let output = run.potstill(&["render", "run.toml", "--rows", "9"]);
    assert_eq!(output.stdout.matches("prompts.jsonl:").count(), 2);
    assert!(!run.path("runs").exists(), "`render` leaves nothing behind");
}

#[test]
fn tokenizers_of_real_families() {
    let Ok(real) = std::env::var("POTSTILL_REAL") else {
        eprintln!("skipped: POTSTILL_REAL is not set");
        return;
    };
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/smollm2-gsm8k.toml");
    let example = fs::read_to_string(example).unwrap();
    for model in ["SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"] {
        let needed = [
            format!("models/{model}/tokenizer.json"),
            "data/gsm8k/train.jsonl".to_owned(),
        ];
        if let Some(missing) = needed.iter().find(|n| !Path::new(&real).join(n).exists()) {
            eprintln!("skipped: POTSTILL_REAL has no {missing}");
            continue;
        }
        let run = Run::new();
        run.write("run.toml", &example.replace("SmolLM2-135M-Instruct", model));
        let output = run
            .command(&["render", "run.toml", "--rows", "2"])
            .env("POTSTILL_REAL", &real)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(
            text.matches("<|im_start|>assistant\n  ⟦").count(),
            2,
            "{text}"
        );
        assert_eq!(text.matches("<|im_end|>⏹⟧").count(), 2, "{text}");
        assert_eq!(text.matches(['⟦', '⟧']).count(), 4, "{text}");
    }
}
