//! Distributions over given answers from a server, through the log-probabilities that it gives for prompts.
//!
//! A text that is longer than the window is sent in parts, and its distributions are put together when the last part is
//! completed.

use std::cell::RefCell;
use std::collections::HashMap;

use potstill_datasets::{Distributions, Encoded, Entry, Failed, NO_SIGNAL, PromptedAnswer, Signal};

use super::setup::HttpTeacher;
use crate::Error;
use crate::http::{
    self, Call, CallEvent, CallTask, CollectionEnd, CompletedCall, PromptLogprobs, ScoringWindow,
};
use crate::protocol::{CompletedEntries, Exchange, ScoreRequest, ScoringOptions};

/// The low bits of a call's number, which say which part of the text it is; the others are the unit's ordinal.
const PART_BITS: u32 = 16;

impl HttpTeacher {
    pub(crate) fn score(
        &self,
        options: &ScoringOptions,
        exchange: Exchange<'_, ScoreRequest, Signal>,
    ) -> Result<CollectionEnd, Error> {
        let log = self.log()?;
        let client = self.client_for(self.scoring_request(), log.spent());
        let texts = RefCell::new(TextsInFlight {
            teacher: self,
            options,
            vocabulary: self
                .encoder
                .as_ref()
                .map_or(0, |e| e.tokenizer().vocab_size()),
            calls: Vec::new(),
            texts: HashMap::new(),
            unsent: Vec::new(),
        });
        let end = http::collect(
            &client,
            &mut || {
                let mut texts = texts.borrow_mut();
                loop {
                    if let Some(call) = texts.calls.pop() {
                        return Ok(Some(call));
                    }
                    match (exchange.next)()? {
                        Some(request) => texts.add(&request),
                        None => return Ok(None),
                    }
                }
            },
            &|reservation| log.sent(reservation),
            &mut |events| {
                let mut texts = texts.borrow_mut();
                let mut entries = std::mem::take(&mut texts.unsent);
                for event in events {
                    match event {
                        CallEvent::Attempt(attempt) => log.ended(attempt)?,
                        CallEvent::Completed(completed) => {
                            entries.extend(texts.complete_part(*completed));
                        }
                    }
                }
                log.sync()?;
                (exchange.completed)(entries)
            },
            exchange.progress,
            exchange.stop,
        )?;
        // The end of the collection has its own reason.
        let _ =
            (exchange.completed)(texts.into_inner().unsent).map_err(Error::completed_entries)?;
        Ok(end)
    }
}

/// A text whose parts are asked for.
struct SplitText {
    prompt_id: String,
    sample_index: u32,
    encoded: Encoded,
    received: Vec<(ScoringWindow, PromptLogprobs)>,
    /// Windows of the parts that are not completed, by the number of their call.
    open: HashMap<u64, ScoringWindow>,
    /// Reason and message of the last part that failed.
    failure: Option<(String, String)>,
}

/// Texts that were begun, and calls for their parts.
struct TextsInFlight<'a> {
    teacher: &'a HttpTeacher,
    options: &'a ScoringOptions,
    vocabulary: usize,
    /// Calls for further parts of the last text, the next one last.
    calls: Vec<Call>,
    /// Texts by ordinal.
    texts: HashMap<u32, SplitText>,
    /// Texts that failed before they were sent; they complete with the next group.
    unsent: CompletedEntries<Signal>,
}

