//! An estimate of the tokens that will be sent.

use potstill_datasets::Prompt;

/// One text in this many is tokenised; the tokens of the others are estimated from their bytes.
const TOKENISED: usize = 64;
/// Bytes of a token where no tokenizer is known.
const BYTES_PER_TOKEN: f64 = 4.0;
/// Bytes that a template adds around a tool call, where the template is not known.
pub(crate) const UNKNOWN_MARKS: usize = 16;

/// The length of the texts that will be sent, summed up while they are read.
#[derive(Debug, Clone, Default)]
pub struct TokenEstimate {
    texts: usize,
    bytes: u64,
    /// Bytes and tokens of the texts that were tokenised.
    sample_bytes: u64,
    sample_tokens: u64,
}

impl TokenEstimate {
    /// Adds a text of `bytes` bytes. `tokens` counts its tokens, where that is possible; only one text in 64 is counted.
    ///
    /// # Errors
    /// Those of `tokens`.
    pub fn add<E>(
        &mut self,
        bytes: usize,
        tokens: impl FnOnce() -> Result<Option<usize>, E>,
    ) -> Result<(), E> {
        let bytes = bytes as u64;
        if self.texts.is_multiple_of(TOKENISED)
            && let Some(tokens) = tokens()?
        {
            self.sample_bytes += bytes;
            self.sample_tokens += tokens as u64;
        }
        self.texts += 1;
        self.bytes += bytes;
        Ok(())
    }

    /// Estimates the tokens of `texts` texts of the mean length.
    #[must_use]
    pub fn tokens(&self, texts: usize) -> u64 {
        let bytes = self.bytes as f64 / self.texts.max(1) as f64;
        let tokens = match self.sample_tokens {
            0 => bytes / BYTES_PER_TOKEN,
            tokens => bytes * tokens as f64 / self.sample_bytes.max(1) as f64,
        };
        (tokens * texts as f64).round() as u64
    }
}

/// Number of bytes of everything in a prompt that a template writes.
#[must_use]
pub fn prompt_bytes(prompt: &Prompt) -> usize {
    let messages = prompt.messages.iter().map(|message| {
        let calls = message.tool_calls.iter();
        let calls = calls.map(|c| c.name.len() + c.arguments.len() + UNKNOWN_MARKS);
        let reasoning = message.reasoning.as_ref().map_or(0, String::len);
        message.content.len() + reasoning + calls.sum::<usize>()
    });
    messages.sum::<usize>() + prompt.tools.as_ref().map_or(0, String::len)
}
