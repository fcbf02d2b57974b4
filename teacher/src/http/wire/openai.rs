//! Whole responses and streamed pieces of OpenAI's protocol.

use serde::Deserialize;

use super::builder::ResponseBuilder;
use super::errors::unreadable;
use super::expected::Expected;
use super::json::{IgnoredLogprobs, LogprobsJson, ResponseJson};
use crate::http::{Failure, Response};

/// Parses a whole response.
pub(super) fn parse(expected: &Expected, body: &[u8]) -> Result<Response, Failure> {
    let mut builder = ResponseBuilder::default();
    add(expected, &mut builder, body).map_err(|failure| Failure {
        billed: failure.billed.or(builder.billed),
        ..failure
    })?;
    builder.finish(expected)
}

/// Adds one JSON text, a whole response or a piece of one, to a response.
pub(super) fn add(
    expected: &Expected,
    builder: &mut ResponseBuilder,
    json: &[u8],
) -> Result<(), Failure> {
    match expected.logprobs {
        Some(_) => builder.add::<LogprobsJson>(read(json)?),
        None => builder.add::<IgnoredLogprobs>(read(json)?),
    }
}

fn read<'a, L: Deserialize<'a>>(json: &'a [u8]) -> Result<ResponseJson<'a, L>, Failure> {
    sonic_rs::from_slice(json).map_err(|error| unreadable(json, &error))
}
