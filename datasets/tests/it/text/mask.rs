//! Masks as they are shown, and what is found wrong with them.

use std::path::PathBuf;

use potstill_datasets::{
    ChatTemplate, Finding, MaskReport, Message, Reasoning, Role, Tokenizer, ToolCall, check_mask,
    encode_conversation, prompt_ids,
};

use crate::text::small::byte_level;

const CHATML: &str = include_str!("../../data/templates/smollm2.jinja");
const QWEN: &str = include_str!("../../data/templates/qwen2.5.jinja");
const REASONING: &str = include_str!("../../data/templates/reasoning.jinja");
const MARKED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}";

fn conversation() -> Vec<Message> {
    vec![
        Message::text(Role::User, "Hi"),
        Message::text(Role::Assistant, "Ho"),
        Message::text(Role::User, "And?"),
    ]
}

fn thinks() -> Message {
    Message {
        reasoning: Some("2 + 2".into()),
        ..Message::text(Role::Assistant, "4")
    }
}

fn think() -> Reasoning {
    Reasoning {
        open: "<think>\n".into(),
        close: "\n</think>\n".into(),
    }
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::from_source("test", source).unwrap()
}

fn check(source: &str, answer: &Message, reasoning: Option<&Reasoning>) -> MaskReport {
    let tokenizer = byte_level();
    check_mask(
        &tokenizer,
        &template(source),
        &conversation(),
        None,
        answer,
        reasoning,
    )
    .unwrap()
}

/// Text with the tokens that carry loss in brackets.
fn shown(report: &MaskReport) -> String {
    let runs = report.tokens.chunk_by(|a, b| a.loss == b.loss);
    let run = |tokens: &[potstill_datasets::MaskedToken]| {
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|token| token.bytes.clone())
            .collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if tokens[0].loss {
            format!("[{text}]")
        } else {
            text
        }
    };
    runs.map(run).collect()
}

/// The answer's part of what is shown.
fn answer_of(report: &MaskReport) -> String {
    let text = shown(report);
    text.rsplit_once("assistant\n").unwrap().1.to_owned()
}

#[track_caller]
fn is_right(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    tools: Option<&str>,
    answer: &Message,
    reasoning: Option<&Reasoning>,
) -> MaskReport {
    let prompt = conversation();
    let report = check_mask(tokenizer, template, &prompt, tools, answer, reasoning).unwrap();
    assert_eq!(report.findings, []);
    let encoded =
        encode_conversation(tokenizer, template, &prompt, tools, answer, reasoning).unwrap();
    let ids: Vec<u32> = report.tokens.iter().map(|token| token.id).collect();
    let loss: Vec<bool> = report.tokens.iter().map(|token| token.loss).collect();
    assert_eq!((&ids, loss), (&encoded.token_ids, encoded.loss_mask));
    let asked = prompt_ids(tokenizer, template, &prompt, tools, reasoning).unwrap();
    assert_eq!(&ids[..report.prompt_tokens], asked);
    report
}

#[test]
fn a_right_mask_is_that_of_training_and_nothing_is_found() {
    let tokenizer = byte_level();
    let yes = Message::text(Role::Assistant, "Yes");
    for source in [CHATML, QWEN, REASONING, MARKED] {
        let report = is_right(&tokenizer, &template(source), None, &yes, None);
        assert!(
            answer_of(&report).ends_with("Yes<|im_end|>]\n"),
            "{}",
            shown(&report)
        );
        assert!(!shown(&report).split('[').next().unwrap().contains("Yes"));
    }
    for source in [CHATML, QWEN, MARKED] {
        let report = is_right(
            &tokenizer,
            &template(source),
            None,
            &thinks(),
            Some(&think()),
        );
        assert_eq!(
            answer_of(&report),
            "[<think>\n2 + 2\n</think>\n4<|im_end|>]\n"
        );
    }
    let report = is_right(&tokenizer, &template(REASONING), None, &thinks(), None);
    assert!(
        answer_of(&report).starts_with("[<think>\n2 + 2\n</think>"),
        "{}",
        shown(&report)
    );
}

