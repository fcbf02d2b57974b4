//! Masks, and the ways in which they could be wrong.

use potstill_datasets::{
    ChatTemplate, Encoded, Error, Finding, Message, Reasoning, Role, Tokenizer,
    encode_conversation, prompt_ids, split_reasoning,
};

use crate::text::small::{byte_level, sentence_piece};

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}";

const MARKED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}";

fn think() -> Reasoning {
    Reasoning {
        open: "<think>\n".to_owned(),
        close: "\n</think>\n".to_owned(),
    }
}

/// Two turns, of which the second is the answer.
fn encode(tokenizer: &Tokenizer, source: &str, answer: &Message) -> Result<Encoded, Error> {
    let template = ChatTemplate::from_source("test", source).unwrap();
    let prompt = [
        Message::text(Role::User, "Hi"),
        Message::text(Role::Assistant, "Ho"),
        Message::text(Role::User, "And?"),
    ];
    let encoded = encode_conversation(tokenizer, &template, &prompt, None, answer, Some(&think()))?;
    let ids = prompt_ids(tokenizer, &template, &prompt, None, Some(&think()))?;
    assert!(
        encoded.token_ids.starts_with(&ids),
        "the model sees another prompt than the student learns from"
    );
    assert_eq!(encoded.token_ids.len(), encoded.loss_mask.len());
    Ok(encoded)
}

/// Text with the tokens that carry loss in brackets.
fn shown(tokenizer: &Tokenizer, encoded: &Encoded) -> String {
    let mut text = String::new();
    let mut inside = false;
    for (&id, &loss) in encoded.token_ids.iter().zip(&encoded.loss_mask) {
        if loss != inside {
            text.push(if loss { '[' } else { ']' });
            inside = loss;
        }
        text.push_str(&String::from_utf8_lossy(&tokenizer.token_bytes(id)));
    }
    if inside {
        text.push(']');
    }
    text
}

fn masked(source: &str, answer: &str) -> String {
    let tokenizer = byte_level();
    shown(
        &tokenizer,
        &encode(&tokenizer, source, &Message::text(Role::Assistant, answer)).unwrap(),
    )
}

const PROMPT: &str = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n";

#[test]
fn loss_covers_the_answer_up_to_its_end_and_nothing_behind() {
    for source in [CHATML, MARKED] {
        assert_eq!(masked(source, "Yes"), format!("{PROMPT}[Yes<|im_end|>]\n"));
        assert_eq!(masked(source, ""), format!("{PROMPT}[<|im_end|>]\n"));
    }
}

/// The prompt ends in a line feed, and two are one token. A model that answers sees one.
#[test]
fn a_token_across_the_boundary_is_encoded_in_two_parts() {
    let tokenizer = byte_level();
    assert!(
        tokenizer
            .encode(&format!("{PROMPT}\nYes"), false)
            .unwrap()
            .contains(&256)
    );
    for source in [CHATML, MARKED] {
        let encoded = encode(&tokenizer, source, &Message::text(Role::Assistant, "\nYes")).unwrap();
        assert!(!encoded.token_ids.contains(&256));
        assert_eq!(
            shown(&tokenizer, &encoded),
            format!("{PROMPT}[\nYes<|im_end|>]\n")
        );
    }
}

#[test]
fn the_end_of_turn_is_found_behind_the_marks() {
    let outside = MARKED.replace(
        "<|im_end|>{% endgeneration %}",
        "{% endgeneration %}<|im_end|>",
    );
    assert_eq!(
        masked(&outside, "Yes"),
        format!("{PROMPT}[Yes<|im_end|>]\n")
    );
    let line_between = MARKED.replace(
        "<|im_end|>{% endgeneration %}",
        "{% endgeneration %}{{ '\\n' }}<|im_end|>",
    );
    assert_eq!(
        masked(&line_between, "Yes"),
        format!("{}[Yes\n<|im_end|>]\n", PROMPT.replace("Ho<", "Ho\n<"))
    );
    let text_between = MARKED.replace(
        "<|im_end|>{% endgeneration %}",
        "{% endgeneration %}.<|im_end|>",
    );
    let error = encode(
        &byte_level(),
        &text_between,
        &Message::text(Role::Assistant, "Yes"),
    )
    .unwrap_err();
    assert!(
        matches!(&error, Error::Untrainable { finding, .. } if matches!(**finding, Finding::EosWithoutLoss { .. })),
        "{error}"
    );
}

