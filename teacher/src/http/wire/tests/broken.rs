//! Responses without an answer, each with its reason.

use serde_json::{Value, json};

use super::{call, settings};
use crate::http::wire::{Stream, failure, parse};
use crate::http::{CallTask, Dialect, Failure, FailureReason, RequestSettings, TokenUsage};

fn refused(body: &[u8], logprobs: Option<u32>) -> Failure {
    let parsed = parse(
        &settings(Dialect::Openai, logprobs),
        &call(CallTask::Answer),
        body,
    );
    parsed.expect_err(&String::from_utf8_lossy(body))
}

fn entry(token: &str, logprob: Value) -> Value {
    let top = json!([{"token": token, "logprob": logprob, "bytes": token.as_bytes()}]);
    json!({"token": token, "logprob": logprob, "bytes": token.as_bytes(), "top_logprobs": top})
}

fn with_logprobs(content: Value) -> Value {
    json!({
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": "Hi you all"},
            "logprobs": {"content": content},
            "finish_reason": "stop",
        }],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    })
}

const USED: TokenUsage = TokenUsage {
    prompt_tokens: 5,
    cached_tokens: 0,
    completion_tokens: 3,
    reasoning_tokens: 0,
};

#[test]
fn defective_log_probabilities_are_refused_and_their_cost_is_known() {
    let good = || {
        vec![
            entry("Hi", json!(-0.5)),
            entry(" you", json!(-0.25)),
            entry(" all", json!(-1)),
        ]
    };
    let body = |content: Vec<Value>| serde_json::to_vec(&with_logprobs(json!(content))).unwrap();
    let asked = settings(Dialect::Openai, Some(1));
    assert!(parse(&asked, &call(CallTask::Answer), &body(good())).is_ok());
    let mut cases: Vec<(&str, Vec<u8>)> = Vec::new();
    for (name, value) in [
        ("above 0", json!(0.5)),
        ("null", json!(null)),
        ("text", json!("NaN")),
    ] {
        let mut content = good();
        content[1] = entry(" you", value);
        cases.push((name, body(content)));
    }
    let mut likely = good();
    likely[2]["top_logprobs"][0]["logprob"] = json!(null);
    cases.push(("null among the likeliest", body(likely)));
    let mut other = good();
    other[0]["bytes"] = json!([72, 111]);
    cases.push(("bytes of another text", body(other)));
    let mut ids = good();
    ids[0]["id"] = json!(1_u64 << 40);
    cases.push(("an id out of range", body(ids)));
    let mut negative = good();
    negative[0]["id"] = json!(-1);
    cases.push(("a negative id", body(negative)));
    cases.push(("fewer than tokens", body(vec![entry("Hi", json!(-0.5))])));
    cases.push(("none", body(Vec::new())));
    let mut plain = good();
    for entry in &mut plain {
        entry["top_logprobs"] = json!([]);
    }
    cases.push(("none of the likeliest", body(plain)));
    let mut beside = with_logprobs(json!(good()));
    beside["choices"][0]["token_ids"] = json!([1, 2]);
    cases.push((
        "other token ids beside",
        serde_json::to_vec(&beside).unwrap(),
    ));
    for (name, body) in cases {
        let failure = refused(&body, Some(1));
        assert_eq!(
            failure.reason,
            FailureReason::BadLogprobs,
            "{name}: {failure:?}"
        );
        assert_eq!(failure.billed, Some(USED), "{name}");
        // If log-probabilities were not requested, the answer is accepted.
        let text = parse(
            &settings(Dialect::Openai, None),
            &call(CallTask::Answer),
            &body,
        );
        if !matches!(name, "other token ids beside") {
            assert!(
                text.is_ok_and(|response| response.completion.tokens.is_empty()),
                "{name}"
            );
        }
    }
    // Python writes NaN, which is not JSON.
    let nan = String::from_utf8(body(good()))
        .unwrap()
        .replace("-0.25", "NaN");
    assert_eq!(
        refused(nan.as_bytes(), Some(1)).reason,
        FailureReason::BadLogprobs
    );
}

#[test]
fn bodies_that_break_the_protocol_are_malformed() {
    let good = serde_json::to_vec(&with_logprobs(json!([]))).unwrap();
    let mut latin = good.clone();
    let at = latin.windows(2).position(|pair| pair == b"Hi").unwrap();
    latin[at] = 0xe9;
    for body in [
        &good[..good.len() - 20],
        latin.as_slice(),
        b"",
        b"[]",
        b"null",
        b"<html>busy</html>",
        br#"{"choices": {"index": 0}}"#,
        br#"{"choices": [{"message": "Hi"}]}"#,
        br#"{"choices": [{"message": {"content": 7}}]}"#,
    ] {
        let failure = refused(body, None);
        assert_eq!(failure.reason, FailureReason::Malformed, "{failure:?}");
        assert!(failure.message.len() <= 500);
    }
}

