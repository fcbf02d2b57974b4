//! The replies of OpenAI's protocol and its kin, whole ones and pieces of streamed ones: what is read of them.

use potstill_datasets::{FinishReason, SampledToken};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny};

use super::token::{ABOUT_LOGPROBS, ById, Id, Nats, Sampled, Text, TopByText, token};
use crate::http::TokenUsage;

#[derive(Deserialize)]
#[serde(bound(deserialize = "L: Deserialize<'de>"))]
pub(super) struct Shape<'a, L> {
    #[serde(borrow)]
    pub(super) choices: Option<Vec<Choice<'a, L>>>,
    pub(super) usage: Option<Usage>,
    #[serde(borrow)]
    pub(super) model: Option<Text<'a>>,
    #[serde(borrow)]
    pub(super) system_fingerprint: Option<Text<'a>>,
    pub(super) error: Option<serde_json::Value>,
    /// vLLM's chat has these here, its completions in the choice.
    pub(super) prompt_logprobs: Option<Vec<Option<ById>>>,
    pub(super) prompt_token_ids: Option<Vec<Id>>,
    /// llama-server's own count, which streams without usage have too.
    pub(super) timings: Option<Timings>,
}

#[derive(Deserialize)]
#[serde(bound(deserialize = "L: Deserialize<'de>"))]
pub(super) struct Choice<'a, L> {
    pub(super) index: Option<u64>,
    #[serde(borrow)]
    pub(super) message: Option<Part<'a>>,
    #[serde(borrow)]
    pub(super) delta: Option<Part<'a>>,
    #[serde(borrow)]
    pub(super) text: Option<Text<'a>>,
    pub(super) logprobs: Option<L>,
    #[serde(borrow)]
    pub(super) finish_reason: Option<Text<'a>>,
    pub(super) token_ids: Option<Vec<Id>>,
    pub(super) prompt_logprobs: Option<Vec<Option<ById>>>,
    pub(super) prompt_token_ids: Option<Vec<Id>>,
    pub(super) error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
pub(super) struct Part<'a> {
    #[serde(borrow)]
    pub(super) content: Option<Text<'a>>,
    #[serde(borrow)]
    pub(super) reasoning_content: Option<Text<'a>>,
    #[serde(borrow)]
    pub(super) reasoning: Option<Text<'a>>,
    #[serde(borrow)]
    pub(super) refusal: Option<Text<'a>>,
    pub(super) tool_calls: Option<Vec<ToolPiece>>,
}

#[derive(Deserialize)]
pub(super) struct ToolPiece {
    pub(super) index: Option<usize>,
    pub(super) id: Option<String>,
    pub(super) function: Option<FunctionPiece>,
}

#[derive(Deserialize)]
pub(super) struct FunctionPiece {
    pub(super) name: Option<String>,
    #[serde(default, deserialize_with = "arguments")]
    pub(super) arguments: String,
}

/// Text as the protocol has it, or an object as some servers send it.
fn arguments<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match serde_json::Value::deserialize(deserializer)? {
        serde_json::Value::String(text) => text,
        serde_json::Value::Null => String::new(),
        other => other.to_string(),
    })
}

#[derive(Deserialize)]
struct RawLogprobs<'a> {
    content: Option<Vec<Sampled>>,
    reasoning_content: Option<Vec<Sampled>>,
    #[serde(borrow)]
    tokens: Option<Vec<Text<'a>>>,
    token_logprobs: Option<Vec<Nats>>,
    top_logprobs: Option<Vec<Option<TopByText>>>,
}

/// Log-probabilities in the chat's shape or the completions': either server may answer in either.
pub(super) struct Logprobs(Vec<SampledToken>);

impl From<Logprobs> for Vec<SampledToken> {
    fn from(logprobs: Logprobs) -> Vec<SampledToken> {
        logprobs.0
    }
}

/// Log-probabilities that nobody asked for, whatever they are.
#[derive(Deserialize)]
pub(super) struct Skipped(IgnoredAny);

