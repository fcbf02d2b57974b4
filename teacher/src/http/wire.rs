//! What goes over the wire, and what comes: private to this crate.
//!
//! `request` writes a request, `reply` reads a whole answer and `stream` one that comes in pieces, `refusal` reads what
//! is not an answer. All end in the same records, whatever the dialect.

mod asked;
mod gathered;
mod refusal;
mod reply;
mod request;
mod sglang;
mod shape;
mod stream;
#[cfg(test)]
mod tests;
mod token;

use potstill_datasets::Completion;

use super::{Call, Failure, RequestSettings, Response};

pub(super) use refusal::failure;
pub(super) use stream::Stream;

/// What is posted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RequestBody {
    /// Where to, such as `/chat/completions`.
    pub(super) path: &'static str,
    /// Whether `path` lies at the host's root and not below the base URL: SGLang's `/generate`.
    pub(super) from_root: bool,
    /// The JSON.
    pub(super) json: Vec<u8>,
}

/// The request for a call, or for the rest of an answer of which there is `so_far`.
pub(super) fn request(
    settings: &RequestSettings,
    call: &Call,
    so_far: Option<&Completion>,
) -> Result<RequestBody, Failure> {
    request::request(settings, call, so_far)
}

/// Reads a whole reply of status 2xx.
pub(super) fn parse(
    settings: &RequestSettings,
    call: &Call,
    body: &[u8],
) -> Result<Response, Failure> {
    reply::parse(settings, call, body)
}

/// An answer and the rest that was asked for from its end.
pub(super) fn joined(first: Completion, rest: Completion) -> Completion {
    reply::joined(first, rest)
}
