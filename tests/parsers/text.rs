//! Targets: tokenizers and chat templates.

use std::fs;

use potstill_datasets::{
    ChatTemplate, Message, RenderOptions, Role, SpecialTokens, Tokenizer, ToolCall,
};

use crate::scratch::{check_error, check_error_names, folder, texts};

/// Input: `tokenizer.json`, then, each after a byte 0, `tokenizer_config.json`, `generation_config.json` and a text.
pub fn tokenizer(data: &[u8]) {
    let [tokenizer, config, generation, text] = texts::<4>(data);
    let dir = folder();
    let files = [
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
        ("generation_config.json", generation),
    ];
    for (name, content) in files {
        if let Some(content) = content.filter(|content| !content.is_empty()) {
            fs::write(dir.join(name), content).unwrap();
        }
    }
    let tokenizer = match Tokenizer::from_dir(&dir) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return check_error_names(&error, &dir.display().to_string()),
    };
    assert_eq!(
        tokenizer.fingerprint(),
        Tokenizer::from_dir(&dir).unwrap().fingerprint()
    );
    let text = String::from_utf8_lossy(text.unwrap_or(b"Once upon a time, 12 + 7"));
    let ids = match tokenizer.encode(&text, true) {
        Ok(ids) => ids,
        Err(error) => return check_error(&error),
    };
    assert_eq!(ids, tokenizer.encode(&text, true).unwrap());
    for id in &ids {
        assert!(
            (*id as usize) < tokenizer.vocab_size(),
            "id {id} has no token"
        );
        tokenizer.token_bytes(*id);
    }
    for skip_special in [false, true] {
        if let Err(error) = tokenizer.decode(&ids, skip_special) {
            check_error(&error);
        }
    }
    assert!(tokenizer.token_bytes(u32::MAX).is_empty());
}

/// Input: a template, then, each after a byte 0, a user's text, an answer, the answer's reasoning, and tools as JSON.
pub fn template(data: &[u8]) {
    let [source, user, answer, reasoning, tools] = texts::<5>(data);
    let lossy = |part: Option<&[u8]>| part.map(|part| String::from_utf8_lossy(part).into_owned());
    let template = match ChatTemplate::from_source("template", &lossy(source).unwrap_or_default()) {
        Ok(template) => template,
        Err(error) => return check_error_names(&error, "template"),
    };
    let special = SpecialTokens {
        bos: Some("<s>".to_owned()),
        eos: Some("</s>".to_owned()),
        ..SpecialTokens::default()
    };
    let mut reply = Message::text(Role::Assistant, lossy(answer).unwrap_or("Hi".to_owned()));
    reply.reasoning = lossy(reasoning);
    let tools = lossy(tools);
    if tools.is_some() {
        reply.tool_calls.push(ToolCall {
            id: Some("1".to_owned()),
            name: "add".to_owned(),
            arguments: r#"{"a": 1}"#.to_owned(),
        });
    }
    let user = Message::text(Role::User, lossy(user).unwrap_or("Hello".to_owned()));
    let prompt = [Message::text(Role::System, "Be brief."), user.clone()];
    let conversation = [user, reply];
    for (messages, add_generation_prompt) in [(&prompt, true), (&conversation, false)] {
        let render = || {
            let options = RenderOptions {
                add_generation_prompt,
                special: &special,
                reasoning: None,
                now: Some(Default::default()),
            };
            template.render(messages, tools.as_deref(), options)
        };
        let rendered = match render() {
            Ok(rendered) => rendered,
            Err(error) => {
                check_error(&error);
                continue;
            }
        };
        assert_eq!(rendered, render().unwrap(), "a template renders two texts");
        let mut end = 0;
        for range in &rendered.generation {
            assert!(range.start >= end && range.end >= range.start, "{range:?}");
            assert!(rendered.text.get(range.clone()).is_some(), "{range:?}");
            end = range.end;
        }
    }
}
