//! Requests, by dialect.

use std::sync::Arc;

use potstill_datasets::{Message, Prompt, Role, SampledToken, ToolCall};
use serde_json::{Value, json};

use super::{asking, call};
use crate::http::wire::request::is_streamed;
use crate::http::wire::{parse, request};
use crate::http::{Asking, Call, Dialect, Method, Reason, Task};

fn sent(asking: &Asking, call: &Call) -> (String, Value) {
    let body = request(asking, call, None).unwrap();
    (
        body.path.to_owned(),
        serde_json::from_slice(&body.json).unwrap(),
    )
}

const QUESTION: &str = "What is the capital of Japan?";

#[test]
fn nothing_but_openais_fields_goes_to_openai() {
    let stream = Asking {
        stream: true,
        seed: Some(1),
        stop: vec!["END".into()],
        ..asking(Dialect::Openai, Some(5))
    };
    let (path, body) = sent(&stream, &call(Task::Answer));
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
        ..call(Task::Answer)
    };
    assert_ne!(sent(&stream, &other).1["seed"], body["seed"]);
    assert_eq!(sent(&stream, &call(Task::Answer)).1["seed"], body["seed"]);
    let beyond = Asking {
        top_k: Some(40),
        ..asking(Dialect::Openai, None)
    };
    let failure = request(&beyond, &call(Task::Answer), None).unwrap_err();
    assert_eq!(failure.reason, Reason::BadRequest);
    assert!(failure.message.contains("top_k"));
}

#[test]
fn a_reasoning_model_is_asked_in_its_own_way() {
    let reasoning = Asking {
        reasoning_model: true,
        top_p: Some(0.9),
        ..asking(Dialect::Openai, None)
    };
    let (_, body) = sent(&reasoning, &call(Task::Answer));
    let expected = json!({
        "model": "m",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_completion_tokens": 64,
    });
    assert_eq!(body, expected);
    let logprobs = Asking {
        logprobs: Some(5),
        ..reasoning
    };
    assert!(request(&logprobs, &call(Task::Answer), None).is_err());
}

#[test]
fn each_server_gets_the_fields_it_knows() {
    let vllm = Asking {
        top_k: Some(40),
        repetition_penalty: Some(1.1),
        ..asking(Dialect::Vllm, Some(20))
    };
    let (path, body) = sent(&vllm, &call(Task::AnswerIds(vec![1, 2])));
    assert_eq!(path, "/completions");
    assert_eq!(
        body,
        json!({
            "model": "m", "prompt": [1, 2], "max_tokens": 64, "temperature": 0.5, "top_k": 40,
            "repetition_penalty": 1.1, "logprobs": 20, "return_token_ids": true,
            "return_tokens_as_token_ids": true,
        })
    );
    let score = call(Task::Score {
        token_ids: vec![1, 2, 3],
        top_k: 64,
        from: 2,
    });
    let (path, body) = sent(
        &Asking {
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
fn what_a_server_cannot_do_is_refused_before_it_is_asked() {
    let score = call(Task::Score {
        token_ids: vec![1, 2, 3],
        top_k: 64,
        from: 2,
    });
    // llama-cpp-python penalises repetition unless it is told not to, and gives no log-probabilities for 0.
    let (_, body) = sent(
        &asking(Dialect::LlamaCppPython, Some(0)),
        &call(Task::Answer),
    );
    assert_eq!(
        (&body["repeat_penalty"], &body["top_logprobs"]),
        (&json!(1.0), &json!(1))
    );
    assert!(
        request(
            &asking(Dialect::LlamaCppPython, None),
            &call(Task::AnswerIds(vec![1])),
            None
        )
        .is_err()
    );
    for dialect in [
        Dialect::Openai,
        Dialect::LlamaServer,
        Dialect::LlamaCppPython,
    ] {
        assert!(request(&asking(dialect, None), &score, None).is_err());
    }
    let generate = request(&asking(Dialect::Sglang, None), &score, None).unwrap();
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
    let stream = Asking {
        stream: true,
        ..asking(Dialect::Sglang, None)
    };
    assert!(is_streamed(&stream, &call(Task::Answer)));
    assert!(!is_streamed(&stream, &call(Task::AnswerIds(vec![1]))));
    let vllm = Asking {
        dialect: Dialect::Vllm,
        ..stream
    };
    assert!(is_streamed(&vllm, &call(Task::AnswerIds(vec![1]))));
    assert!(!is_streamed(
        &vllm,
        &call(Task::Score {
            token_ids: vec![1],
            top_k: 1,
            from: 1
        })
    ));
}

#[test]
fn a_conversation_with_tools_is_sent_whole() {
    let mut asks = Message::text(Role::Assistant, "");
    asks.tool_calls = vec![ToolCall {
        id: Some("c1".into()),
        name: "f".into(),
        arguments: "{}".into(),
    }];
    asks.reasoning = Some("hidden".into());
    let mut told = Message::text(Role::Tool, "42");
    told.tool_call_id = Some("c1".into());
    let messages = vec![Message::text(Role::User, "?"), asks, told];
    let prompt = Prompt::new(
        messages,
        Some(r#"[{"type": "function"}]"#.into()),
        None,
        String::new(),
    );
    let call = Call {
        prompt: Arc::new(prompt),
        ..call(Task::Answer)
    };
    let (_, body) = sent(&asking(Dialect::Openai, None), &call);
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
fn an_answer_is_gone_on_from_where_the_server_can() {
    let half = br#"{"choices": [{"index": 0, "message": {"content": "One,"}, "finish_reason": "length"}]}"#;
    let mut so_far = parse(&asking(Dialect::Vllm, None), &call(Task::Answer), half)
        .unwrap()
        .completion;
    let vllm = asking(Dialect::Vllm, None);
    let body = request(&vllm, &call(Task::Answer), Some(&so_far)).unwrap();
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
        assert!(request(&asking(dialect, None), &call(Task::Answer), Some(&so_far)).is_err());
    }
    // From ids exactly, if all are known.
    let ids = call(Task::AnswerIds(vec![1, 2]));
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
    assert!(request(&vllm, &call(Task::Answer), Some(&so_far)).is_err());
    assert!(request(&vllm, &ids, Some(&so_far)).is_ok());
    let text = Asking {
        method: Method::Completions,
        ..vllm
    };
    so_far.reasoning = None;
    let body = request(&text, &call(Task::Answer), Some(&so_far)).unwrap();
    let body: Value = serde_json::from_slice(&body.json).unwrap();
    assert_eq!(body["prompt"], json!(format!("{QUESTION}One,")));
}
