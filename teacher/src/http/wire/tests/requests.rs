//! Requests, by dialect.

use std::sync::Arc;

use potstill_datasets::{Message, Prompt, Role, SampledToken, ToolCall};
use serde_json::{Value, json};

use super::{call, settings};
use crate::http::wire::request::is_streamed;
use crate::http::wire::{parse, request};
use crate::http::{Api, Call, CallTask, Dialect, FailureReason, RequestSettings};

fn sent(settings: &RequestSettings, call: &Call) -> (String, Value) {
    let body = request(settings, call, None).unwrap();
    (
        body.path.to_owned(),
        serde_json::from_slice(&body.json).unwrap(),
    )
}

const QUESTION: &str = "What is the capital of Japan?";

#[test]
fn only_openais_fields_are_sent_to_openai() {
    let stream = RequestSettings {
        stream: true,
        seed: Some(1),
        stop: vec!["END".into()],
        ..settings(Dialect::Openai, Some(5))
    };
    let (path, body) = sent(&stream, &call(CallTask::Answer));
    let seed = body["seed"].as_u64().unwrap();
    assert!(seed < 1 << 31);
    assert_eq!(path, "/chat/completions");
    assert_eq!(
        body,
        json!({
            "model": "m",
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 64,
            "temperature": 0.5,
            "stop": ["END"],
            "seed": seed,
            "logprobs": true,
            "top_logprobs": 5,
            "stream": true,
            "stream_options": {"include_usage": true},
        })
    );
    let other = Call {
        sample_index: 4,
        ..call(CallTask::Answer)
    };
    assert_ne!(sent(&stream, &other).1["seed"], body["seed"]);
    assert_eq!(
        sent(&stream, &call(CallTask::Answer)).1["seed"],
        body["seed"]
    );
    let beyond = RequestSettings {
        top_k: Some(40),
        ..settings(Dialect::Openai, None)
    };
    let failure = request(&beyond, &call(CallTask::Answer), None).unwrap_err();
    assert_eq!(failure.reason, FailureReason::BadRequest);
    assert!(failure.message.contains("top_k"));
}

#[test]
fn requests_to_a_reasoning_model_have_its_fields() {
    let reasoning = RequestSettings {
        reasoning_model: true,
        top_p: Some(0.9),
        ..settings(Dialect::Openai, None)
    };
    let (_, body) = sent(&reasoning, &call(CallTask::Answer));
    let expected = json!({
        "model": "m",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_completion_tokens": 64,
    });
    assert_eq!(body, expected);
    let logprobs = RequestSettings {
        logprobs: Some(5),
        ..reasoning
    };
    assert!(request(&logprobs, &call(CallTask::Answer), None).is_err());
}

#[test]
fn arguments_of_the_template_are_sent_where_a_server_takes_them() {
    let arguments = json!({ "enable_thinking": false });
    for dialect in [
        Dialect::Openai,
        Dialect::Vllm,
        Dialect::Sglang,
        Dialect::LlamaServer,
        Dialect::LlamaCppPython,
    ] {
        let with = RequestSettings {
            template_arguments: serde_json::from_value(arguments.clone()).unwrap(),
            ..settings(dialect, None)
        };
        let result = request(&with, &call(CallTask::Answer), None);
        match dialect {
            Dialect::Openai | Dialect::LlamaCppPython => {
                let failure = result.unwrap_err();
                assert_eq!(failure.reason, FailureReason::BadRequest);
                assert!(failure.message.contains("`template_arguments`"));
            }
            _ => {
                let body: Value = serde_json::from_slice(&result.unwrap().json).unwrap();
                assert_eq!(body["chat_template_kwargs"], arguments, "{dialect:?}");
            }
        }
        // A prompt of token ids is rendered already.
        if dialect != Dialect::LlamaCppPython {
            let (_, body) = sent(&with, &call(CallTask::AnswerIds(vec![1, 2])));
            assert!(body.get("chat_template_kwargs").is_none(), "{dialect:?}");
        }
        let (_, body) = sent(&settings(dialect, None), &call(CallTask::Answer));
        assert!(body.get("chat_template_kwargs").is_none(), "{dialect:?}");
    }
}

#[test]
fn each_dialect_has_its_fields() {
    let vllm = RequestSettings {
        top_k: Some(40),
        repetition_penalty: Some(1.1),
        ..settings(Dialect::Vllm, Some(20))
    };
    let (path, body) = sent(&vllm, &call(CallTask::AnswerIds(vec![1, 2])));
    assert_eq!(path, "/completions");
    assert_eq!(
        body,
        json!({
            "model": "m", "prompt": [1, 2], "max_tokens": 64, "temperature": 0.5, "top_k": 40,
            "repetition_penalty": 1.1, "logprobs": 20, "return_token_ids": true,
            "return_tokens_as_token_ids": true,
        })
    );
    let score = call(CallTask::Score {
        token_ids: vec![1, 2, 3],
        top_k: 64,
        from: 2,
    });
    let (path, body) = sent(
        &RequestSettings {
            stream: true,
            ..vllm
        },
        &score,
    );
    assert_eq!(path, "/completions");
    assert_eq!(
        body,
        json!({
            "model": "m", "prompt": [1, 2, 3], "max_tokens": 1, "temperature": 1.0,
            "prompt_logprobs": 64, "return_token_ids": true,
        })
    );
}

