//! JSON forms of OpenAI's protocol and its variants: the fields that are read of whole responses and streamed pieces.

use potstill_datasets::{FinishReason, SampledToken};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny};
use serde_json::Value;

use super::token::{
    ABOUT_LOGPROBS, JsonStr, Logprob, SampledEntry, TokenId, TopById, TopByText, token,
};
use crate::http::TokenUsage;

#[derive(Deserialize)]
#[serde(bound(deserialize = "L: Deserialize<'de>"))]
pub(super) struct ResponseJson<'a, L> {
    #[serde(borrow)]
    pub(super) choices: Option<Vec<ChoiceJson<'a, L>>>,
    pub(super) usage: Option<Value>,
    #[serde(borrow)]
    pub(super) model: Option<JsonStr<'a>>,
    #[serde(borrow)]
    pub(super) system_fingerprint: Option<JsonStr<'a>>,
    pub(super) error: Option<Value>,
    /// vLLM's chat API has these here, its completions API in the choice.
    pub(super) prompt_logprobs: Option<Vec<Option<TopById>>>,
    pub(super) prompt_token_ids: Option<Vec<TokenId>>,
    /// llama-server's own counts, which streams without usage have too.
    pub(super) timings: Option<Value>,
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "L: Deserialize<'de>"))]
pub(super) struct ChoiceJson<'a, L> {
    pub(super) index: Option<u64>,
    #[serde(borrow)]
    pub(super) message: Option<MessageJson<'a>>,
    #[serde(borrow)]
    pub(super) delta: Option<MessageJson<'a>>,
    #[serde(borrow)]
    pub(super) text: Option<JsonStr<'a>>,
    pub(super) logprobs: Option<L>,
    #[serde(borrow)]
    pub(super) finish_reason: Option<JsonStr<'a>>,
    pub(super) token_ids: Option<Vec<TokenId>>,
    pub(super) prompt_logprobs: Option<Vec<Option<TopById>>>,
    pub(super) prompt_token_ids: Option<Vec<TokenId>>,
    pub(super) error: Option<Value>,
}

#[derive(Deserialize)]
pub(super) struct MessageJson<'a> {
    #[serde(borrow)]
    pub(super) content: Option<JsonStr<'a>>,
    #[serde(borrow)]
    pub(super) reasoning_content: Option<JsonStr<'a>>,
    #[serde(borrow)]
    pub(super) reasoning: Option<JsonStr<'a>>,
    #[serde(borrow)]
    pub(super) refusal: Option<JsonStr<'a>>,
    pub(super) tool_calls: Option<Vec<ToolCallJson>>,
}

#[derive(Deserialize)]
pub(super) struct ToolCallJson {
    pub(super) index: Option<usize>,
    pub(super) id: Option<String>,
    pub(super) function: Option<FunctionJson>,
}

#[derive(Deserialize)]
pub(super) struct FunctionJson {
    pub(super) name: Option<String>,
    #[serde(default, deserialize_with = "arguments")]
    pub(super) arguments: String,
}

/// Reads the arguments of a tool call: a string as in the protocol, or an object as some servers send.
fn arguments<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::String(text) => text,
        Value::Null => String::new(),
        other => other.to_string(),
    })
}

#[derive(Deserialize)]
struct RawLogprobs<'a> {
    content: Option<Vec<SampledEntry>>,
    reasoning_content: Option<Vec<SampledEntry>>,
    #[serde(borrow)]
    tokens: Option<Vec<JsonStr<'a>>>,
    token_logprobs: Option<Vec<Logprob>>,
    top_logprobs: Option<Vec<Option<TopByText>>>,
}

/// Log-probabilities in the form of the chat API or of the completions API; servers use either form in both.
pub(super) struct LogprobsJson(Vec<SampledToken>);

impl From<LogprobsJson> for Vec<SampledToken> {
    fn from(logprobs: LogprobsJson) -> Vec<SampledToken> {
        logprobs.0
    }
}

/// Log-probabilities that were not requested, in any form.
#[derive(Deserialize)]
pub(super) struct IgnoredLogprobs(IgnoredAny);

impl From<IgnoredLogprobs> for Vec<SampledToken> {
    fn from(_: IgnoredLogprobs) -> Vec<SampledToken> {
        Vec::new()
    }
}

