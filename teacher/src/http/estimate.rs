//! An estimate of the tokens that will be sent, and the most that the requests reserve.

use potstill_datasets::Prompt;

/// Bytes of a token where no tokenizer is known.
const BYTES_PER_TOKEN: f64 = 4.0;
/// Bytes that a template adds around a tool call, where the template is not known.
pub(crate) const UNKNOWN_MARKS: usize = 16;

/// Requests, and the most tokens of their prompts that are reserved for them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReservedTokens {
    /// Tokens of the prompts.
    pub tokens: u64,
    /// Number of requests.
    pub requests: u64,
}

/// The length of the texts that will be sent, summed up while they are read.
#[derive(Debug, Clone, Default)]
pub struct TokenEstimate {
    texts: usize,
    bytes: u64,
    /// Bytes and tokens of the texts that were tokenised.
    sample_bytes: u64,
    sample_tokens: u64,
    last: ReservedTokens,
    largest: ReservedTokens,
    all: ReservedTokens,
}

impl TokenEstimate {
    /// Adds a text of `bytes` bytes, with the number of its tokens where a tokenizer is known, and with what is reserved
    /// for its requests.
    pub fn add(&mut self, bytes: usize, tokens: Option<usize>, reserved: ReservedTokens) {
        if let Some(tokens) = tokens {
            self.sample_bytes += bytes as u64;
            self.sample_tokens += tokens as u64;
        }
        self.texts += 1;
        self.bytes += bytes as u64;
        self.last = reserved;
        self.largest.tokens = self.largest.tokens.max(reserved.tokens);
        self.largest.requests = self.largest.requests.max(reserved.requests);
        self.again();
    }

    /// Adds what is reserved for the last text once more, since the text is sent once more.
    pub fn again(&mut self) {
        self.all.tokens += self.last.tokens;
        self.all.requests += self.last.requests;
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

    /// The most that the requests for `texts` of the texts reserve, whichever texts these are.
    #[must_use]
    pub fn most(&self, texts: usize) -> ReservedTokens {
        let texts = texts as u64;
        let at_most = |all: u64, largest: u64| all.min(largest.saturating_mul(texts));
        ReservedTokens {
            tokens: at_most(self.all.tokens, self.largest.tokens),
            requests: at_most(self.all.requests, self.largest.requests),
        }
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
