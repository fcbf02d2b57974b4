//! Responses with answers.

use std::path::PathBuf;

use potstill_datasets::{FinishReason, Reasoning};
use serde_json::{Value, json};

use super::{call, settings};
use crate::http::wire::{Stream, joined, parse};
use crate::http::{Call, CallTask, Dialect, FailureReason, RequestSettings, Response, TokenUsage};

fn streamed(settings: &RequestSettings, call: &Call, sse: &[u8], chunk: usize) -> Response {
    let mut stream = Stream::new(settings, call);
    for part in sse.chunks(chunk) {
        stream.feed(part).unwrap();
    }
    assert!(stream.is_done());
    stream.finish().unwrap()
}

/// The fields of a parsed response that a fixture has expectations for.
fn seen(parsed: &Response, expect: &Value) -> Value {
    let completion = &parsed.completion;
    let billed = parsed.billed.unwrap_or_default();
    let mut seen = serde_json::Map::new();
    for key in expect.as_object().unwrap().keys() {
        let value = match key.as_str() {
            "reasoning" => json!(completion.reasoning),
            "answer" => json!(completion.answer),
            "finish_reason" => json!(completion.finish_reason.name()),
            "prompt_tokens" => json!(billed.prompt_tokens),
            "completion_tokens" => json!(billed.completion_tokens),
            "reasoning_tokens" => json!(billed.reasoning_tokens),
            "cached_tokens" => json!(billed.cached_tokens),
            "tokens" => json!(completion.tokens.len()),
            "ids" => json!(
                completion
                    .tokens
                    .iter()
                    .map(|token| token.id)
                    .collect::<Vec<_>>()
            ),
            "tool" => {
                let call = &completion.tool_calls[0];
                json!([call.name, call.arguments])
            }
            "positions" => json!(parsed.prompt_logprobs),
            other => panic!("{other}: no such expectation"),
        };
        seen.insert(key.clone(), value);
    }
    Value::Object(seen)
}

#[test]
fn responses_of_every_form_parse_into_one_record() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/replies");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let fixture: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let logprobs = fixture["logprobs"]
            .as_u64()
            .map(|k| u32::try_from(k).unwrap());
        let dialect = match (fixture["kind"].as_str(), fixture["dialect"].as_str()) {
            (Some("sglang"), _) => Dialect::Sglang,
            (_, Some("vllm")) => Dialect::Vllm,
            _ => Dialect::Openai,
        };
        let settings = settings(dialect, logprobs);
        let ids = vec![504, 3575, 282, 4649, 314];
        let call = call(match fixture["task"].as_str() {
            Some("ids") => CallTask::AnswerIds(vec![504, 3575, 282, 4649, 314]),
            Some("score") => CallTask::Score {
                token_ids: ids,
                top_k: 2,
                from: 2,
            },
            _ => CallTask::Answer,
        });
        let expect = &fixture["expect"];
        match fixture["sse"].as_str() {
            // Chunks may begin and end inside characters and lines.
            Some(sse) => {
                for chunk in [1, 7, 64, sse.len()] {
                    let parsed = streamed(&settings, &call, sse.as_bytes(), chunk);
                    assert_eq!(
                        &seen(&parsed, expect),
                        expect,
                        "{}, {chunk}",
                        path.display()
                    );
                }
            }
            None => {
                let body = serde_json::to_vec(&fixture["response"]).unwrap();
                let parsed = parse(&settings, &call, &body).unwrap();
                assert_eq!(&seen(&parsed, expect), expect, "{}", path.display());
                assert_eq!(parsed.completion.prompt_id, call.prompt.id);
                assert_eq!(parsed.completion.sample_index, 3);
            }
        }
        count += 1;
    }
    assert_eq!(count, 14);
}

/// Exchanges that were recorded from real servers; `None` if the folder is not available.
fn recorded(file: &str) -> Option<Vec<Value>> {
    let Ok(folder) = std::env::var("POTSTILL_REAL") else {
        eprintln!("skipped: set POTSTILL_REAL to the folder with ref/{file}");
        return None;
    };
    let text = std::fs::read(PathBuf::from(folder).join("ref").join(file)).unwrap();
    Some(serde_json::from_slice(&text).unwrap())
}

