//! Wire formats: requests and responses of each dialect, private to this crate.
//!
//! `request` builds a request. `openai` and `sglang` parse whole responses, `stream` parses streamed ones, and
//! `errors` parses error responses. All dialects end in the same records.

mod builder;
mod errors;
mod expected;
mod json;
mod openai;
mod rates;
mod request;
mod sglang;
mod stream;
#[cfg(test)]
mod tests;
mod token;

use potstill_datasets::{Completion, Usage};

use self::expected::Expected;
use super::{Call, Failure, RequestSettings, Response};

pub(super) use self::errors::failure;
pub(super) use self::rates::{RateState, rate_state};
pub(super) use self::request::{RequestBody, request};
pub(super) use self::stream::Stream;

/// Parses a whole response of status 2xx.
pub(super) fn parse(
    settings: &RequestSettings,
    call: &Call,
    body: &[u8],
) -> Result<Response, Failure> {
    let expected = Expected::new(settings, call);
    if request::uses_generate(settings, call) {
        return sglang::parse(&expected, call, body);
    }
    openai::parse(&expected, body)
}

/// Joins an answer and its continuation.
pub(super) fn joined(first: Completion, rest: Completion) -> Completion {
    // A first part with reasoning and no answer ended within the reasoning.
    let is_reasoning = first.reasoning.is_some() && first.answer.is_empty();
    let (more_reasoning, answer) = match (is_reasoning, rest.reasoning) {
        (true, None) => (Some(rest.answer), String::new()),
        (true, reasoning) => (reasoning, rest.answer),
        (false, None) => (None, rest.answer),
        // A mark of reasoning in the middle of an answer is text of the answer.
        (false, Some(reasoning)) => (None, reasoning + &rest.answer),
    };
    let has_all_tokens = !first.tokens.is_empty() && !rest.tokens.is_empty();
    let mut tokens = first.tokens;
    tokens.extend(rest.tokens);
    if !has_all_tokens {
        tokens.clear();
    }
    let mut tool_calls = first.tool_calls;
    tool_calls.extend(rest.tool_calls);
    let completion_tokens = first.usage.completion_tokens;
    Completion {
        reasoning: match (first.reasoning, more_reasoning) {
            (Some(reasoning), Some(more)) => Some(reasoning + &more),
            (reasoning, more) => reasoning.or(more),
        },
        answer: first.answer + &answer,
        tool_calls,
        finish_reason: rest.finish_reason,
        usage: Usage {
            prompt_tokens: first.usage.prompt_tokens,
            completion_tokens: completion_tokens.saturating_add(rest.usage.completion_tokens),
        },
        tokens,
        prompt_id: first.prompt_id,
        sample_index: first.sample_index,
        provenance: first.provenance,
    }
}
