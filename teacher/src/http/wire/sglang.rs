//! Responses of SGLang's `/generate`, with log-probabilities of answer and prompt as `[value, id, text]`.

use potstill_datasets::SampledToken;
use serde::Deserialize;

use super::builder::ResponseBuilder;
use super::errors::{bad_logprobs, inside, unreadable};
use super::expected::Expected;
use super::json::{count, known};
use super::token::{GenerateToken, JsonStr};
use crate::http::{Call, CallTask, Failure, PromptLogprobs, Response, TokenUsage};
use crate::reply_json;

#[derive(Deserialize)]
struct GenerateJson<'a> {
    #[serde(borrow)]
    text: Option<JsonStr<'a>>,
    #[serde(borrow)]
    meta_info: Option<MetaInfoJson<'a>>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct MetaInfoJson<'a> {
    finish_reason: Option<FinishReasonJson>,
    prompt_tokens: Option<serde_json::Value>,
    completion_tokens: Option<serde_json::Value>,
    cached_tokens: Option<serde_json::Value>,
    #[serde(borrow)]
    input_token_logprobs: Option<Vec<GenerateToken<'a>>>,
    #[serde(borrow)]
    input_top_logprobs: Option<Vec<Option<Vec<GenerateToken<'a>>>>>,
    #[serde(borrow)]
    output_token_logprobs: Option<Vec<GenerateToken<'a>>>,
    #[serde(borrow)]
    output_top_logprobs: Option<Vec<Option<Vec<GenerateToken<'a>>>>>,
}

#[derive(Deserialize)]
struct FinishReasonJson {
    #[serde(rename = "type")]
    kind: String,
}

pub(super) fn parse(expected: &Expected, call: &Call, body: &[u8]) -> Result<Response, Failure> {
    let generated: GenerateJson<'_> =
        reply_json::parse(body).map_err(|why| unreadable(expected, body, &why))?;
    if let Some(error) = generated.error.filter(|error| !error.is_null()) {
        return Err(inside(&error));
    }
    let Some(meta) = generated.meta_info else {
        return ResponseBuilder::default().finish(expected);
    };
    let usage = known(TokenUsage {
        prompt_tokens: count(meta.prompt_tokens.as_ref()),
        cached_tokens: count(meta.cached_tokens.as_ref()),
        completion_tokens: count(meta.completion_tokens.as_ref()),
        reasoning_tokens: 0,
    });
    let billed = usage.and_then(|usage| expected.believed(usage));
    let is_usage_implausible = usage.is_some() && billed.is_none();
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
        is_usage_implausible,
        ..bad_logprobs(&why)
    })?;
    let builder = ResponseBuilder {
        has_choice: true,
        content: generated.text.unwrap_or_default().0.into_owned(),
        tokens,
        finish,
        billed,
        is_usage_implausible,
        prompt_logprobs,
        ..ResponseBuilder::default()
    };
    builder.finish(expected)
}

fn sampled(
    tokens: Option<Vec<GenerateToken<'_>>>,
    tops: Option<Vec<Option<Vec<GenerateToken<'_>>>>>,
) -> Result<Vec<SampledToken>, String> {
    let (tokens, tops) = (tokens.unwrap_or_default(), tops.unwrap_or_default());
    if !tops.is_empty() && tops.len() != tokens.len() {
        return Err(format!(
            "there are {} tokens and {} lists of most likely tokens",
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
                .map(GenerateToken::token)
                .collect::<Result<_, String>>()?,
        })
    });
    tokens.collect()
}

/// Reads the distributions of a scored text. The server's lists begin at the position before `from`, without a value
/// there, as [`super::request`] requests.
fn prompt_logprobs(
    token_ids: &[u32],
    from: usize,
    target: Option<Vec<GenerateToken<'_>>>,
    tops: Option<Vec<Option<Vec<GenerateToken<'_>>>>>,
) -> Result<PromptLogprobs, String> {
    let start = from.saturating_sub(1);
    let (target, tops) = (target.unwrap_or_default(), tops.unwrap_or_default());
    let wanted = token_ids.len().saturating_sub(start);
    if target.len() != wanted || tops.len() != wanted {
        return Err(format!(
            "there are {} values and {} lists of most likely tokens for {wanted} positions of the prompt",
            target.len(),
            tops.len()
        ));
    }
    let mut positions: PromptLogprobs = vec![None; start];
    for (offset, (one, top)) in target.into_iter().zip(tops).enumerate() {
        let expected = token_ids.get(start + offset).copied();
        if expected != Some(one.id) {
            return Err(format!(
                "token {} is at position {} of the prompt, where {expected:?} was sent",
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
