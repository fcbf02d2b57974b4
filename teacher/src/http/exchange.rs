//! One request of a call and its outcome: a response or a failure.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use potstill_datasets::Completion;
use tokio::time::timeout;

use super::transport::{EndpointClient, OpenResponse, open};
use super::wire::RateState;
use super::{Call, Failure, FailureReason, RequestSettings, Response, TokenUsage, wire};

/// Time for which the rest of a body is awaited after the server ended the answer, so that the connection can be
/// reused.
const BODY_END_TIMEOUT: Duration = Duration::from_millis(500);

/// Size of a body that takes some tenths of a millisecond to parse, bytes.
const LARGE_BODY: usize = 64 << 10;

/// Outcome of a request.
#[derive(Debug)]
pub(super) struct RequestOutcome {
    pub(super) result: Result<Response, Failure>,
    /// Beginning of the answer, if its stream broke.
    pub(super) so_far: Option<Completion>,
    /// Token counts that the server gave before its stream broke.
    pub(super) billed: Option<TokenUsage>,
    /// Status, if a response came.
    pub(super) status: Option<u16>,
    /// Size of the decoded body, bytes.
    pub(super) bytes: u64,
    /// The state of the rate limits, as the server reports it.
    pub(super) rates: RateState,
}

impl RequestOutcome {
    fn new(result: Result<Response, Failure>) -> RequestOutcome {
        RequestOutcome {
            status: result.as_ref().err().and_then(|failure| failure.status),
            result,
            so_far: None,
            billed: None,
            rates: RateState::default(),
            bytes: 0,
        }
    }

    /// The outcome of a request of which only the failure is known.
    pub(super) fn failed(failure: Failure) -> RequestOutcome {
        RequestOutcome::new(Err(failure))
    }
}

/// Sends one request and reads its response. Nothing in the outcome contains the key.
pub(super) async fn exchange(
    client: Arc<EndpointClient>,
    settings: Arc<RequestSettings>,
    call: Arc<Call>,
    body: wire::RequestBody,
    number: u64,
) -> RequestOutcome {
    let json = Some(Bytes::from(body.json));
    let mut response = match open(&client, number, body.path, body.from_root, json).await {
        Ok(response) => response,
        Err(mut failure) => {
            if let Some(key) = client.key() {
                key.scrub_failure(&mut failure);
            }
            return RequestOutcome::failed(failure);
        }
    };
    let mut outcome = read(settings, call, &mut response).await;
    outcome.status = Some(response.status);
    outcome.rates = response.rates;
    outcome.bytes = response.bytes();
    if let Some(key) = client.key() {
        match &mut outcome.result {
            Ok(response) => key.scrub_response(response),
            Err(failure) => key.scrub_failure(failure),
        }
    }
    outcome
}

async fn read(
    settings: Arc<RequestSettings>,
    call: Arc<Call>,
    response: &mut OpenResponse,
) -> RequestOutcome {
    let is_success = (200..300).contains(&response.status);
    if is_success && settings.stream && response.is_stream {
        return read_stream(&settings, &call, response).await;
    }
    let body = match response.whole_body().await {
        Ok(body) => body,
        Err(failure) => return RequestOutcome::failed(failure),
    };
    RequestOutcome::new(if is_success {
        parse(settings, call, body).await
    } else {
        let retry_after = response.retry_after.as_deref();
        Err(wire::failure(response.status, retry_after, &body))
    })
}

/// Parses a body. A large one is parsed on the blocking pool, so that it holds up none of the threads that receive.
async fn parse(
    settings: Arc<RequestSettings>,
    call: Arc<Call>,
    body: Vec<u8>,
) -> Result<Response, Failure> {
    if body.len() < LARGE_BODY {
        return wire::parse(&settings, &call, &body);
    }
    let parse = move || wire::parse(&settings, &call, &body);
    match tokio::task::spawn_blocking(parse).await {
        Ok(result) => result,
        // The dispatcher reports a panic.
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Failure::new(
                FailureReason::Cut,
                "the collection was given up",
            )),
        },
    }
}

/// The bytes of a server's reply, for [`decode_reply`].
#[derive(Debug, Clone, Copy)]
pub struct ReplyBytes<'a> {
    /// HTTP status.
    pub status: u16,
    /// Value of the header `Retry-After`.
    pub retry_after: Option<&'a str>,
    /// Whether the reply has the content type of server-sent events.
    pub is_stream: bool,
    /// The decompressed body, in the pieces that arrived.
    pub chunks: &'a [&'a [u8]],
}

/// Decodes the reply to a request for `call`, as [`super::collect`] does for each reply that it receives. Nothing is sent
/// or read. The dialect and the API are those of `settings`.
///
/// # Errors
/// The typed failure of a reply that is no answer, whatever its bytes are.
pub fn decode_reply(
    settings: &RequestSettings,
    call: &Call,
    reply: ReplyBytes<'_>,
) -> Result<Response, Failure> {
    let is_success = (200..300).contains(&reply.status);
    if is_success && settings.stream && reply.is_stream {
        let mut stream = wire::Stream::new(settings, call);
        let mut chunks = reply.chunks.iter();
        let failure = chunks.find_map(|chunk| match stream.is_done() {
            true => None,
            false => stream.feed(chunk).err(),
        });
        return end_of_stream(stream, failure).result;
    }
    let body = reply.chunks.concat();
    if is_success {
        wire::parse(settings, call, &body)
    } else {
        Err(wire::failure(reply.status, reply.retry_after, &body))
    }
}

async fn read_stream(
    settings: &RequestSettings,
    call: &Call,
    response: &mut OpenResponse,
) -> RequestOutcome {
    let mut stream = wire::Stream::new(settings, call);
    let failure = loop {
        match response.chunk().await {
            Ok(Some(chunk)) => {
                if let Err(failure) = stream.feed(&chunk) {
                    break Some(failure);
                }
                if stream.is_done() {
                    let rest = async { while let Ok(Some(_)) = response.chunk().await {} };
                    // The answer is complete whether or not the rest arrives in time.
                    let _ = timeout(BODY_END_TIMEOUT, rest).await;
                    break None;
                }
            }
            Ok(None) => break None,
            Err(failure) => break Some(failure),
        }
    };
    end_of_stream(stream, failure)
}

/// The outcome of a stream that has ended, with or without a failure.
fn end_of_stream(stream: wire::Stream, failure: Option<Failure>) -> RequestOutcome {
    let is_cut = failure.is_some() || !stream.is_done();
    let so_far = if is_cut { stream.so_far() } else { None };
    let billed = stream.billed();
    let result = match failure {
        // Only the usage after the answer is lost: the answer is kept, and charged in full.
        Some(failure) if stream.has_answer() && is_connection_failure(failure.reason) => {
            stream.finish().map_err(|_| failure)
        }
        Some(failure) => Err(failure),
        None => stream.finish(),
    };
    let is_broken = matches!(&result, Err(f) if is_broken_stream(f.reason));
    RequestOutcome {
        so_far: so_far.filter(|_| is_broken),
        billed,
        ..RequestOutcome::new(result)
    }
}

/// Whether the connection failed, and not the server.
fn is_connection_failure(reason: FailureReason) -> bool {
    matches!(
        reason,
        FailureReason::Cut | FailureReason::IdleTimeout | FailureReason::TotalTimeout
    )
}

/// Whether a stream that failed for this reason can be continued.
fn is_broken_stream(reason: FailureReason) -> bool {
    is_connection_failure(reason) || reason == FailureReason::ErrorInside
}
