//! A closer look at the first answers of a session: whether distributions can be made of them.

use crate::Error;
use crate::http::CompletedCall;

use super::setup::HttpTeacher;

/// Number of answers that are inspected.
const INSPECTED: usize = 8;

/// Finds faults that all answers of a server have, in the first few of them.
#[derive(Debug, Default)]
pub(super) struct Inspection {
    inspected: usize,
}

impl Inspection {
    /// Returns what is wrong with every answer, as far as this one shows it.
    pub(super) fn fault(
        &mut self,
        teacher: &HttpTeacher,
        completed: &CompletedCall,
    ) -> Result<Option<String>, Error> {
        let Some(top_k) = teacher.client.request.logprobs else {
            return Ok(None);
        };
        let Ok(response) = &completed.result else {
            return Ok(None);
        };
        if self.inspected >= INSPECTED || teacher.encoder.is_none() {
            return Ok(None);
        }
        self.inspected += 1;
        let prompt = &completed.call.prompt;
        let Some(ids) = teacher.prompt_ids(prompt)? else {
            return Ok(None);
        };
        if let Some(servers) = &response.prompt_token_ids
            && **servers != *ids
        {
            return Ok(Some(format!(
                "the server renders the prompt of {} to {} tokens, and template and tokenizer here to {}, so distributions would belong to another text\nhint: set `template` or `tokenizer` in [teacher] to the server's, or `method = \"completions\"`",
                prompt.source,
                servers.len(),
                ids.len()
            )));
        }
        let signal = teacher.signal(&ids, &response.completion, top_k as usize);
        Ok(signal.err().map(|why| {
            format!(
                "no distributions can be made of the answer to {}: {why}\nhint: `potstill probe` says what this server can do",
                prompt.source
            )
        }))
    }
}
