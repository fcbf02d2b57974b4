//! A local teacher's side of the protocol: requests are taken in batches, and a batch completes together.

use std::ops::ControlFlow;

use potstill_datasets::{Answer, Encoded, Provenance, Signal};
use potstill_model::Sampling;

use super::checkpoint::{Ask, Local};
use super::score::Scoring;
use super::text::ScoringText;
use crate::Error;
use crate::http::{CallbackError, CollectProgress, CollectionEnd};
use crate::protocol::{AnswerRequest, CompletedEntries, Exchange, ScoreRequest, ScoringOptions};

/// Rows of logits held at once while texts are scored.
const SCORE_ROWS: usize = 256;

/// A checkpoint with its settings for answers.
#[derive(Debug)]
pub struct LocalTeacher {
    /// The checkpoint.
    pub local: Local,
    /// Number of answers that are sampled together.
    pub batch: usize,
    /// Sampling settings of the answers.
    pub sampling: Sampling,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Seed of all answers.
    pub seed: u64,
    /// The distributions to keep of each answer; `None` for text alone.
    pub signals: Option<ScoringOptions>,
}

impl ScoringOptions {
    fn scoring(&self) -> Scoring {
        Scoring {
            signals: self.signals.clone(),
            seed: self.seed,
            chunk_rows: SCORE_ROWS,
        }
    }
}

impl LocalTeacher {
    /// Provenance of the answers, for the footers of their shards.
    #[must_use]
    pub fn provenance(&self) -> Provenance {
        let signals = self.signals.as_ref();
        let temperatures = signals.map_or(&[][..], |options| &options.signals.temperatures);
        self.local
            .provenance(&self.sampling, &self.stop, self.seed, temperatures)
    }

    pub(crate) fn answer(
        &self,
        exchange: Exchange<'_, AnswerRequest, Answer>,
    ) -> Result<CollectionEnd, Error> {
        run_batches(self.batch, exchange, |requests, shown| {
            self.answer_batch(requests, shown)
        })
    }

    fn answer_batch(
        &self,
        requests: &[AnswerRequest],
        shown: &mut dyn FnMut(usize),
    ) -> Result<CompletedEntries<Answer>, Error> {
        let asks: Vec<Ask<'_>> = requests
            .iter()
            .map(|request| Ask {
                prompt: &request.prompt,
                sample_index: request.sample_index,
            })
            .collect();
        let prompts = self.local.fitting_prompts(&asks, &self.sampling)?;
        let mut progress = |tokens| {
            shown(tokens);
            ControlFlow::Continue(())
        };
        let completions = self.local.sample_encoded(
            &asks,
            &prompts,
            &self.sampling,
            &self.stop,
            self.seed,
            &mut progress,
        )?;
        let completions = completions.ok_or_else(unasked_stop)?;
        let signals: Vec<Option<Signal>> = match &self.signals {
            None => completions.iter().map(|_| None).collect(),
            Some(settings) => {
                let texts = completions.iter().zip(&prompts).map(|(completion, ids)| {
                    let sampled = completion.tokens.iter().filter_map(|token| token.id);
                    let token_ids: Vec<u32> = ids.iter().copied().chain(sampled).collect();
                    let loss_mask = (0..token_ids.len()).map(|at| at >= ids.len()).collect();
                    ScoringText {
                        prompt_id: completion.prompt_id.clone(),
                        sample_index: completion.sample_index,
                        encoded: Encoded {
                            token_ids,
                            loss_mask,
                        },
                    }
                });
                let texts: Vec<ScoringText> = texts.collect();
                let signals = self.score_texts(&texts, settings)?;
                signals.into_iter().map(Some).collect()
            }
        };
        let answers = completions.into_iter().zip(signals);
        let answers = answers.map(|(completion, signal)| Ok(Answer { completion, signal }));
        Ok(requests.iter().map(|r| r.ordinal).zip(answers).collect())
    }

    pub(crate) fn score(
        &self,
        settings: &ScoringOptions,
        exchange: Exchange<'_, ScoreRequest, Signal>,
    ) -> Result<CollectionEnd, Error> {
        run_batches(settings.batch, exchange, |requests, shown| {
            let mut texts = Vec::with_capacity(requests.len());
            for request in requests {
                let answer = &request.answer;
                let text = self
                    .local
                    .text(&answer.prompt, &answer.completion, answer.own_ids)?;
                texts.push(text);
            }
            let signals = self.score_texts(&texts, settings)?;
            shown(signals.iter().map(|signal| signal.rows.len()).sum());
            let entries = signals.into_iter().map(Ok);
            Ok(requests.iter().map(|r| r.ordinal).zip(entries).collect())
        })
    }

    fn score_texts(
        &self,
        texts: &[ScoringText],
        settings: &ScoringOptions,
    ) -> Result<Vec<Signal>, Error> {
        let scoring = settings.scoring();
        let signals = self
            .local
            .score(texts, &scoring, &mut |_| ControlFlow::Continue(()))?;
        signals.ok_or_else(unasked_stop)
    }
}

fn unasked_stop() -> Error {
    Error::Collection {
        why: "the teacher stopped without being asked to".to_owned(),
    }
}

/// Takes requests in batches and completes each batch as a whole. A stop waits for the end of a batch, so that nothing
/// is computed twice.
fn run_batches<Q, T>(
    batch: usize,
    exchange: Exchange<'_, Q, T>,
    mut complete: impl FnMut(&[Q], &mut dyn FnMut(usize)) -> Result<CompletedEntries<T>, Error>,
) -> Result<CollectionEnd, Error> {
    let mut progress = CollectProgress::default();
    loop {
        let requests = next_batch(batch, exchange.next).map_err(Error::next_request)?;
        if requests.is_empty() {
            return Ok(CollectionEnd::Finished);
        }
        if (exchange.stop)() {
            return Ok(CollectionEnd::Stopped);
        }
        let mut tokens_of_batch = 0;
        let entries = complete(&requests, &mut |tokens| {
            tokens_of_batch = tokens as u64;
            (exchange.progress)(&CollectProgress {
                tokens: progress.tokens + tokens_of_batch,
                ..progress
            });
        })?;
        progress.answered += entries.len() as u64;
        progress.tokens += tokens_of_batch;
        let flow = (exchange.completed)(entries).map_err(Error::completed_entries)?;
        (exchange.progress)(&progress);
        if let Some(why) = flow.break_value() {
            return Ok(CollectionEnd::StoppedByCaller { why });
        }
    }
}

fn next_batch<Q>(
    size: usize,
    next: &mut dyn FnMut() -> Result<Option<Q>, CallbackError>,
) -> Result<Vec<Q>, CallbackError> {
    let mut requests = Vec::with_capacity(size);
    while requests.len() < size
        && let Some(request) = next()?
    {
        requests.push(request);
    }
    Ok(requests)
}