/// Parses every successful response to a generation request, and returns the number of responses.
fn all_parse(dialect: Dialect, exchanges: &[Value]) -> usize {
    let mut count = 0;
    for (at, exchange) in exchanges.iter().enumerate() {
        let nested = exchange["request"]["path"].is_string();
        let (path, request) = match nested {
            true => (&exchange["request"]["path"], &exchange["request"]["body"]),
            false => (&exchange["path"], &exchange["request"]),
        };
        let is_generation = path
            .as_str()
            .is_some_and(|path| path.ends_with("/completions"));
        if exchange["status"] != 200 || !is_generation || request["echo"] == true {
            continue;
        }
        let top = match &request["logprobs"] {
            Value::Bool(true) => request["top_logprobs"].as_u64(),
            other => other.as_u64(),
        };
        let settings = settings(dialect, top.map(|top| u32::try_from(top).unwrap()));
        let call = call(CallTask::Answer);
        let response = &exchange["response"];
        let parsed = match response.as_str() {
            Some(sse) => streamed(&settings, &call, sse.as_bytes(), 5),
            None => parse(&settings, &call, &serde_json::to_vec(response).unwrap())
                .unwrap_or_else(|failure| panic!("exchange {at}: {failure:?}")),
        };
        let choice = &response["choices"][0];
        let text = choice["message"]["content"]
            .as_str()
            .or(choice["text"].as_str());
        if let Some(text) = text {
            assert_eq!(parsed.completion.answer, text, "exchange {at}");
            let billed = parsed.billed.unwrap();
            assert_eq!(
                json!(billed.prompt_tokens),
                response["usage"]["prompt_tokens"]
            );
            assert_eq!(
                json!(billed.completion_tokens),
                response["usage"]["completion_tokens"]
            );
        } else {
            assert!(
                parsed.completion.answer.starts_with("The capital of Japan"),
                "exchange {at}"
            );
        }
        assert_eq!(
            parsed.completion.tokens.is_empty(),
            top.is_none(),
            "exchange {at}"
        );
        for token in &parsed.completion.tokens {
            assert!(token.logprob <= 0.0 && !token.top.is_empty());
        }
        count += 1;
    }
    count
}

#[test]
fn the_recorded_responses_of_vllm_parse() {
    let Some(exchanges) = recorded("vllm_responses.json") else {
        return;
    };
    assert_eq!(all_parse(Dialect::Vllm, &exchanges), 10);
    let body = |at: usize| serde_json::to_vec(&exchanges[at]["response"]).unwrap();
    let with_ids = parse(
        &settings(Dialect::Vllm, Some(5)),
        &call(CallTask::Answer),
        &body(4),
    )
    .unwrap();
    let ids: Vec<Option<u32>> = with_ids
        .completion
        .tokens
        .iter()
        .map(|token| token.id)
        .collect();
    assert_eq!(ids.first(), Some(&Some(504)));
    assert_eq!(ids.last(), Some(&Some(2)));
    assert_eq!(with_ids.prompt_token_ids.unwrap().len(), 37);
    assert_eq!(with_ids.served_by.unwrap(), "smollm2 vllm-0.32.0-3b1cabd7");
    // The first token of a prompt has no distribution, and the target token is in each of the others.
    let ids = vec![504, 3575, 282, 4649, 314];
    let score = |token_ids: &[u32]| {
        call(CallTask::Score {
            token_ids: token_ids.to_vec(),
            top_k: 20,
            from: 1,
        })
    };
    let scored = parse(&settings(Dialect::Vllm, None), &score(&ids), &body(8)).unwrap();
    let positions = scored.prompt_logprobs.unwrap();
    assert_eq!(positions.len(), 5);
    assert!(positions[0].is_none());
    for (position, id) in positions.iter().zip(&ids).skip(1) {
        assert!(
            position
                .as_ref()
                .unwrap()
                .iter()
                .any(|(other, _)| other == id)
        );
    }
    assert!((positions[1].as_ref().unwrap()[0].1 - -11.776_964).abs() < 1e-4);
    let other = parse(
        &settings(Dialect::Vllm, None),
        &score(&[504, 3575, 282, 4649, 315]),
        &body(8),
    );
    assert_eq!(other.unwrap_err().reason, FailureReason::BadLogprobs);
    let shorter = parse(&settings(Dialect::Vllm, None), &score(&ids[..4]), &body(8));
    assert_eq!(shorter.unwrap_err().reason, FailureReason::BadLogprobs);
}

