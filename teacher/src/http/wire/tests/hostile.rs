//! Replies that are made to do harm: each is one malformed reply, and never a crash.

use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use super::{call, settings};
use crate::http::{
    CallTask, Dialect, Failure, FailureReason, ReplyBytes, RequestSettings, Response, TokenUsage,
    decode_reply,
};

const DIALECTS: [Dialect; 5] = [
    Dialect::Openai,
    Dialect::Vllm,
    Dialect::Sglang,
    Dialect::LlamaServer,
    Dialect::LlamaCppPython,
];

fn decode(
    settings: &RequestSettings,
    task: &CallTask,
    status: u16,
    body: &[u8],
) -> Result<Response, Failure> {
    let reply = ReplyBytes {
        status,
        retry_after: None,
        is_stream: settings.stream,
        chunks: &body.chunks(65_536).collect::<Vec<_>>(),
    };
    decode_reply(settings, &call(task.clone()), reply)
}

/// Decodes a body in each dialect, whole and streamed, with and without log-probabilities, as an answer, a score and an
/// error.
fn decode_everywhere(body: &[u8], mut check: impl FnMut(&Result<Response, Failure>)) {
    let score = CallTask::Score {
        token_ids: vec![1, 2, 3],
        top_k: 2,
        from: 1,
    };
    let event = [b"data: ", body, b"\n\n"].concat();
    for dialect in DIALECTS {
        for logprobs in [None, Some(2)] {
            let whole = settings(dialect, logprobs);
            let streamed = RequestSettings {
                stream: true,
                ..whole.clone()
            };
            for task in [&CallTask::Answer, &CallTask::AnswerIds(vec![1, 2]), &score] {
                check(&decode(&whole, task, 200, body));
                check(&decode(&streamed, task, 200, body));
                check(&decode(&streamed, task, 200, &event));
                check(&decode(&whole, task, 429, body));
            }
        }
    }
}