impl From<Skipped> for Vec<SampledToken> {
    fn from(_: Skipped) -> Vec<SampledToken> {
        Vec::new()
    }
}

impl<'de> Deserialize<'de> for Logprobs {
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
                    "{ABOUT_LOGPROBS}{} tokens, {} values and {} lists of the likeliest",
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
        Ok(Logprobs(tokens))
    }
}

/// A count, which some servers write as 12.0.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Count(pub(super) u64);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Option::<f64>::deserialize(deserializer)?.unwrap_or(0.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "as saturates, and tokens are counted far below 2^53"
        )]
        Ok(Count(value as u64))
    }
}

/// Usage as OpenAI, DeepSeek, vLLM, SGLang and OpenRouter write it.
#[derive(Debug, Deserialize)]
pub(super) struct Usage {
    #[serde(default)]
    prompt_tokens: Count,
    #[serde(default)]
    completion_tokens: Count,
    #[serde(default)]
    total_tokens: Count,
    prompt_tokens_details: Option<PromptDetails>,
    completion_tokens_details: Option<CompletionDetails>,
    /// DeepSeek's.
    prompt_cache_hit_tokens: Option<Count>,
    /// SGLang's.
    reasoning_tokens: Option<Count>,
}

#[derive(Debug, Deserialize)]
struct PromptDetails {
    #[serde(default)]
    cached_tokens: Count,
}

#[derive(Debug, Deserialize)]
struct CompletionDetails {
    #[serde(default)]
    reasoning_tokens: Count,
}

impl Usage {
    /// In our terms; `None` where all is 0, which says nothing.
    pub(super) fn billed(&self) -> Option<TokenUsage> {
        let details = self.completion_tokens_details.as_ref();
        let reasoning = details.map(|details| details.reasoning_tokens);
        let reasoning = reasoning.or(self.reasoning_tokens).unwrap_or_default().0;
        let cached = self.prompt_tokens_details.as_ref();
        let cached = cached.map(|details| details.cached_tokens);
        let cached = cached.filter(|cached| cached.0 > 0);
        let cached = cached
            .or(self.prompt_cache_hit_tokens)
            .unwrap_or_default()
            .0;
        let prompt = self.prompt_tokens.0;
        let mut completion = self.completion_tokens.0;
        // Some count reasoning beside the answer and not within it; the total tells.
        if reasoning > 0 && self.total_tokens.0 == prompt + completion + reasoning {
            completion += reasoning;
        }
        let billed = TokenUsage {
            prompt_tokens: prompt,
            cached_tokens: cached.min(prompt),
            completion_tokens: completion,
            reasoning_tokens: reasoning.min(completion),
        };
        (prompt + completion > 0).then_some(billed)
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Timings {
    cache_n: Option<Count>,
    prompt_n: Option<Count>,
    predicted_n: Option<Count>,
}

impl Timings {
    pub(super) fn billed(&self) -> Option<TokenUsage> {
        let cached = self.cache_n.unwrap_or_default().0;
        let prompt = self.prompt_n?.0 + cached;
        let completion = self.predicted_n?.0;
        (prompt + completion > 0).then_some(TokenUsage {
            prompt_tokens: prompt,
            cached_tokens: cached,
            completion_tokens: completion,
            reasoning_tokens: 0,
        })
    }
}

/// The usage alone, of a reply that cannot be read otherwise.
#[derive(Deserialize)]
pub(super) struct UsageAlone {
    pub(super) usage: Option<Usage>,
}

/// Why an answer ended, in our terms.
pub(super) fn finish_reason(name: Option<&str>) -> FinishReason {
    match name {
        None | Some("stop" | "eos" | "eos_token" | "end_turn" | "stop_sequence" | "stop_token") => {
            FinishReason::Stop
        }
        Some("length" | "max_tokens") => FinishReason::Length,
        Some("tool_calls" | "function_call") => FinishReason::ToolCalls,
        Some("content_filter") => FinishReason::ContentFilter,
        // Whatever it is, the answer did not come to its end by itself.
        Some(_) => FinishReason::Error,
    }
}
