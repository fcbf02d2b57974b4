//! Properties that the response to a call has to have.

use potstill_datasets::Reasoning;

use crate::http::{Call, CallTask, RequestSettings};

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
}

impl Expected {
    pub(super) fn new(settings: &RequestSettings, call: &Call) -> Expected {
        let score = match &call.task {
            CallTask::Score { token_ids, .. } => Some(token_ids.clone()),
            CallTask::Answer | CallTask::AnswerIds(_) => None,
        };
        Expected {
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
}