/// Phi-3 ends a turn with one token and the conversation with another.
#[test]
fn a_second_end_carries_no_loss() {
    let twice = CHATML.replace("{% endif %}", "{% else %}<|im_end|>{% endif %}");
    assert_eq!(
        masked(&twice, "Yes"),
        format!("{PROMPT}[Yes<|im_end|>]\n<|im_end|>")
    );
}

#[test]
fn marks_may_leave_gaps() {
    let gap = MARKED.replace(
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}",
        "{% for w in m.content.split() %}#{% generation %}{{ w }}{% if loop.last %}<|im_end|>{% endif %}{% endgeneration %}{% endfor %}",
    );
    assert_eq!(
        masked(&gap, "a b"),
        format!("{}#[a]#[b<|im_end|>]\n", PROMPT.replace("Ho", "#Ho"))
    );
}

/// Reasoning models' templates open the reasoning in the prompt, and mark it with the answer.
#[test]
fn what_the_prompt_writes_of_the_answer_carries_no_loss() {
    let opened = MARKED
        .replace(
            "{{ m.content }}<|im_end|>{% endgen",
            "<think>{{ m.content }}<|im_end|>{% endgen",
        )
        .replace(
            "<|im_start|>assistant\n{% endif %}",
            "<|im_start|>assistant\n<think>{% endif %}",
        );
    let prompt = PROMPT.replace("assistant\n", "assistant\n<think>");
    assert_eq!(masked(&opened, "Yes"), format!("{prompt}[Yes<|im_end|>]\n"));
}

/// A template that cuts earlier turns short once they are answered: the marks are what is left to go by.
#[test]
fn marks_serve_where_the_prompt_is_no_prefix() {
    let cuts = MARKED.replace(
        "{{ m.content }}<|im_end|>{% endgen",
        "{{ m.content if loop.index0 + 2 >= messages | length else '-' }}<|im_end|>{% endgen",
    );
    let tokenizer = byte_level();
    let template = ChatTemplate::from_source("test", &cuts).unwrap();
    let prompt = [
        Message::text(Role::User, "Hi"),
        Message::text(Role::Assistant, "Ho"),
        Message::text(Role::User, "And?"),
    ];
    let encoded = encode_conversation(
        &tokenizer,
        &template,
        &prompt,
        None,
        &Message::text(Role::Assistant, "Yes"),
        None,
    );
    assert_eq!(
        shown(&tokenizer, &encoded.unwrap()),
        format!("{}[Yes<|im_end|>]\n", PROMPT.replace("Ho", "-"))
    );
}

#[test]
fn reasoning_is_written_and_never_lost() {
    let tokenizer = byte_level();
    let mut answer = Message::text(Role::Assistant, "4");
    answer.reasoning = Some("2 + 2".to_owned());
    let encoded = encode(&tokenizer, CHATML, &answer).unwrap();
    assert_eq!(
        shown(&tokenizer, &encoded),
        format!("{PROMPT}[<think>\n2 + 2\n</think>\n4<|im_end|>]\n")
    );

    // Reads the field, but writes it only where more messages follow.
    let drops = CHATML.replace(
        "{{ m.content }}",
        "{{ '' if loop.last else m.reasoning_content }}{{ m.content }}",
    );
    insta::assert_snapshot!(encode(&tokenizer, &drops, &answer).unwrap_err(), @r#"
chat template test: the template drops the reasoning of the answer
  missing:  "2 + 2"
  rendered: "4<|im_end|>\n"
hint: use a template that keeps the reasoning, or data without reasoning
"#);
    let strips = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}");
    // In the field, or in the text as data sets have it.
    let written = Message::text(Role::Assistant, "<think>\n2 + 2\n</think>\n\n4");
    for answer in [&answer, &written] {
        let found = encode(&tokenizer, &strips, answer);
        assert!(
            matches!(&found, Err(Error::Untrainable { finding, .. })
                if matches!(&**finding, Finding::ReasoningDropped { reasoning, .. } if reasoning == "2 + 2")),
            "{found:?}"
        );
    }
    assert!(encode(&tokenizer, CHATML, &written).is_ok());
}