#[test]
fn the_recorded_responses_of_both_llama_servers_parse() {
    if let Some(exchanges) = recorded("llamaserver_responses.json") {
        assert_eq!(all_parse(Dialect::LlamaServer, &exchanges), 14);
        let sse = exchanges[6]["response"].as_str().unwrap();
        let stream = settings(Dialect::LlamaServer, Some(3));
        let parsed = streamed(&stream, &call(CallTask::Answer), sse.as_bytes(), 100);
        // No usage was requested, so the counts come from the timings.
        let counted = TokenUsage {
            prompt_tokens: 37,
            cached_tokens: 36,
            completion_tokens: 4,
            reasoning_tokens: 0,
        };
        assert_eq!(parsed.billed, Some(counted));
        assert_eq!(parsed.completion.tokens[0].id, Some(504));
        // Tokens that end within a character keep their bytes, here a space and two of the four bytes of an emoji.
        let wide = serde_json::to_vec(&exchanges[4]["response"]).unwrap();
        let asked = settings(Dialect::LlamaServer, Some(64));
        let parsed = parse(&asked, &call(CallTask::Answer), &wide).unwrap();
        let mut tops = parsed.completion.tokens.iter().flat_map(|token| &token.top);
        assert!(tops.any(|top| *top.bytes == [32, 240, 159] || *top.bytes == [240, 159]));
        assert_eq!(parsed.completion.finish_reason, FinishReason::Length);
    }
    if let Some(exchanges) = recorded("llamacpp_responses.json") {
        assert_eq!(all_parse(Dialect::LlamaCppPython, &exchanges), 10);
        let sse = exchanges[6]["response"].as_str().unwrap();
        let stream = settings(Dialect::LlamaCppPython, Some(3));
        let parsed = streamed(&stream, &call(CallTask::Answer), sse.as_bytes(), 100);
        assert_eq!(parsed.billed, None);
        assert_eq!(parsed.completion.usage.completion_tokens, 4);
        assert_eq!(*parsed.completion.tokens[0].bytes, *b"The");
    }
}

fn chat(content: &str) -> Vec<u8> {
    let message = json!({"role": "assistant", "content": content});
    let choice = json!({"index": 0, "message": message, "finish_reason": "stop"});
    serde_json::to_vec(&json!({"choices": [choice]})).unwrap()
}

#[test]
fn reasoning_between_marks_goes_into_its_field() {
    let parts = |content: &str, marks: Option<Reasoning>| {
        let settings = RequestSettings {
            reasoning: marks,
            ..settings(Dialect::Openai, None)
        };
        let completion = parse(&settings, &call(CallTask::Answer), &chat(content))
            .unwrap()
            .completion;
        (completion.reasoning, completion.answer)
    };
    let thought = |text: &str| Some(text.to_owned());
    assert_eq!(
        parts("<think>\na\n</think>\n\nb", None),
        (thought("a"), "b".into())
    );
    // If the template opens the reasoning, the answer contains only its end mark.
    assert_eq!(parts("a\n</think>\n\nb", None), (thought("a"), "b".into()));
    assert_eq!(parts("<think>\n\n</think>\n\nb", None).0, None);
    assert_eq!(parts("no marks", None), (None, "no marks".into()));
    let marks = Reasoning {
        open: "[T]".into(),
        close: "[/T]".into(),
    };
    assert_eq!(parts("[T]a[/T]b", Some(marks)), (thought("a"), "b".into()));
}

#[test]
fn token_ids_as_text_are_ids() {
    let entry = |token: &str, bytes: Value, top: Value| json!({"token": token, "logprob": -0.5, "bytes": bytes, "top_logprobs": top});
    let likely = json!([
        {"token": "token_id:504", "logprob": -0.5, "bytes": "token_id:504".as_bytes()},
        {"token": "token_id:59", "logprob": -2.5, "bytes": "token_id:59".as_bytes()},
    ]);
    let content = json!([entry("token_id:504", json!([84, 104, 101]), likely)]);
    let body = json!({"choices": [{
        "index": 0,
        "message": {"role": "assistant", "content": "The"},
        "logprobs": {"content": content},
        "token_ids": [504],
        "finish_reason": "length",
    }]});
    let body = serde_json::to_vec(&body).unwrap();
    let parsed = parse(
        &settings(Dialect::Vllm, Some(2)),
        &call(CallTask::Answer),
        &body,
    )
    .unwrap();
    let token = &parsed.completion.tokens[0];
    assert_eq!((token.id, &*token.bytes), (Some(504), b"The".as_slice()));
    assert_eq!((token.top[1].id, token.top[1].bytes.len()), (Some(59), 0));
}

#[test]
fn an_answer_in_two_parts_is_one() {
    let part = |content: &str| {
        parse(
            &settings(Dialect::Vllm, None),
            &call(CallTask::Answer),
            &chat(content),
        )
        .unwrap()
        .completion
    };
    let both = joined(part("One, "), part("two."));
    assert_eq!(
        (both.reasoning.as_deref(), both.answer.as_str()),
        (None, "One, two.")
    );
    let both = joined(part("<think>\nOne, "), part("two.\n</think>\n\nThree."));
    assert_eq!(
        (both.reasoning.as_deref(), both.answer.as_str()),
        (Some("One, two."), "Three.")
    );
    let both = joined(part("<think>\nOne, "), part("two,"));
    assert_eq!(
        (both.reasoning.as_deref(), both.answer.as_str()),
        (Some("One, two,"), "")
    );
}
