//! What was asked.

use potstill_datasets::Reasoning;

use crate::http::{Call, CallTask, RequestSettings};

/// What was asked, as far as reading the reply needs it.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) prompt_id: String,
    pub(super) sample_index: u32,
    /// How many likeliest tokens; `None` where log-probabilities are not read.
    pub(super) logprobs: Option<u32>,
    /// Marks around reasoning that comes inline.
    pub(super) marks: Reasoning,
    /// Whether the server may hold text back that is in the tokens already, until it knows that no stop begins there.
    pub(super) has_stops: bool,
    /// The text to score.
    pub(super) score: Option<Vec<u32>>,
}

impl Asked {
    pub(super) fn new(settings: &RequestSettings, call: &Call) -> Asked {
        Asked {
            prompt_id: call.prompt.id.clone(),
            sample_index: call.sample_index,
            logprobs: settings
                .logprobs
                .filter(|_| !matches!(call.task, CallTask::Score { .. })),
            marks: settings.reasoning.clone().unwrap_or_else(|| Reasoning {
                open: "<think>\n".to_owned(),
                close: "\n</think>\n\n".to_owned(),
            }),
            has_stops: !settings.stop.is_empty(),
            score: match &call.task {
                CallTask::Score { token_ids, .. } => Some(token_ids.clone()),
                CallTask::Answer | CallTask::AnswerIds(_) => None,
            },
        }
    }
}
