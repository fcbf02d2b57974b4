//! The answers that the data has, as a teacher.

use potstill_datasets::{Answer, Provenance};

use crate::Error;
use crate::http::{CollectProgress, CollectionEnd};
use crate::protocol::{AnswerRequest, Exchange};

/// Answers that complete together.
const GROUP: usize = 1024;

/// Completes each request with the answer that it carries.
#[derive(Debug, Clone)]
pub struct GivenTeacher {
    /// Provenance of the answers.
    pub provenance: Provenance,
}

impl GivenTeacher {
    pub(crate) fn answer(
        &self,
        exchange: Exchange<'_, AnswerRequest, Answer>,
    ) -> Result<CollectionEnd, Error> {
        let mut progress = CollectProgress::default();
        loop {
            let mut group = Vec::with_capacity(GROUP);
            while group.len() < GROUP
                && let Some(request) = (exchange.next)().map_err(Error::next_request)?
            {
                let completion = request.given.ok_or_else(|| Error::Collection {
                    why: format!("{} has no answer", request.prompt.source),
                })?;
                let signal = None;
                group.push((request.ordinal, Ok(Answer { completion, signal })));
            }
            if group.is_empty() {
                return Ok(CollectionEnd::Finished);
            }
            if (exchange.stop)() {
                return Ok(CollectionEnd::Stopped);
            }
            progress.answered += group.len() as u64;
            let flow = (exchange.completed)(group).map_err(Error::completed_entries)?;
            if let Some(why) = flow.break_value() {
                return Ok(CollectionEnd::StoppedByCaller { why });
            }
            (exchange.progress)(&progress);
        }
    }
}