impl<'de> Deserialize<'de> for LogprobsJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = RawLogprobs::deserialize(deserializer)?;
        let mut tokens: Vec<SampledToken> = Vec::new();
        for sampled in [raw.reasoning_content, raw.content].into_iter().flatten() {
            tokens.extend(sampled.into_iter().map(|sampled| sampled.0));
        }
        if let Some(texts) = raw.tokens {
            let logprobs = raw.token_logprobs.unwrap_or_default();
            let tops = raw.top_logprobs.unwrap_or_default();
            if logprobs.len() != texts.len() || (!tops.is_empty() && tops.len() != texts.len()) {
                return Err(D::Error::custom(format!(
                    "{ABOUT_LOGPROBS}there are {} tokens, {} values and {} lists of most likely tokens",
                    texts.len(),
                    logprobs.len(),
                    tops.len()
                )));
            }
            let mut tops = tops.into_iter();
            for (text, logprob) in texts.iter().zip(logprobs) {
                let one = token(&text.0, logprob, None, None).map_err(D::Error::custom)?;
                tokens.push(SampledToken {
                    bytes: one.bytes,
                    id: one.id,
                    logprob: one.logprob,
                    top: tops.next().flatten().unwrap_or_default().0,
                });
            }
        }
        Ok(LogprobsJson(tokens))
    }
}

/// Token counts of OpenAI, DeepSeek, vLLM, SGLang and OpenRouter: the field `usage`. They are as the server gives them,
/// and [`super::expected::Expected::believed`] checks them. An answer is not refused because its usage has an odd form.
pub(super) fn usage(usage: Option<&Value>) -> Option<TokenUsage> {
    let usage = usage.filter(|usage| !usage.is_null())?;
    if !usage.is_object() {
        return Some(TokenUsage {
            prompt_tokens: NOT_A_COUNT,
            ..TokenUsage::default()
        });
    }
    let at = |pointer: &str| count(usage.pointer(pointer));
    let first_above_0 = |pointers: [&str; 2]| {
        let counts = pointers.map(at);
        counts.into_iter().find(|&n| n > 0).unwrap_or(0)
    };
    let reasoning = first_above_0([
        "/completion_tokens_details/reasoning_tokens",
        "/reasoning_tokens",
    ]);
    let prompt = at("/prompt_tokens");
    let mut completion = at("/completion_tokens");
    // Some servers do not include reasoning in the completion tokens; the total shows it.
    let with_reasoning = completion.saturating_add(reasoning);
    if reasoning > 0 && at("/total_tokens") == prompt.saturating_add(with_reasoning) {
        completion = with_reasoning;
    }
    known(TokenUsage {
        prompt_tokens: prompt,
        cached_tokens: first_above_0([
            "/prompt_tokens_details/cached_tokens",
            "/prompt_cache_hit_tokens",
        ]),
        completion_tokens: completion,
        reasoning_tokens: reasoning,
    })
}

/// Counts of llama-server's field `timings`.
pub(super) fn timings(timings: Option<&Value>) -> Option<TokenUsage> {
    let at = |name: &str| timings?.get(name);
    let cached = count(at("cache_n"));
    known(TokenUsage {
        prompt_tokens: count(Some(at("prompt_n")?)).saturating_add(cached),
        cached_tokens: cached,
        completion_tokens: count(Some(at("predicted_n")?)),
        reasoning_tokens: 0,
    })
}

/// `None` for counts that are all 0, since servers write 0 for unknown counts.
pub(super) fn known(usage: TokenUsage) -> Option<TokenUsage> {
    (usage.prompt_tokens > 0 || usage.completion_tokens > 0).then_some(usage)
}

/// Stands for a value that is no number of tokens, such as −5, 0.5 or a text.
const NOT_A_COUNT: u64 = u64::MAX;

/// A number of tokens, which some servers write as 12.0; 0 if it is null or missing.
pub(super) fn count(value: Option<&Value>) -> u64 {
    let Some(value) = value.filter(|value| !value.is_null()) else {
        return 0;
    };
    let whole = |number: &f64| number.fract() == 0.0 && (0.0..=9e15).contains(number);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a whole number from 0 to 9e15"
    )]
    let from_float = || value.as_f64().filter(whole).map(|number| number as u64);
    value.as_u64().or_else(from_float).unwrap_or(NOT_A_COUNT)
}

/// The usage alone, of a response that cannot be parsed otherwise.
#[derive(Deserialize)]
pub(super) struct UsageOnlyJson {
    pub(super) usage: Option<Value>,
}

/// Translates the `finish_reason` of a server.
pub(super) fn finish_reason(name: Option<&str>) -> FinishReason {
    match name {
        None | Some("stop" | "eos" | "eos_token" | "end_turn" | "stop_sequence" | "stop_token") => {
            FinishReason::Stop
        }
        Some("length" | "max_tokens") => FinishReason::Length,
        Some("tool_calls" | "function_call") => FinishReason::ToolCalls,
        Some("content_filter") => FinishReason::ContentFilter,
        // For any other reason the answer did not end by itself.
        Some(_) => FinishReason::Error,
    }
}
