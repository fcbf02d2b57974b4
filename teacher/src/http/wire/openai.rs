//! Whole responses and streamed pieces of OpenAI's protocol.

use serde::Deserialize;

use super::builder::ResponseBuilder;
use super::errors::unreadable;
use super::expected::Expected;
use super::json::{IgnoredLogprobs, LogprobsJson, ResponseJson};
use crate::http::{Failure, Response};
use crate::reply_json;

/// Parses a whole response.
pub(super) fn parse(expected: &Expected, body: &[u8]) -> Result<Response, Failure> {
    let mut builder = ResponseBuilder::default();
    add(expected, &mut builder, body)?;
    builder.finish(expected)
}

/// Adds one JSON text, a whole response or a piece of one, to a response.
pub(super) fn add(
    expected: &Expected,
    builder: &mut ResponseBuilder,
    json: &[u8],
) -> Result<(), Failure> {
    let added = match expected.logprobs {
        Some(_) => read(expected, json).and_then(|j| builder.add::<LogprobsJson>(expected, j)),
        None => read(expected, json).and_then(|j| builder.add::<IgnoredLogprobs>(expected, j)),
    };
    added.map_err(|failure| Failure {
        billed: failure.billed.or(builder.billed),
        is_usage_implausible: failure.is_usage_implausible || builder.is_usage_implausible,
        ..failure
    })
}

fn read<'a, L: Deserialize<'a>>(
    expected: &Expected,
    body: &'a [u8],
) -> Result<ResponseJson<'a, L>, Failure> {
    reply_json::parse(body).map_err(|why| unreadable(expected, body, &why))
}