#[test]
fn a_response_without_an_answer_has_a_reason() {
    let choice = |message: Value, finish: &str| {
        let choice = json!({"index": 0, "message": message, "finish_reason": finish});
        serde_json::to_vec(&json!({"choices": [choice]})).unwrap()
    };
    let empty = json!({"role": "assistant", "content": ""});
    assert_eq!(
        refused(br#"{"choices": []}"#, None).reason,
        FailureReason::Empty
    );
    assert_eq!(refused(b"{}", None).reason, FailureReason::Empty);
    assert_eq!(
        refused(&choice(empty.clone(), "stop"), None).reason,
        FailureReason::Empty
    );
    let filtered = refused(&choice(empty.clone(), "content_filter"), None);
    assert_eq!(filtered.reason, FailureReason::ContentFilter);
    // Hidden reasoning may use up the token limit. A retry would cost the same again.
    let cut = refused(&choice(empty.clone(), "length"), None);
    assert_eq!(cut.reason, FailureReason::Length);
    assert!(!cut.reason.is_transient());
    let refusal = json!({"role": "assistant", "content": null, "refusal": "I cannot."});
    let withheld = refused(&choice(refusal, "stop"), None);
    assert_eq!(
        (withheld.reason, withheld.message.as_str()),
        (FailureReason::ContentFilter, "I cannot.")
    );
    let abort = refused(&choice(json!({"content": "half"}), "abort"), None);
    assert_eq!(abort.reason, FailureReason::Overloaded);
}

#[test]
fn an_error_inside_a_successful_response_is_a_failure() {
    let inside = refused(
        br#"{"error": {"message": "Provider\nreturned error", "code": 502}}"#,
        None,
    );
    assert_eq!(inside.reason, FailureReason::ErrorInside);
    assert_eq!(inside.message, "Provider returned error");
    let credit = refused(
        br#"{"error": {"message": "Insufficient credits", "code": 402}}"#,
        None,
    );
    assert_eq!(credit.reason, FailureReason::OutOfCredit);
    let of_choice = br#"{"choices": [{"index": 0, "error": {"code": 500, "message": "x"}, "finish_reason": "error"}]}"#;
    assert_eq!(refused(of_choice, None).reason, FailureReason::ErrorInside);
    let mut stream = Stream::new(&settings(Dialect::Openai, None), &call(CallTask::Answer));
    stream
        .feed(b"data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Half\"}}]}\n\n")
        .unwrap();
    let failed = stream.feed(b"data: {\"error\":{\"message\":\"gone\",\"code\":500}}\n\n");
    assert_eq!(failed.unwrap_err().reason, FailureReason::ErrorInside);
    // The text before the error can be continued.
    assert_eq!(stream.so_far().unwrap().answer, "Half");
}

#[test]
fn a_stream_that_ends_early_is_cut_and_its_cost_is_unknown() {
    let piece = |text: &str, finish: &str| {
        format!(
            "data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":{finish}}}],\"usage\":{{\"prompt_tokens\":5,\"completion_tokens\":1}}}}\n\n"
        )
    };
    let new = || Stream::new(&settings(Dialect::Openai, None), &call(CallTask::Answer));
    let mut stream = new();
    stream.feed(piece("One", "null").as_bytes()).unwrap();
    stream.feed(b"data: {\"choices\":[{\"ind").unwrap();
    // A usage in the middle of the stream is not final.
    assert_eq!(stream.billed(), None);
    assert_eq!(stream.so_far().unwrap().answer, "One");
    assert_eq!(stream.finish().unwrap_err().reason, FailureReason::Cut);
    // An empty stream, and a stream with an end only.
    assert_eq!(new().finish().unwrap_err().reason, FailureReason::Cut);
    assert!(new().so_far().is_none());
    let mut only_done = new();
    only_done.feed(b"data: [DONE]\n\n").unwrap();
    assert!(only_done.is_done());
    assert_eq!(only_done.finish().unwrap_err().reason, FailureReason::Cut);
    // The end may be marked by the finish reason alone, in a line without a line end.
    let mut stream = new();
    stream
        .feed(piece("One", "\"stop\"").trim_end().as_bytes())
        .unwrap();
    let response = stream.finish().unwrap();
    assert_eq!(response.completion.answer, "One");
    assert_eq!(response.billed.unwrap().prompt_tokens, 5);
    // A break after the answer's end does not affect the answer.
    let mut stream = new();
    assert!(!stream.has_answer());
    stream.feed(piece("One", "\"stop\"").as_bytes()).unwrap();
    stream.feed(b"data: {\"choices\":[],\"usa").unwrap();
    assert!(stream.has_answer() && !stream.is_done());
    assert_eq!(stream.finish().unwrap().completion.answer, "One");
    // A piece that is not JSON is a fault of the server, not of the connection.
    assert_eq!(
        new().feed(b"data: {]}\n\n").unwrap_err().reason,
        FailureReason::Malformed
    );
    // The response of a server that does not stream is accepted.
    let mut whole = new();
    for byte in br#"{"choices":[{"message":{"content":"Hi"},"finish_reason":"stop"}]}"# {
        whole.feed(&[*byte]).unwrap();
    }
    assert_eq!(whole.finish().unwrap().completion.answer, "Hi");
}

