//! Published answers with their prompts, one at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use potstill_datasets::{
    Completion, Encoded, Error, Prompt, Reasoning, Rows, encode_answer, read_shard, shards,
};

use super::Text;
use super::prompts::Prompts;
use crate::stages::score::own_ids;

/// An answer and what it answers.
pub(super) struct Pair {
    pub(super) prompt: Arc<Prompt>,
    pub(super) completion: Completion,
    /// Whether its token ids are of the tokenizer here.
    own_ids: bool,
}

impl Pair {
    /// The pair as tokens.
    pub(super) fn encode(
        &self,
        text: &Text,
        reasoning: Option<&Reasoning>,
    ) -> Result<Encoded, Error> {
        encode_answer(
            &text.tokenizer,
            &text.template,
            reasoning,
            &self.prompt,
            &self.completion,
            self.own_ids,
        )
    }

    /// Bytes of its text.
    pub(super) fn bytes(&self) -> usize {
        let reasoning = self.completion.reasoning.as_ref();
        super::bytes(&self.prompt) + self.completion.answer.len() + reasoning.map_or(0, String::len)
    }
}

/// All pairs, in the order of both folders, a batch in memory at a time.
pub(super) struct Pairs {
    tokenizer: String,
    shards: std::vec::IntoIter<PathBuf>,
    /// The shard at hand, and for each of its provenances whether its token ids are ours.
    shard: Option<(Rows<Completion>, Vec<bool>)>,
    prompts: Prompts,
    /// The prompt of the answer at hand.
    held: Option<Arc<Prompt>>,
}

impl Pairs {
    /// # Errors
    /// Where a folder cannot be listed.
    pub(super) fn open(completions: &Path, prompts: &Path, text: &Text) -> anyhow::Result<Pairs> {
        Ok(Pairs {
            tokenizer: text.tokenizer.fingerprint().to_owned(),
            shards: shards(completions)?.into_iter(),
            shard: None,
            prompts: Prompts::open(prompts)?,
            held: None,
        })
    }

    fn read(&mut self) -> anyhow::Result<Option<Pair>> {
        loop {
            if let Some((rows, own)) = &mut self.shard
                && let Some(completion) = rows.next().transpose()?
            {
                let own_ids = own.get(completion.provenance as usize) == Some(&true);
                return Ok(Some(Pair {
                    prompt: self.prompt_of(&completion)?,
                    completion,
                    own_ids,
                }));
            }
            let Some(path) = self.shards.next() else {
                return Ok(None);
            };
            self.shard = Some((read_shard(&path)?, own_ids(&path, &self.tokenizer)?));
        }
    }

    /// Prompts and answers are in the same order.
    fn prompt_of(&mut self, completion: &Completion) -> anyhow::Result<Arc<Prompt>> {
        loop {
            if let Some(prompt) = self.held.as_ref().filter(|p| p.id == completion.prompt_id) {
                return Ok(prompt.clone());
            }
            let next = self.prompts.next().transpose()?;
            let next =
                next.with_context(|| format!("`prompts/` has no prompt {}", completion.prompt_id))?;
            self.held = Some(Arc::new(next));
        }
    }
}

impl Iterator for Pairs {
    type Item = anyhow::Result<Pair>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

/// The answers of the data with their prompts, of which there are none without a prompt.
pub(super) fn given(imported: &potstill_datasets::Imported) -> impl Iterator<Item = Pair> {
    let mut prompts = imported.prompts.iter().peekable();
    imported.answers.iter().filter_map(move |answer| {
        while prompts.next_if(|p| p.id != answer.prompt_id).is_some() {}
        Some(Pair {
            prompt: Arc::new((*prompts.peek()?).clone()),
            completion: answer.clone(),
            own_ids: false,
        })
    })
}