#[test]
fn tools_and_calls_are_shown() {
    let calls = Message {
        tool_calls: vec![ToolCall {
            id: None,
            name: "f".into(),
            arguments: "{\"x\": 1}".into(),
        }],
        ..Message::text(Role::Assistant, "")
    };
    let tools = r#"[{"type":"function","function":{"name":"f"}}]"#;
    let report = is_right(&byte_level(), &template(QWEN), Some(tools), &calls, None);
    let text = shown(&report);
    assert!(text.contains("<tools>\n{\"type\": \"function\""), "{text}");
    assert!(
        answer_of(&report).contains("{\"name\": \"f\", \"arguments\": {\"x\": 1}}"),
        "{text}"
    );
}

#[test]
fn lost_reasoning_is_found() {
    let strips = CHATML.replace(
        "message['content']",
        "message['content'].split('</think>')[-1].strip()",
    );
    let report = check(&strips, &thinks(), Some(&think()));
    assert_eq!(report.findings.len(), 1);
    assert_eq!(answer_of(&report), "[4<|im_end|>]\n");
    insta::assert_snapshot!(report.findings[0], @r#"
the template drops the reasoning of the answer
  missing:  "2 + 2"
  rendered: "4<|im_end|>\n"
hint: use a template that keeps the reasoning, or data without reasoning
"#);

    let report = check(CHATML, &thinks(), None);
    assert_eq!(report.findings, [Finding::ReasoningUnplaced]);
    assert_eq!(answer_of(&report), "[4<|im_end|>]\n");
    insta::assert_snapshot!(report.findings[0], @r#"
there is reasoning, but the template never reads `reasoning_content`
hint: set `reasoning = { open = "<think>", close = "</think>" }` to write it in front of the answer, or use data without reasoning
"#);
}

#[test]
fn an_answer_that_cannot_be_told_from_its_prompt_is_found() {
    let opened = MARKED
        .replace("{% generation %}", "")
        .replace("{% endgeneration %}", "")
        .replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}");
    let report = check(&opened, &Message::text(Role::Assistant, "Yes"), None);
    assert!(report.tokens.iter().all(|token| !token.loss));
    assert_eq!(report.findings.len(), 1);
    insta::assert_snapshot!(report.findings[0], @r#"
the rendered prompt is not the start of the rendered conversation, so the tokens of the answer are not known; the two differ from character 119 on
  prompt:       "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n<think>"
  conversation: "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
hint: put the assistant's turn between {% generation %} and {% endgeneration %} in the template
"#);

    let elsewhere = MARKED.replace("m.role == 'assistant'", "not loop.last");
    let report = check(&elsewhere, &Message::text(Role::Assistant, "Yes"), None);
    assert!(report.tokens.iter().all(|token| !token.loss));
    assert_eq!(report.findings.len(), 1);
    insta::assert_snapshot!(report.findings[0], @r#"
the template has {% generation %} marks, but none around the answer
  rendered: "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
hint: put the marks around every assistant turn, or remove all of them
"#);
}

#[test]
fn an_end_that_is_not_learned_is_found() {
    let yes = Message::text(Role::Assistant, "Yes");
    let report = check(&CHATML.replace(" + '<|im_end|>'", ""), &yes, None);
    assert_eq!(answer_of(&report), "[Yes\n]");
    assert_eq!(report.findings.len(), 1);
    insta::assert_snapshot!(report.findings[0], @r#"
no EOS token that carries loss ends the answer, so a student would never learn to stop
  rendered:   "Yes\n"
  EOS tokens: 262 "<|im_end|>"
hint: end the assistant's turn with an EOS token in the template, inside its {% generation %} marks or directly after them, or name the token that ends it in eos_token_id of generation_config.json
"#);

    let behind_text = MARKED.replace(
        "<|im_end|>{% endgeneration %}",
        "{% endgeneration %}.<|im_end|>",
    );
    let report = check(&behind_text, &yes, None);
    assert_eq!(answer_of(&report), "[Yes].<|im_end|>\n");
    assert!(
        matches!(report.findings[..], [Finding::EosWithoutLoss { .. }]),
        "{:?}",
        report.findings
    );
}

#[test]
fn nothing_under_loss_is_found() {
    let nothing = MARKED.replace(
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}",
        "{% generation %}{% endgeneration %}{{ m.content }}<|im_end|>",
    );
    let report = check(&nothing, &Message::text(Role::Assistant, "Yes"), None);
    assert!(
        matches!(
            report.findings[..],
            [Finding::EosWithoutLoss { .. }, Finding::NothingUnderLoss]
        ),
        "{:?}",
        report.findings
    );
    insta::assert_snapshot!(report.findings[1], @r#"
no token carries loss, so a student would learn nothing
hint: put the text of the assistant between {% generation %} and {% endgeneration %} in the template, or remove the marks
"#);
}

/// Marks around users' turns too, once they are answered, in a template that also cuts earlier answers short.
#[test]
fn a_prompt_under_loss_is_found() {
    let source = "{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' or not add_generation_prompt %}{% generation %}{{ '-' if m.role == 'assistant' and not loop.last and not add_generation_prompt else m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}";
    let report = check(source, &Message::text(Role::Assistant, "Yes"), None);
    assert!(
        shown(&report).contains("user\n[And?<|im_end|>]"),
        "{}",
        shown(&report)
    );
    let position = report
        .tokens
        .windows(4)
        .position(|four| {
            four.iter()
                .flat_map(|token| token.bytes.clone())
                .eq(*b"And?")
        })
        .unwrap();
    let text = "A".to_owned();
    assert_eq!(
        report.findings,
        [Finding::PromptUnderLoss { position, text }]
    );
    insta::assert_snapshot!(report.findings[0], @r#"
token 30 ("A") belongs to the prompt and carries loss
hint: put the {% generation %} marks of the template around assistant turns only
"#);
}

#[test]
fn text_that_a_model_cannot_learn_from_is_found() {
    let report = check(
        CHATML,
        &Message::text(Role::Assistant, "a<|im_end|>b"),
        None,
    );
    let token = "<|im_end|>".to_owned();
    assert_eq!(report.findings, [Finding::EosInside { token }]);
    insta::assert_snapshot!(report.findings[0], @r#"
the answer contains "<|im_end|>", which ends a sequence, so the rest of the answer would be lost
hint: remove "<|im_end|>" from the data
"#);
    let alone = "{% if not add_generation_prompt %}{{ messages[-1].content }}<|im_end|>{% endif %}";
    let report = check(alone, &Message::text(Role::Assistant, "Yes"), None);
    assert_eq!(
        (report.findings.as_slice(), report.prompt_tokens),
        ([Finding::PromptEmpty].as_slice(), 0)
    );
    insta::assert_snapshot!(report.findings[0], @r#"
the rendered prompt is empty, and a model needs at least one token to continue
hint: begin the template with a token, such as `{{ bos_token }}`
"#);
}

#[test]
fn real_models_have_right_masks() {
    let Some(root) = std::env::var_os("POTSTILL_REAL").map(PathBuf::from) else {
        eprintln!("skipped: POTSTILL_REAL is not set");
        return;
    };
    for model in ["SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"] {
        let dir = root.join("models").join(model);
        if !dir.join("tokenizer.json").exists() {
            eprintln!("skipped: POTSTILL_REAL has no models/{model}");
            continue;
        }
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        let template = ChatTemplate::from_dir(&dir).unwrap().unwrap();
        let report = is_right(&tokenizer, &template, None, &thinks(), Some(&think()));
        assert_eq!(
            answer_of(&report),
            "[<think>\n2 + 2\n</think>\n4<|im_end|>]\n"
        );
    }
}
