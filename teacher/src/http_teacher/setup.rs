//! The server, what is known of its tokenizer, and the list of its requests.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use potstill_datasets::{
    Answer, Completion, Encoded, Error as DataError, Prompt, Provenance, Signal,
};

use crate::Error;
use crate::encoder::TextEncoder;
use crate::http::{
    self, Api, ClientSettings, RequestLog, RequestSettings, ReservedTokens, ScoringWindow,
    Spellings, Spending, TokenEstimate,
};

/// Tokens that a server's template may add to the tokens of a prompt as rendered here.
const TEMPLATE_SLACK: u32 = 16;
/// Tokens of the system prompt that an unknown template may add of its own.
const UNKNOWN_TEMPLATE: usize = 64;

/// A model behind a server, or behind several.
#[derive(Debug)]
pub struct HttpTeacher {
    /// Settings of the client for answers.
    pub client: ClientSettings,
    /// The model's tokenizer and template, where they are known.
    pub encoder: Option<TextEncoder>,
    /// Longest prompt and answer together, tokens.
    pub context: Option<u32>,
    /// Provenance of the answers.
    pub provenance: Provenance,
    /// Ids by spelling, for servers that give no token ids; made when they are first needed.
    spellings: OnceLock<Spellings>,
    log: Option<RequestLog>,
}

impl HttpTeacher {
    /// A teacher that is asked with these settings. Nothing is sent.
    #[must_use]
    pub fn new(
        client: ClientSettings,
        encoder: Option<TextEncoder>,
        context: Option<u32>,
        provenance: Provenance,
    ) -> HttpTeacher {
        HttpTeacher {
            client,
            encoder,
            context,
            provenance,
            spellings: OnceLock::new(),
            log: None,
        }
    }

    /// Opens the list of requests, which has to be done before anything is sent.
    ///
    /// # Errors
    /// As [`RequestLog::open`].
    pub fn open_log(&mut self, path: &Path, stage: &str) -> Result<&RequestLog, Error> {
        Ok(self.log.insert(RequestLog::open(path, stage)?))
    }

    pub(super) fn log(&self) -> Result<&RequestLog, Error> {
        self.log.as_ref().ok_or_else(|| Error::Collection {
            why: "the list of requests is not open".to_owned(),
        })
    }

    /// Settings of the client for requests like `request`, after the spending so far.
    pub(super) fn client_for(&self, request: RequestSettings, spent: Spending) -> ClientSettings {
        ClientSettings {
            request,
            spent,
            ..self.client.clone()
        }
    }

    /// Settings of a request that scores: one token, which a server generates at least.
    pub(super) fn scoring_request(&self) -> RequestSettings {
        let request = &self.client.request;
        RequestSettings {
            api: Api::Completions,
            max_tokens: Some(1),
            temperature: (!request.reasoning_model).then_some(1.0),
            top_p: None,
            top_k: None,
            min_p: None,
            repetition_penalty: None,
            stop: Vec::new(),
            logprobs: None,
            stream: false,
            ..request.clone()
        }
    }

    /// Token ids of a prompt, where the tokenizer is known.
    pub(super) fn prompt_ids(&self, prompt: &Prompt) -> Result<Option<Arc<[u32]>>, Error> {
        let Some(encoder) = &self.encoder else {
            return Ok(None);
        };
        match encoder.prompt_ids(prompt) {
            Ok(ids) => Ok(Some(ids)),
            Err(source) => Err(Error::Encode {
                prompt: prompt.source.clone(),
                source,
            }),
        }
    }

    /// Upper bound of a prompt's tokens at the server, given its ids here.
    pub(super) fn max_prompt_tokens(&self, prompt: &Prompt, ids: Option<&[u32]>) -> u32 {
        let tokens = match (ids, self.client.request.api) {
            (Some(ids), Api::Completions) => ids.len() as u32,
            (Some(ids), Api::Chat) => ids.len() as u32 + TEMPLATE_SLACK,
            // A token has at least one byte.
            (None, _) => {
                let marks = http::UNKNOWN_MARKS * prompt.messages.len();
                let bytes = http::prompt_bytes(prompt) + UNKNOWN_TEMPLATE + marks;
                bytes.min(u32::MAX as usize) as u32
            }
        };
        self.context.map_or(tokens, |context| tokens.min(context))
    }

