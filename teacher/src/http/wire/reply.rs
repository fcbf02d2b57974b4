//! Whole replies, and answers that were asked for in two parts.

use potstill_datasets::{Completion, Usage};
use serde::Deserialize;

use super::asked::Asked;
use super::gathered::{Gathered, bad_logprobs};
use super::shape::{Logprobs, Shape, Skipped, UsageAlone};
use super::token::ABOUT_LOGPROBS;
use super::{refusal, request, sglang};
use crate::http::{Call, Failure, FailureReason, RequestSettings, Response, TokenUsage};

pub(super) fn parse(
    settings: &RequestSettings,
    call: &Call,
    body: &[u8],
) -> Result<Response, Failure> {
    if request::is_generate(settings, call) {
        return sglang::parse(&Asked::new(settings, call), call, body);
    }
    whole(&Asked::new(settings, call), body)
}

pub(super) fn whole(asked: &Asked, body: &[u8]) -> Result<Response, Failure> {
    let mut gathered = Gathered::default();
    take(asked, &mut gathered, body).map_err(|failure| Failure {
        billed: failure.billed.or(gathered.billed),
        ..failure
    })?;
    gathered.reply(asked)
}

/// Reads one JSON text of a reply: all of it, or a piece.
pub(super) fn take(asked: &Asked, gathered: &mut Gathered, json: &[u8]) -> Result<(), Failure> {
    match asked.logprobs {
        Some(_) => gathered.take::<Logprobs>(read(json)?),
        None => gathered.take::<Skipped>(read(json)?),
    }
}

fn read<'a, L: Deserialize<'a>>(json: &'a [u8]) -> Result<Shape<'a, L>, Failure> {
    sonic_rs::from_slice(json).map_err(|error| unreadable(json, &error))
}

/// Why it cannot be read, with the usage if that can be.
pub(super) fn unreadable(body: &[u8], error: &sonic_rs::Error) -> Failure {
    let billed = usage_of(body);
    let text = error.to_string();
    let failure = if let Some((_, why)) = text.split_once(ABOUT_LOGPROBS) {
        // What follows is the parser's picture of the place.
        bad_logprobs(why.lines().next().unwrap_or(why).to_owned())
    } else if has_bare_nan(body) {
        bad_logprobs("NaN or Infinity in the reply".to_owned())
    } else {
        let what = std::str::from_utf8(body).map_or("not UTF-8", |_| "not what a reply is");
        Failure {
            status: Some(200),
            ..Failure::new(
                FailureReason::Malformed,
                refusal::shown(&format!("the reply is {what}: {text}")),
            )
        }
    };
    Failure { billed, ..failure }
}

fn usage_of(body: &[u8]) -> Option<TokenUsage> {
    let alone: UsageAlone = sonic_rs::from_slice(body).ok()?;
    alone.usage?.billed()
}

/// Whether JSON has NaN or Infinity outside of its texts, as Python writes them.
fn has_bare_nan(body: &[u8]) -> bool {
    let mut in_text = false;
    let mut at = 0;
    while let Some(&byte) = body.get(at) {
        match byte {
            b'\\' if in_text => at += 1,
            b'"' => in_text = !in_text,
            b'N' | b'I' if !in_text => {
                let rest = body.get(at..).unwrap_or_default();
                if rest.starts_with(b"NaN") || rest.starts_with(b"Infinity") {
                    return true;
                }
            }
            _ => {}
        }
        at += 1;
    }
    false
}

/// An answer and the rest that was asked for from its end.
pub(super) fn joined(first: Completion, rest: Completion) -> Completion {
    // The first part ended while it thought, if it has reasoning and no answer.
    let is_thinking = first.reasoning.is_some() && first.answer.is_empty();
    let (more, answer) = match (is_thinking, rest.reasoning) {
        (true, None) => (Some(rest.answer), String::new()),
        (true, thought) => (thought, rest.answer),
        (false, None) => (None, rest.answer),
        // A mark in the middle of an answer is its text.
        (false, Some(thought)) => (None, thought + &rest.answer),
    };
    let has_all = !first.tokens.is_empty() && !rest.tokens.is_empty();
    let mut tokens = first.tokens;
    tokens.extend(rest.tokens);
    if !has_all {
        tokens.clear();
    }
    let mut tool_calls = first.tool_calls;
    tool_calls.extend(rest.tool_calls);
    let answered = first.usage.completion_tokens;
    Completion {
        reasoning: match (first.reasoning, more) {
            (Some(thought), Some(more)) => Some(thought + &more),
            (thought, more) => thought.or(more),
        },
        answer: first.answer + &answer,
        tool_calls,
        finish_reason: rest.finish_reason,
        usage: Usage {
            prompt_tokens: first.usage.prompt_tokens,
            completion_tokens: answered.saturating_add(rest.usage.completion_tokens),
        },
        tokens,
        prompt_id: first.prompt_id,
        sample_index: first.sample_index,
        provenance: first.provenance,
    }
}
