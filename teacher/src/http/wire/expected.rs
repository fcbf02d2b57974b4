//! Properties that the response to a call has to have.

use potstill_datasets::Reasoning;

use crate::http::{Call, CallTask, RequestSettings, TokenUsage};

/// Largest number of tokens that a server can report.
const MAX_TOKENS: u64 = 1 << 32;

/// Largest number of reasoning tokens that is believed. Some servers do not count them towards the requested limit.
const MAX_REASONING_TOKENS: u64 = 1 << 18;

/// The parts of a request that parsing its response needs.
#[derive(Debug, Clone)]
pub(super) struct Expected {
    pub(super) prompt_id: String,
    pub(super) sample_index: u32,
    /// Number of most likely tokens that were requested; `None` if log-probabilities are not read.
    pub(super) logprobs: Option<u32>,
    /// Marks around reasoning inside the answer's text.
    pub(super) marks: Reasoning,
    /// Whether there are stop texts. The server may then hold back text whose tokens it has sent already, until it is
    /// known that no stop text begins there.
    pub(super) has_stops: bool,
    /// Token ids of the text to score.
    pub(super) score: Option<Vec<u32>>,
    /// Largest number of tokens of the prompt that is believed. Servers add texts of their own to a prompt.
    max_prompt_tokens: u64,
    /// Largest number of tokens of the answer that is believed. Servers count tokens that end an answer.
    max_completion_tokens: u64,
}

impl Expected {
    pub(super) fn new(settings: &RequestSettings, call: &Call) -> Expected {
        let score = match &call.task {
            CallTask::Score { token_ids, .. } => Some(token_ids.clone()),
            CallTask::Answer | CallTask::AnswerIds(_) => None,
        };
        let max_tokens = match &score {
            Some(_) => 1,
            None => settings.max_tokens.map_or(MAX_TOKENS, u64::from),
        };
        Expected {
            max_prompt_tokens: 4 * u64::from(call.max_prompt_tokens) + (1 << 16),
            max_completion_tokens: (max_tokens + max_tokens / 4 + 64).min(MAX_TOKENS),
            prompt_id: call.prompt.id.clone(),
            sample_index: call.sample_index,
            logprobs: settings.logprobs.filter(|_| score.is_none()),
            marks: settings.reasoning.clone().unwrap_or_else(|| Reasoning {
                open: "<think>\n".to_owned(),
                close: "\n</think>\n\n".to_owned(),
            }),
            has_stops: !settings.stop.is_empty(),
            score,
        }
    }

    /// The token counts of a server if they can be right. Counts that cannot be, such as −5, 2⁶⁴ − 1, or more tokens of
    /// an answer than were requested, are unknown.
    pub(super) fn believed(&self, usage: TokenUsage) -> Option<TokenUsage> {
        let believed = usage.prompt_tokens <= self.max_prompt_tokens.min(MAX_TOKENS)
            && usage
                .completion_tokens
                .saturating_sub(usage.reasoning_tokens)
                <= self.max_completion_tokens
            && usage.cached_tokens <= MAX_TOKENS
            && usage.reasoning_tokens <= MAX_REASONING_TOKENS;
        believed.then(|| TokenUsage {
            cached_tokens: usage.cached_tokens.min(usage.prompt_tokens),
            reasoning_tokens: usage.reasoning_tokens.min(usage.completion_tokens),
            ..usage
        })
    }
}