#[test]
fn masks_that_would_be_wrong_are_errors() {
    let tokenizer = byte_level();
    let yes = Message::text(Role::Assistant, "Yes");
    let error = |source: &str| encode(&tokenizer, source, &yes).unwrap_err().to_string();
    insta::assert_snapshot!(error(&CHATML.replace("assistant\n", "assistant\n<think>")), @r#"
chat template test: the rendered prompt is not the start of the rendered conversation, so the tokens of the answer are not known; the two differ from character 119 on
  prompt:       "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n<think>"
  conversation: "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
hint: put the assistant's turn between {% generation %} and {% endgeneration %} in the template
"#);
    insta::assert_snapshot!(error(&CHATML.replace("<|im_end|>", "")), @r#"
chat template test: no EOS token that carries loss ends the answer, so a student would never learn to stop
  rendered:   "Yes\n"
  EOS tokens: 262 "<|im_end|>"
hint: end the assistant's turn with an EOS token in the template, inside its {% generation %} marks or directly after them, or name the token that ends it in eos_token_id of generation_config.json
"#);
    insta::assert_snapshot!(error(&MARKED.replace("m.role == 'assistant'", "not loop.last")), @r#"
chat template test: the template has {% generation %} marks, but none around the answer
  rendered: "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
hint: put the marks around every assistant turn, or remove all of them
"#);
    let end_inside = encode(
        &tokenizer,
        CHATML,
        &Message::text(Role::Assistant, "a<|im_end|>b"),
    )
    .unwrap_err();
    insta::assert_snapshot!(end_inside, @r#"
chat template test: the answer contains "<|im_end|>", which ends a sequence, so the rest of the answer would be lost
hint: remove "<|im_end|>" from the data
"#);
    insta::assert_snapshot!(error("{% if not add_generation_prompt %}{{ messages[-1].content }}<|im_end|>{% endif %}"), @"
chat template test: the rendered prompt is empty, and a model needs at least one token to continue
hint: begin the template with a token, such as `{{ bos_token }}`
");
}

#[test]
fn plain_text_ends_with_the_end_of_sequence() {
    let tokenizer = sentence_piece();
    let template = ChatTemplate::plain().unwrap();
    let encode = |prompt: &str, answer: &str| {
        let answer = Message::text(Role::Assistant, answer);
        let encoded = encode_conversation(
            &tokenizer,
            &template,
            &[Message::text(Role::User, prompt)],
            None,
            &answer,
            None,
        );
        shown(&tokenizer, &encoded.unwrap())
    };
    assert_eq!(encode("ab", " abc"), "<s> ab[ abc</s>]");
    // "a" and "b" are one token: apart, and without the space that SentencePiece puts in front of a text.
    assert_eq!(encode("a", "b"), "<s> a[b</s>]");
    assert_eq!(encode("ca", "bc"), "<s> ca[bc</s>]");
    assert_eq!(encode("c", "é"), "<s> c[\u{fffd}\u{fffd}</s>]");
}

#[test]
fn reasoning_is_parted_from_the_answer() {
    let split = |text| split_reasoning(text, &think());
    let parts = |thought: &str, answer: &str| (Some(thought.to_owned()), answer.to_owned());
    assert_eq!(split("<think>\n2 + 2\n</think>\n4"), parts("2 + 2", "4"));
    assert_eq!(split(" <think> x</think>4"), parts(" x", "4"));
    assert_eq!(split("x\n</think>\n4"), parts("x", "4"));
    assert_eq!(split("<think>\nnever closed"), parts("never closed", ""));
    assert_eq!(split("<think>\n\n</think>\n4"), (None, "4".to_owned()));
    assert_eq!(split("4"), (None, "4".to_owned()));
    assert_eq!(
        split("Write <think>x</think>."),
        (None, "Write <think>x</think>.".to_owned())
    );
    assert_eq!(split(""), (None, String::new()));
}
