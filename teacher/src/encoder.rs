//! Encoding of text as a teacher's tokens.

use std::sync::{Arc, Mutex, PoisonError};

use potstill_datasets::{
    ChatTemplate, Completion, Encoded, Error, Prompt, Reasoning, Tokenizer, encode_answer,
    prompt_ids,
};

/// A tokenizer, a chat template and the marks of reasoning.
#[derive(Debug)]
pub struct TextEncoder {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    reasoning: Option<Reasoning>,
    /// Id and token ids of the last prompt, since the samples of a prompt follow one another.
    last_prompt: Mutex<Option<(String, Arc<[u32]>)>>,
}

impl TextEncoder {
    /// An encoder of these parts; without `reasoning`, everything in an answer belongs to the answer.
    #[must_use]
    pub fn new(
        tokenizer: Tokenizer,
        template: ChatTemplate,
        reasoning: Option<Reasoning>,
    ) -> TextEncoder {
        TextEncoder {
            tokenizer,
            template,
            reasoning,
            last_prompt: Mutex::new(None),
        }
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The template that prompts are rendered with.
    #[must_use]
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// The marks of reasoning.
    #[must_use]
    pub fn reasoning(&self) -> Option<&Reasoning> {
        self.reasoning.as_ref()
    }

    /// Token ids of a prompt as the teacher sees it when it has to answer. A prompt that is asked for several times in a
    /// row is rendered and tokenised once.
    ///
    /// # Errors
    /// Those of [`prompt_ids`](potstill_datasets::prompt_ids).
    pub fn prompt_ids(&self, prompt: &Prompt) -> Result<Arc<[u32]>, Error> {
        let mut last = self
            .last_prompt
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((id, ids)) = last.as_ref()
            && *id == prompt.id
        {
            return Ok(ids.clone());
        }
        let ids: Arc<[u32]> = prompt_ids(
            &self.tokenizer,
            &self.template,
            &prompt.messages,
            prompt.tools.as_deref(),
            self.reasoning.as_ref(),
        )?
        .into();
        *last = Some((prompt.id.clone(), ids.clone()));
        Ok(ids)
    }

    /// Token ids of a prompt with its answer, with loss on the answer alone. `own_ids` says that the answer's token ids,
    /// where it has them, belong to this tokenizer; otherwise its text is encoded.
    ///
    /// # Errors
    /// Those of [`encode_answer`].
    pub fn answer(
        &self,
        prompt: &Prompt,
        completion: &Completion,
        own_ids: bool,
    ) -> Result<Encoded, Error> {
        encode_answer(
            &self.tokenizer,
            &self.template,
            self.reasoning.as_ref(),
            prompt,
            completion,
            own_ids,
        )
    }
}