#[test]
fn deep_nesting_is_one_malformed_reply() {
    let deep = 1_000_000;
    let open = |bracket: &str| bracket.repeat(deep);
    let inside = |field: &str, bracket: &str| {
        format!(
            r#"{{"choices":[{{"index":0,"message":{{"content":"[[[["{field}{}"#,
            open(bracket)
        )
    };
    let bodies = [
        open("["),
        open("{\"a\":"),
        open("[{\"a\":"),
        open("[") + &open("]"),
        format!("{{\"error\":{}", open("[")),
        format!("{{\"usage\":{}", open("{\"usage\":")),
        format!("{{\"meta_info\":{}", open("[")),
        format!("{{\"unknown\":{}{}}}", open("["), open("]")),
        format!("{{\"choices\":[{{\"logprobs\":{}", open("[")),
        inside(r#","tool_calls":[{"function":{"arguments":"#, "{\"a\":"),
        inside(r#","unknown":"#, "["),
    ];
    for body in bodies {
        decode_everywhere(body.as_bytes(), |result| {
            let failure = result.as_ref().unwrap_err();
            let is_refused = failure.status == Some(429);
            assert!(
                is_refused || failure.reason == FailureReason::Malformed,
                "{:.60}: {failure:?}",
                body
            );
            assert!(is_refused || failure.message.contains("128"), "{failure:?}");
        });
    }
    // Brackets inside a text are text.
    let text = "[{\\\"".repeat(100_000);
    let body =
        format!(r#"{{"choices":[{{"message":{{"content":"{text}"}},"finish_reason":"stop"}}]}}"#);
    let whole = settings(Dialect::Openai, None);
    let response = decode(&whole, &CallTask::Answer, 200, body.as_bytes()).unwrap();
    assert_eq!(response.completion.answer.len(), 300_000);
}

#[test]
fn odd_json_never_panics() {
    let number = format!("1{}", "0".repeat(100_000));
    let odd = [
        &number,
        "1e999999999",
        "-1e-999999999",
        "1e99999999999999999999999999",
        "-0",
        "\"\\ud800\"",
        "\"\\udc00\\ud800x\"",
        "\"\\u0000\"",
        "\"a\u{0}b\"",
        "\"\\u12\"",
        "\"\\x\"",
        "nul",
        "NaN",
        "-Infinity",
        "{\"a\":1,\"a\":2}",
        "[,]",
        "\u{feff}{}",
        "18446744073709551616",
        "-9223372036854775809",
        "true",
        "[]",
        "{}",
    ];
    let places = [
        "@",
        "{\"usage\":@,\"choices\":[{\"message\":{\"content\":\"x\"},\"finish_reason\":\"stop\"}]}",
        "{\"usage\":{\"prompt_tokens\":@,\"completion_tokens\":@}}",
        "{\"choices\":[{\"index\":@}]}",
        "{\"choices\":[{\"message\":{\"content\":@},\"finish_reason\":\"stop\"}]}",
        "{\"choices\":[{\"message\":{\"tool_calls\":[{\"index\":@,\"function\":{\"arguments\":@}}]}}]}",
        "{\"choices\":[{\"message\":{\"content\":\"x\"},\"logprobs\":{\"content\":[{\"token\":\"x\",\"logprob\":@,\"bytes\":@}]}}]}",
        "{\"choices\":[{\"prompt_logprobs\":[null,{\"@\":{\"logprob\":@}}]}]}",
        "{\"text\":@,\"meta_info\":{\"prompt_tokens\":@,\"output_token_logprobs\":[[@,@,@]]}}",
        "{\"choices\":[],\"choices\":[{\"message\":{\"content\":@}}]}",
        "{\"error\":@}",
        "{\"timings\":{\"prompt_n\":@,\"predicted_n\":@,\"cache_n\":@}}",
    ];
    for value in odd {
        for place in places {
            let body = place.replace('@', value);
            decode_everywhere(body.as_bytes(), |result| {
                if let Err(failure) = result {
                    assert!(failure.message.len() <= 500);
                }
            });
        }
    }
    // Random changes of a good reply.
    let good = br#"{"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"Hi \u00e9","tool_calls":null},"logprobs":{"content":[{"token":"Hi","logprob":-0.5,"bytes":[72,105],"top_logprobs":[{"token":"Hi","logprob":-0.5,"bytes":[72,105]}]}]},"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8}}"#;
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    for _ in 0..2_000 {
        let mut body = good.to_vec();
        for _ in 0..rng.random_range(1..6) {
            let at = rng.random_range(0..body.len());
            match rng.random_range(0..4) {
                0 => body[at] = rng.random(),
                1 => drop(body.remove(at)),
                2 => body.truncate(at.max(8)),
                _ => body.insert(at, b"[]{}\",:\\0"[rng.random_range(0..9)]),
            }
        }
        decode_everywhere(&body, |_| {});
    }
}

#[test]
fn a_usage_that_cannot_be_right_is_unknown() {
    let answer = |usage: Value| {
        let choice = json!({"index": 0, "message": {"content": "Hi"}, "finish_reason": "stop"});
        let body = json!({"choices": [choice], "usage": usage}).to_string();
        let whole = settings(Dialect::Openai, None);
        decode(&whole, &CallTask::Answer, 200, body.as_bytes()).unwrap()
    };
    let pair = |prompt: Value, completion: Value| json!({"prompt_tokens": prompt, "completion_tokens": completion});
    for usage in [
        pair(json!(-5), json!(3)),
        pair(json!(5), json!(-5)),
        pair(json!(u64::MAX), json!(3)),
        pair(json!(5), json!(u64::MAX)),
        pair(json!(5), json!(1e300)),
        pair(json!(5), json!(1_u64 << 33)),
        pair(json!(5), json!(2.5)),
        pair(json!(5), json!("3")),
        pair(json!(5), json!([3])),
        pair(json!(5), json!(true)),
        // 64 tokens were requested.
        pair(json!(5), json!(1000)),
        // The prompt and the answer are not empty.
        pair(json!(5), json!(0)),
        pair(json!(0), json!(3)),
        json!({"prompt_tokens": 5}),
        json!({"prompt_tokens": 5, "completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": -3}}),
        json!({"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": -3}}),
        json!("many"),
        json!([1, 2]),
        json!(7),
    ] {
        let response = answer(usage.clone());
        assert_eq!(response.billed, None, "{usage}");
        assert!(response.is_usage_implausible, "{usage}");
        assert_eq!(response.completion.usage.completion_tokens, 0, "{usage}");
    }
    for usage in [
        pair(json!(5), json!(3)),
        pair(json!(5.0), json!(3.0)),
        json!({"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": null}),
        json!({"prompt_tokens": 5, "completion_tokens": 3, "completion_tokens_details": 7}),
    ] {
        let response = answer(usage.clone());
        let known = TokenUsage {
            prompt_tokens: 5,
            completion_tokens: 3,
            ..TokenUsage::default()
        };
        assert_eq!(response.billed, Some(known), "{usage}");
        assert!(!response.is_usage_implausible);
    }
    // No usage is no warning: servers write null or 0 for unknown counts.
    for usage in [Value::Null, pair(json!(0), json!(0)), json!({})] {
        let response = answer(usage);
        assert_eq!(response.billed, None);
        assert!(!response.is_usage_implausible);
    }
}