#[test]
fn each_status_has_its_reason() {
    let of = |status, body: &str| failure(status, None, body.as_bytes()).reason;
    let context = [
        r#"{"error": {"message": "This model's maximum context length is 2048 tokens.", "code": "context_length_exceeded"}}"#,
        r#"{"error": {"code": 400, "message": "request (3031 tokens) exceeds the available context size", "type": "exceed_context_size_error"}}"#,
        r#"{"error": {"message": "This model's maximum context length is 2048 tokens. However, your prompt contains at least 2049 input tokens", "type": "BadRequestError", "code": 400}}"#,
    ];
    for body in context {
        assert_eq!(of(400, body), FailureReason::ContextTooLong, "{body}");
    }
    for (status, reason) in [
        (301, FailureReason::Redirected),
        (400, FailureReason::BadRequest),
        (401, FailureReason::Unauthorized),
        (402, FailureReason::OutOfCredit),
        (403, FailureReason::Forbidden),
        (404, FailureReason::NotFound),
        (408, FailureReason::RequestTimeout),
        (413, FailureReason::BadRequest),
        (422, FailureReason::BadRequest),
        (429, FailureReason::RateLimited),
        (500, FailureReason::ServerError),
        (502, FailureReason::Overloaded),
        (503, FailureReason::Overloaded),
        (504, FailureReason::Overloaded),
        (529, FailureReason::Overloaded),
    ] {
        assert_eq!(of(status, "no JSON"), reason, "{status}");
    }
    let quota = r#"{"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}}"#;
    assert_eq!(of(429, quota), FailureReason::OutOfCredit);
    let many = "line\none\u{7}".repeat(200);
    let shown = failure(400, None, many.as_bytes()).message;
    assert!(shown.len() <= 500 && !shown.contains(char::is_control));
    assert_eq!(
        failure(400, None, br#"{"detail": "Not Found"}"#).message,
        "Not Found"
    );
}

#[test]
fn retry_after_is_seconds_or_a_date() {
    let after = |text| failure(429, Some(text), b"").retry_after_seconds;
    assert_eq!(after("12"), Some(12.0));
    assert_eq!(after(" 0.5 "), Some(0.5));
    for none in ["-1", "soon", "inf", "Sun, 99 Xxx 1994 08:49:37 GMT"] {
        assert_eq!(after(none), None, "{none}");
    }
    assert_eq!(after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(0.0));
    let later = after("Fri, 31 Dec 2100 23:59:59 GMT").unwrap();
    // date -u -d '2100-12-31 23:59:59' +%s
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert!(
        (later + now.as_secs_f64() - 4_133_980_799.0).abs() < 5.0,
        "{later}"
    );
}

#[test]
fn a_continued_answer_is_known_completely() {
    // The second token begins a character that the text does not contain yet.
    let piece = |text: &str, bytes: &[u8]| {
        let entry = json!({"token": text, "logprob": -0.5, "bytes": bytes, "top_logprobs": []});
        let choice =
            json!({"index": 0, "delta": {"content": text}, "logprobs": {"content": [entry]}});
        format!("data: {}\n\n", json!({"choices": [choice]}))
    };
    let fed = |settings: &RequestSettings| {
        let mut stream = Stream::new(settings, &call(CallTask::Answer));
        stream.feed(piece("One", b"One").as_bytes()).unwrap();
        stream.feed(piece("", &[240, 159]).as_bytes()).unwrap();
        stream.so_far()
    };
    let so_far = fed(&settings(Dialect::Vllm, Some(0))).unwrap();
    assert_eq!((so_far.answer.as_str(), so_far.tokens.len()), ("One", 1));
    // With stop texts, the server may hold text back.
    let stops = RequestSettings {
        stop: vec!["END".into()],
        ..settings(Dialect::Vllm, Some(0))
    };
    assert!(fed(&stops).is_none());
}