#[test]
fn unsupported_settings_are_refused_before_sending() {
    let score = call(CallTask::Score {
        token_ids: vec![1, 2, 3],
        top_k: 64,
        from: 2,
    });
    // The default of llama-cpp-python is a repetition penalty, and it gives no log-probabilities for 0.
    let (_, body) = sent(
        &settings(Dialect::LlamaCppPython, Some(0)),
        &call(CallTask::Answer),
    );
    assert_eq!(
        (&body["repeat_penalty"], &body["top_logprobs"]),
        (&json!(1.0), &json!(1))
    );
    assert!(
        request(
            &settings(Dialect::LlamaCppPython, None),
            &call(CallTask::AnswerIds(vec![1])),
            None
        )
        .is_err()
    );
    for dialect in [
        Dialect::Openai,
        Dialect::LlamaServer,
        Dialect::LlamaCppPython,
    ] {
        assert!(request(&settings(dialect, None), &score, None).is_err());
    }
    let generate = request(&settings(Dialect::Sglang, None), &score, None).unwrap();
    assert_eq!((generate.path, generate.from_root), ("/generate", true));
    let body: Value = serde_json::from_slice(&generate.json).unwrap();
    assert_eq!(
        body,
        json!({
            "return_logprob": true, "input_ids": [1, 2, 3], "top_logprobs_num": 64,
            "logprob_start_len": 1, "sampling_params": {"max_new_tokens": 1},
        })
    );
}

#[test]
fn only_answers_stream() {
    let stream = RequestSettings {
        stream: true,
        ..settings(Dialect::Sglang, None)
    };
    assert!(is_streamed(&stream, &call(CallTask::Answer)));
    assert!(!is_streamed(&stream, &call(CallTask::AnswerIds(vec![1]))));
    let vllm = RequestSettings {
        dialect: Dialect::Vllm,
        ..stream
    };
    assert!(is_streamed(&vllm, &call(CallTask::AnswerIds(vec![1]))));
    assert!(!is_streamed(
        &vllm,
        &call(CallTask::Score {
            token_ids: vec![1],
            top_k: 1,
            from: 1
        })
    ));
}

#[test]
fn a_conversation_with_tools_is_sent_completely() {
    let mut request_message = Message::text(Role::Assistant, "");
    request_message.tool_calls = vec![ToolCall {
        id: Some("c1".into()),
        name: "f".into(),
        arguments: "{}".into(),
    }];
    request_message.reasoning = Some("hidden".into());
    let mut result = Message::text(Role::Tool, "42");
    result.tool_call_id = Some("c1".into());
    let messages = vec![Message::text(Role::User, "?"), request_message, result];
    let prompt = Prompt::new(
        messages,
        Some(r#"[{"type": "function"}]"#.into()),
        None,
        String::new(),
    );
    let call = Call {
        prompt: Arc::new(prompt),
        ..call(CallTask::Answer)
    };
    let (_, body) = sent(&settings(Dialect::Openai, None), &call);
    assert_eq!(body["tools"], json!([{"type": "function"}]));
    assert_eq!(
        body["messages"],
        json!([
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            ]},
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ])
    );
}

#[test]
fn an_answer_is_continued_if_the_dialect_allows() {
    let half = br#"{"choices": [{"index": 0, "message": {"content": "One,"}, "finish_reason": "length"}]}"#;
    let mut so_far = parse(
        &settings(Dialect::Vllm, None),
        &call(CallTask::Answer),
        half,
    )
    .unwrap()
    .completion;
    let vllm = settings(Dialect::Vllm, None);
    let body = request(&vllm, &call(CallTask::Answer), Some(&so_far)).unwrap();
    let body: Value = serde_json::from_slice(&body.json).unwrap();
    assert_eq!(
        body["messages"][1],
        json!({"role": "assistant", "content": "One,"})
    );
    assert_eq!(
        (
            &body["continue_final_message"],
            &body["add_generation_prompt"]
        ),
        (&json!(true), &json!(false))
    );
    for dialect in [Dialect::Openai, Dialect::LlamaCppPython] {
        assert!(
            request(
                &settings(dialect, None),
                &call(CallTask::Answer),
                Some(&so_far)
            )
            .is_err()
        );
    }
    // The completions API continues from token ids, if all ids are known.
    let ids = call(CallTask::AnswerIds(vec![1, 2]));
    assert!(request(&vllm, &ids, Some(&so_far)).is_err());
    so_far.tokens = vec![SampledToken {
        bytes: "One,".into(),
        id: Some(9),
        logprob: -0.5,
        top: Vec::new(),
    }];
    let body = request(&vllm, &ids, Some(&so_far)).unwrap();
    let body: Value = serde_json::from_slice(&body.json).unwrap();
    assert_eq!(body["prompt"], json!([1, 2, 9]));
    so_far.reasoning = Some("thought".into());
    assert!(request(&vllm, &call(CallTask::Answer), Some(&so_far)).is_err());
    assert!(request(&vllm, &ids, Some(&so_far)).is_ok());
    let text = RequestSettings {
        api: Api::Completions,
        ..vllm
    };
    so_far.reasoning = None;
    let body = request(&text, &call(CallTask::Answer), Some(&so_far)).unwrap();
    let body: Value = serde_json::from_slice(&body.json).unwrap();
    assert_eq!(body["prompt"], json!(format!("{QUESTION}One,")));
}