impl TextsInFlight<'_> {
    fn add(&mut self, request: &ScoreRequest) {
        let answer = &request.answer;
        let completion = &answer.completion;
        let (encoded, windows) = match self.encode(answer) {
            Ok(text) => text,
            Err(message) => {
                let failed = Failed {
                    prompt_id: completion.prompt_id.clone(),
                    sample_index: completion.sample_index,
                    reason: NO_SIGNAL.to_owned(),
                    message,
                };
                return self.unsent.push((request.ordinal, Err(failed)));
            }
        };
        let mut open = HashMap::new();
        for (part, window) in windows.into_iter().enumerate().rev() {
            let number = u64::from(request.ordinal) << PART_BITS | part as u64;
            let ids = encoded.token_ids.get(window.start..window.end);
            let token_ids = ids.unwrap_or_default().to_vec();
            self.calls.push(Call {
                number,
                prompt: answer.prompt.clone(),
                sample_index: completion.sample_index,
                max_prompt_tokens: token_ids.len() as u32,
                task: CallTask::Score {
                    from: window.from - window.start,
                    top_k: self.options.signals.top_k as u32,
                    token_ids,
                },
            });
            open.insert(number, window);
        }
        let text = SplitText {
            prompt_id: completion.prompt_id.clone(),
            sample_index: completion.sample_index,
            encoded,
            received: Vec::new(),
            open,
            failure: None,
        };
        self.texts.insert(request.ordinal, text);
    }

    /// The text of an answer with its prompt, and its parts; at least one.
    fn encode(&self, answer: &PromptedAnswer) -> Result<(Encoded, Vec<ScoringWindow>), String> {
        let PromptedAnswer {
            prompt,
            completion,
            own_ids,
        } = answer;
        let encoded = self.teacher.encode(prompt, completion, *own_ids);
        let encoded = encoded.ok_or("there is no tokenizer")?;
        let encoded = encoded.map_err(|error| error.to_string())?;
        let windows = self.teacher.windows(&encoded, self.options.window);
        match windows.is_empty() {
            true => Err("the answer is empty".to_owned()),
            false => Ok((encoded, windows)),
        }
    }

    /// Adds a part to its text. Returns the text's entry if this was the last part.
    fn complete_part(&mut self, completed: CompletedCall) -> Option<(u32, Entry<Signal>)> {
        let number = completed.call.number;
        let ordinal = (number >> PART_BITS) as u32;
        let text = self.texts.get_mut(&ordinal)?;
        let window = text.open.remove(&number)?;
        match completed.result.map(|response| response.prompt_logprobs) {
            Ok(Some(logprobs)) => text.received.push((window, logprobs)),
            Ok(None) => {
                let why = "the server gave no log-probabilities of the prompt".to_owned();
                text.failure = Some((NO_SIGNAL.to_owned(), why));
            }
            Err(failure) => text.failure = Some((failure.reason.name(), failure.message)),
        }
        if !text.open.is_empty() {
            return None;
        }
        let text = self.texts.remove(&ordinal)?;
        let (prompt_id, sample_index) = (text.prompt_id.clone(), text.sample_index);
        let entry = match text.failure.clone() {
            Some(failure) => Err(failure),
            None => text
                .join(self.options.signals.top_k, self.vocabulary)
                .map_err(|why| (NO_SIGNAL.to_owned(), why)),
        };
        let entry = entry.map_err(|(reason, message)| Failed {
            prompt_id,
            sample_index,
            reason,
            message,
        });
        Some((ordinal, entry))
    }
}

impl SplitText {
    /// The distributions of the whole text.
    fn join(mut self, top_k: usize, vocabulary: usize) -> Result<Signal, String> {
        let Encoded {
            token_ids,
            loss_mask,
        } = self.encoded;
        self.received.sort_by_key(|(window, _)| window.start);
        let logprobs = http::join_scoring_windows(token_ids.len(), self.received)?;
        let from = loss_mask.iter().position(|loss| *loss);
        let from = from.ok_or("the answer is empty")?.max(1);
        let whole = http::prompt_signal(
            &self.prompt_id,
            self.sample_index,
            &token_ids,
            from,
            &logprobs,
            top_k,
            vocabulary,
        )?;
        // Tokens that the template puts after the answer carry no loss.
        let positions: Vec<usize> = whole.loss_positions().collect();
        let mut rows = Distributions::default();
        for (row, at) in whole.rows.rows().zip(positions) {
            if loss_mask.get(at) == Some(&true) {
                rows.push_row(row);
            }
        }
        let signal = Signal {
            rows,
            prompt_id: self.prompt_id,
            sample_index: self.sample_index,
            token_ids,
            loss_mask,
            provenance: 0,
        };
        signal.validate().map_err(|e| e.to_string())?;
        Ok(signal)
    }
}
