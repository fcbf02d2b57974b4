//! Targets: replies of servers, of every dialect.

use std::sync::Arc;

use potstill_datasets::{Message, Prompt, Role};
use potstill_teacher::http::{
    Api, Call, CallTask, Dialect, Failure, ReplyBytes, RequestSettings, Response, decode_reply,
};

/// The dialects, by the lowest bits of an input's first byte.
pub const DIALECTS: [Dialect; 5] = [
    Dialect::Openai,
    Dialect::Vllm,
    Dialect::Sglang,
    Dialect::LlamaServer,
    Dialect::LlamaCppPython,
];
/// Bit of the first byte: log-probabilities are requested.
pub const LOGPROBS: u8 = 8;
/// Bit of the first byte: the reply is a stream.
pub const STREAM: u8 = 16;
/// Bit of the first byte: the prompt is given as token ids.
pub const IDS: u8 = 32;
/// Bit of the first byte: distributions over a text are requested.
pub const SCORE: u8 = 64;

/// Input: a byte of the constants above, then a body of status 200.
pub fn replies(data: &[u8]) {
    if let Some((&kind, body)) = data.split_first() {
        let first = decode(kind, 200, None, &[body]);
        check(&first);
        // Chunks may begin and end inside characters and lines.
        for size in [1, 7] {
            let chunks: Vec<&[u8]> = body.chunks(size).collect();
            // The text of a failure may name a line, and lines that come before a body in chunks are not counted.
            let kind_of = |failure: &Failure| (failure.reason, failure.billed);
            match (&first, &decode(kind, 200, None, &chunks)) {
                (Err(first), Err(second)) => assert_eq!(kind_of(first), kind_of(second)),
                (first, second) => assert_eq!(first, second),
            }
        }
    }
}

/// Input: a byte as in [`replies`], a byte for the status, the length of `Retry-After` as a byte, `Retry-After`, and a body.
pub fn error_replies(data: &[u8]) {
    let &[kind, status, length, ref rest @ ..] = data else {
        return;
    };
    let (header, body) = rest.split_at(rest.len().min(usize::from(length)));
    let header = std::str::from_utf8(header).ok();
    let status = 300 + u16::from(status) * 2;
    let first = decode(kind, status, header, &[body]);
    check(&first);
    // The wait until a date depends on the time of the call.
    let timeless = |result: Result<Response, Failure>| {
        let failure = result.expect_err("an answer of an error status");
        (failure.reason, failure.message, failure.billed)
    };
    let second = decode(kind, status, header, &[body]);
    assert_eq!(timeless(first), timeless(second));
}

fn decode(
    kind: u8,
    status: u16,
    retry_after: Option<&str>,
    chunks: &[&[u8]],
) -> Result<Response, Failure> {
    let settings = RequestSettings {
        model: "m".into(),
        dialect: DIALECTS[usize::from(kind & 7) % DIALECTS.len()],
        api: match kind & IDS {
            0 => Api::Chat,
            _ => Api::Completions,
        },
        reasoning_model: false,
        max_tokens: Some(64),
        temperature: Some(0.5),
        top_p: None,
        top_k: None,
        min_p: None,
        repetition_penalty: None,
        stop: Vec::new(),
        seed: None,
        logprobs: (kind & LOGPROBS != 0).then_some(2),
        stream: kind & STREAM != 0,
        reasoning: None,
        template_arguments: Default::default(),
    };
    let token_ids = vec![504, 3575, 282, 4649, 314];
    let messages = vec![Message::text(Role::User, "What is the capital of Japan?")];
    let call = Call {
        number: 7,
        prompt: Arc::new(Prompt::new(messages, None, None, "test:1".into())),
        sample_index: 3,
        task: match (kind & SCORE, kind & IDS) {
            (0, 0) => CallTask::Answer,
            (0, _) => CallTask::AnswerIds(token_ids),
            _ => CallTask::Score {
                token_ids,
                top_k: 2,
                from: 2,
            },
        },
        max_prompt_tokens: 64,
    };
    let reply = ReplyBytes {
        status,
        retry_after,
        is_stream: settings.stream,
        chunks,
    };
    decode_reply(&settings, &call, reply)
}

/// Checks what the caller of a reply may rely on.
fn check(decoded: &Result<Response, Failure>) {
    let billed = match decoded {
        Ok(response) => {
            let completion = &response.completion;
            assert_eq!(completion.sample_index, 3);
            for token in &completion.tokens {
                let top = token.top.iter().map(|top| top.logprob);
                for logprob in top.chain([token.logprob]) {
                    assert!(logprob <= 0.0, "a log-probability of {logprob}");
                }
            }
            response.billed
        }
        Err(failure) => {
            assert!(failure.message.len() <= 500, "{}", failure.message.len());
            assert!(
                !failure
                    .message
                    .contains(|c: char| c.is_control() && c != '\n')
            );
            if let Some(seconds) = failure.retry_after_seconds {
                assert!(seconds.is_finite() && seconds >= 0.0, "{seconds}");
            }
            failure.billed
        }
    };
    let most = 1 << 33;
    assert!(
        billed.is_none_or(|billed| billed.total() <= most),
        "{billed:?}"
    );
}
