//! Published answers with their prompts, one at a time.

use std::path::Path;
use std::sync::Arc;

use crate::error::Error;
use crate::import::Imported;
use crate::reader::FolderRows;
use crate::records::{Completion, Prompt};

/// An answer and its prompt.
#[derive(Debug, Clone)]
pub struct PromptedAnswer {
    /// The prompt, shared by all of its answers.
    pub prompt: Arc<Prompt>,
    /// The answer.
    pub completion: Completion,
    /// Whether the token ids of `completion`, if there are any, belong to the tokenizer that was named.
    pub own_ids: bool,
}

/// The rows of a folder of answers with their prompts; a batch of each is in memory at a time.
pub struct PromptedAnswers {
    completions: FolderRows<Completion>,
    prompts: FolderRows<Prompt>,
    /// The prompt of the last answer.
    prompt: Option<Arc<Prompt>>,
    /// Fingerprint of the tokenizer.
    tokenizer: String,
}

impl PromptedAnswers {
    /// Reads the folders `completions` and `prompts`, whose rows are in the same order of prompts. `tokenizer` is the
    /// fingerprint of the tokenizer for [`PromptedAnswer::own_ids`].
    ///
    /// # Errors
    /// As [`FolderRows::open`]. An item is an error as in [`read_shard`](crate::read_shard), and
    /// [`Error::PromptMissing`] if an answer's prompt is not in `prompts` or stands in another place.
    pub fn open(
        completions: &Path,
        prompts: &Path,
        tokenizer: &str,
    ) -> Result<PromptedAnswers, Error> {
        Ok(PromptedAnswers {
            completions: FolderRows::open(completions)?,
            prompts: FolderRows::open(prompts)?,
            prompt: None,
            tokenizer: tokenizer.to_owned(),
        })
    }

    fn answered(&mut self, completion: Completion) -> Result<PromptedAnswer, Error> {
        let footer = self.completions.footer();
        let provenance = footer.and_then(|f| f.provenance.get(completion.provenance as usize));
        let own_ids = provenance.is_some_and(|p| p.tokenizer == self.tokenizer);
        loop {
            if let Some(prompt) = &self.prompt
                && prompt.id == completion.prompt_id
            {
                return Ok(PromptedAnswer {
                    prompt: prompt.clone(),
                    completion,
                    own_ids,
                });
            }
            let Some(prompt) = self.prompts.next().transpose()? else {
                return Err(Error::PromptMissing {
                    prompt_id: completion.prompt_id,
                });
            };
            self.prompt = Some(Arc::new(prompt));
        }
    }
}

impl Iterator for PromptedAnswers {
    type Item = Result<PromptedAnswer, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let completion = self.completions.next()?;
        Some(completion.and_then(|completion| self.answered(completion)))
    }
}

impl Imported {
    /// The answers with their prompts, of which each is copied.
    pub fn prompted_answers(&self) -> impl Iterator<Item = PromptedAnswer> {
        let mut prompts = self.prompts.iter().peekable();
        self.answers.iter().filter_map(move |answer| {
            while prompts.next_if(|p| p.id != answer.prompt_id).is_some() {}
            Some(PromptedAnswer {
                prompt: Arc::new((*prompts.peek()?).clone()),
                completion: answer.clone(),
                own_ids: false,
            })
        })
    }
}