    /// Adds a prompt to an estimate of what will be sent.
    ///
    /// # Errors
    /// If the prompt cannot be encoded.
    pub fn estimate_prompt(
        &self,
        estimate: &mut TokenEstimate,
        prompt: &Prompt,
    ) -> Result<(), Error> {
        let ids = self.prompt_ids(prompt)?;
        let reserved = match self.too_long(ids.as_deref()) {
            // The prompt is not sent.
            Some(_) => ReservedTokens::default(),
            None => ReservedTokens {
                tokens: u64::from(self.max_prompt_tokens(prompt, ids.as_deref())),
                requests: 1,
            },
        };
        let tokens = ids.map(|ids| ids.len());
        estimate.add(http::prompt_bytes(prompt), tokens, reserved);
        Ok(())
    }

    /// Adds an answer that will be scored to an estimate of what will be sent; `window` is that of
    /// [`ScoringOptions`](crate::ScoringOptions).
    pub fn estimate_answer(
        &self,
        estimate: &mut TokenEstimate,
        prompt: &Prompt,
        completion: &Completion,
        own_ids: bool,
        window: Option<usize>,
    ) {
        let reasoning = completion.reasoning.as_ref().map_or(0, String::len);
        let bytes = http::prompt_bytes(prompt) + completion.answer.len() + reasoning;
        // A text that cannot be rendered is not sent.
        let encoded = self.encode(prompt, completion, own_ids);
        let windows = match encoded.map(Result::ok) {
            Some(Some(encoded)) => self.windows(&encoded, window),
            _ => Vec::new(),
        };
        let tokens: usize = windows.iter().map(|w| w.end - w.start).sum();
        let reserved = ReservedTokens {
            tokens: tokens as u64,
            requests: windows.len() as u64,
        };
        estimate.add(bytes, Some(tokens), reserved);
    }

    pub(super) fn encode(
        &self,
        prompt: &Prompt,
        completion: &Completion,
        own_ids: bool,
    ) -> Option<Result<Encoded, DataError>> {
        let encoder = self.encoder.as_ref()?;
        Some(encoder.answer(prompt, completion, own_ids))
    }

    /// The parts in which a text is sent to be scored.
    pub(super) fn windows(&self, encoded: &Encoded, window: Option<usize>) -> Vec<ScoringWindow> {
        let tokens = encoded.token_ids.len();
        // One position is left for the token that a server generates.
        let context = self.context.map(|context| context as usize - 1);
        let size = window.or(context).unwrap_or(tokens).max(2);
        let from = encoded.loss_mask.iter().position(|loss| *loss);
        http::scoring_windows(tokens, from.unwrap_or(tokens).max(1), size, size / 2)
    }

    /// Adds the distributions of an answer that was journaled without them, if answers come with log-probabilities.
    pub(crate) fn complete(&self, prompt: &Prompt, answer: &mut Answer) -> Result<(), String> {
        let Some(top_k) = self.client.request.logprobs else {
            return Ok(());
        };
        let ids = self.prompt_ids(prompt).map_err(|error| match &error {
            Error::Encode { source, .. } => format!("{error}: {source}"),
            _ => error.to_string(),
        })?;
        let ids = ids.ok_or("there is no tokenizer")?;
        let completion = &answer.completion;
        let mut signal = self.signal(&ids, completion, top_k as usize)?;
        signal.prompt_id.clone_from(&completion.prompt_id);
        signal.sample_index = completion.sample_index;
        signal.provenance = completion.provenance;
        signal.validate().map_err(|e| e.to_string())?;
        answer.signal = Some(signal);
        Ok(())
    }

    /// The distributions of an answer, from the alternatives that came with its tokens.
    pub(super) fn signal(
        &self,
        prompt_ids: &[u32],
        completion: &Completion,
        top_k: usize,
    ) -> Result<Signal, String> {
        let encoder = self.encoder.as_ref().ok_or("there is no tokenizer")?;
        let tokenizer = encoder.tokenizer();
        let lacks_ids = completion
            .tokens
            .iter()
            .any(|token| token.id.is_none() || token.top.iter().any(|top| top.id.is_none()));
        let spellings = || Spellings::new(tokenizer);
        let spellings = lacks_ids.then(|| self.spellings.get_or_init(spellings));
        http::answer_signal(
            tokenizer.vocab_size(),
            spellings,
            prompt_ids,
            completion,
            top_k,
        )
    }
}
