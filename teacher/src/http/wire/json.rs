//! JSON forms of OpenAI's protocol and its variants: the fields that are read of whole responses and streamed pieces.

use potstill_datasets::{FinishReason, SampledToken};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny};

use super::token::{
    ABOUT_LOGPROBS, JsonStr, Logprob, SampledEntry, TokenId, TopById, TopByText, token,
};
use crate::http::TokenUsage;

#[derive(Deserialize)]
#[serde(bound(deserialize = "L: Deserialize<'de>"))]
pub(super) struct ResponseJson<'a, L> {
    #[serde(borrow)]
    pub(super) choices: Option<Vec<ChoiceJson<'a, L>>>,
    pub(super) usage: Option<UsageJson>,
    #[serde(borrow)]
    pub(super) model: Option<JsonStr<'a>>,
    #[serde(borrow)]
    pub(super) system_fingerprint: Option<JsonStr<'a>>,
    pub(super) error: Option<serde_json::Value>,
    /// vLLM's chat API has these here, its completions API in the choice.
    pub(super) prompt_logprobs: Option<Vec<Option<TopById>>>,
    pub(super) prompt_token_ids: Option<Vec<TokenId>>,
    /// llama-server's own counts, which streams without usage have too.
    pub(super) timings: Option<TimingsJson>,
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
    pub(super) error: Option<serde_json::Value>,
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
    Ok(match serde_json::Value::deserialize(deserializer)? {
        serde_json::Value::String(text) => text,
        serde_json::Value::Null => String::new(),
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

/// A number of tokens, which some servers write as 12.0.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TokenCount(pub(super) u64);

impl<'de> Deserialize<'de> for TokenCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Option::<f64>::deserialize(deserializer)?.unwrap_or(0.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "as saturates, and tokens are counted far below 2^53"
        )]
        Ok(TokenCount(value as u64))
    }
}

/// Usage in the forms of OpenAI, DeepSeek, vLLM, SGLang and OpenRouter.
#[derive(Debug, Deserialize)]
pub(super) struct UsageJson {
    #[serde(default)]
    prompt_tokens: TokenCount,
    #[serde(default)]
    completion_tokens: TokenCount,
    #[serde(default)]
    total_tokens: TokenCount,
    prompt_tokens_details: Option<PromptDetails>,
    completion_tokens_details: Option<CompletionDetails>,
    /// Field of DeepSeek.
    prompt_cache_hit_tokens: Option<TokenCount>,
    /// Field of SGLang.
    reasoning_tokens: Option<TokenCount>,
}

#[derive(Debug, Deserialize)]
struct PromptDetails {
    #[serde(default)]
    cached_tokens: TokenCount,
}

#[derive(Debug, Deserialize)]
struct CompletionDetails {
    #[serde(default)]
    reasoning_tokens: TokenCount,
}

impl UsageJson {
    /// The token counts; `None` if they are all 0, since servers write 0 for unknown counts.
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
        // Some servers do not include reasoning in the completion tokens; the total shows it.
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
pub(super) struct TimingsJson {
    cache_n: Option<TokenCount>,
    prompt_n: Option<TokenCount>,
    predicted_n: Option<TokenCount>,
}

impl TimingsJson {
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

/// The usage alone, of a response that cannot be parsed otherwise.
#[derive(Deserialize)]
pub(super) struct UsageOnlyJson {
    pub(super) usage: Option<UsageJson>,
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
