//! SGLang's own `/generate`: log-probabilities as `[value, id, text]`, of the prompt too.

use potstill_datasets::SampledToken;
use serde::Deserialize;

use super::asked::Asked;
use super::gathered::{Gathered, Whole, bad_logprobs};
use super::shape::Count;
use super::token::{Text, Triple};
use super::{refusal, reply};
use crate::http::{Call, CallTask, Failure, PromptLogprobs, Response, TokenUsage};

#[derive(Deserialize)]
struct Generated<'a> {
    #[serde(borrow)]
    text: Option<Text<'a>>,
    #[serde(borrow)]
    meta_info: Option<Meta<'a>>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Meta<'a> {
    finish_reason: Option<Finish>,
    #[serde(default)]
    prompt_tokens: Count,
    #[serde(default)]
    completion_tokens: Count,
    #[serde(default)]
    cached_tokens: Count,
    #[serde(borrow)]
    input_token_logprobs: Option<Vec<Triple<'a>>>,
    #[serde(borrow)]
    input_top_logprobs: Option<Vec<Option<Vec<Triple<'a>>>>>,
    #[serde(borrow)]
    output_token_logprobs: Option<Vec<Triple<'a>>>,
    #[serde(borrow)]
    output_top_logprobs: Option<Vec<Option<Vec<Triple<'a>>>>>,
}

#[derive(Deserialize)]
struct Finish {
    #[serde(rename = "type")]
    kind: String,
}

pub(super) fn parse(asked: &Asked, call: &Call, body: &[u8]) -> Result<Response, Failure> {
    let generated: Generated<'_> =
        sonic_rs::from_slice(body).map_err(|error| reply::unreadable(body, &error))?;
    if let Some(error) = generated.error.filter(|error| !error.is_null()) {
        return Err(refusal::inside(&error));
    }
    let Some(meta) = generated.meta_info else {
        return Gathered::default().reply(asked);
    };
    let billed = TokenUsage {
        prompt_tokens: meta.prompt_tokens.0,
        cached_tokens: meta.cached_tokens.0.min(meta.prompt_tokens.0),
        completion_tokens: meta.completion_tokens.0,
        reasoning_tokens: 0,
    };
    let billed = (billed.prompt_tokens + billed.completion_tokens > 0).then_some(billed);
    let finish = meta.finish_reason.map(|finish| finish.kind);
    let scored = match &call.task {
        CallTask::Score {
            token_ids, from, ..
        } => prompt_logprobs(
            token_ids,
            *from,
            meta.input_token_logprobs,
            meta.input_top_logprobs,
        )
        .map(Some),
        CallTask::Answer | CallTask::AnswerIds(_) => Ok(None),
    };
    let answered = sampled(meta.output_token_logprobs, meta.output_top_logprobs);
    let read = scored.and_then(|scored| Ok((scored, answered?)));
    let (prompt_logprobs, tokens) = read.map_err(|why| Failure {
        billed,
        ..bad_logprobs(why)
    })?;
    let whole = Whole {
        content: generated.text.unwrap_or_default().0.into_owned(),
        tokens,
        finish,
        billed,
        prompt_logprobs,
    };
    Gathered::from(whole).reply(asked)
}

fn sampled(
    tokens: Option<Vec<Triple<'_>>>,
    tops: Option<Vec<Option<Vec<Triple<'_>>>>>,
) -> Result<Vec<SampledToken>, String> {
    let (tokens, tops) = (tokens.unwrap_or_default(), tops.unwrap_or_default());
    if !tops.is_empty() && tops.len() != tokens.len() {
        return Err(format!(
            "{} tokens and {} lists of the likeliest",
            tokens.len(),
            tops.len()
        ));
    }
    let mut tops = tops.into_iter();
    let tokens = tokens.into_iter().map(|triple| {
        let one = triple.token()?;
        let top = tops.next().flatten().unwrap_or_default();
        Ok(SampledToken {
            bytes: one.bytes,
            id: one.id,
            logprob: one.logprob,
            top: top
                .into_iter()
                .map(Triple::token)
                .collect::<Result<_, String>>()?,
        })
    });
    tokens.collect()
}

/// The server's lists begin at the position before `from`, where it has nothing, as [`super::request`] asks.
fn prompt_logprobs(
    token_ids: &[u32],
    from: usize,
    realised: Option<Vec<Triple<'_>>>,
    tops: Option<Vec<Option<Vec<Triple<'_>>>>>,
) -> Result<PromptLogprobs, String> {
    let start = from.saturating_sub(1);
    let (realised, tops) = (realised.unwrap_or_default(), tops.unwrap_or_default());
    let wanted = token_ids.len().saturating_sub(start);
    if realised.len() != wanted || tops.len() != wanted {
        return Err(format!(
            "{} values and {} lists of the likeliest for {wanted} positions of the prompt",
            realised.len(),
            tops.len()
        ));
    }
    let mut positions: PromptLogprobs = vec![None; start];
    for (offset, (one, top)) in realised.into_iter().zip(tops).enumerate() {
        let expected = token_ids.get(start + offset).copied();
        if expected != Some(one.id) {
            return Err(format!(
                "token {} at position {} of the prompt, where {expected:?} was sent",
                one.id,
                start + offset
            ));
        }
        let Some(top) = top.filter(|_| offset > 0) else {
            positions.push(None);
            continue;
        };
        let mut pairs = Vec::with_capacity(top.len() + 1);
        for triple in &top {
            pairs.push(triple.pair()?);
        }
        if !pairs.iter().any(|&(id, _)| id == one.id) {
            pairs.push(one.pair()?);
        }
        positions.push(Some(pairs));
    }
    Ok(positions)
}
