//! The rows that the next step computes: one token of every running answer, and a part of the admitted prompts.
//!
//! Prompts are admitted and computed in order. So when a sequence reads a shared page, the earlier sequence that writes
//! the page has written it in the same step or before.

use super::pages::{PageAllocation, PagePool};
use super::{BatchLimits, GeneratedAnswer, Sampling, StopConditions, StopReason};

/// One token that a step computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct StepRow {
    pub(super) id: u32,
    pub(super) position: usize,
    /// Index of the token's sequence among the running sequences.
    pub(super) sequence: usize,
}

/// A prompt with its answer so far.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Index of the prompt.
    pub(super) prompt: usize,
    /// Token ids of the prompt and of the answer so far.
    pub(super) ids: Vec<u32>,
    pub(super) pages: Vec<u32>,
    /// Number of tokens of the prompt and of its longest answer.
    pub(super) longest: usize,
    prompt_tokens: usize,
    /// Number of positions that the cache holds after the current step.
    cached: usize,
    logprobs: Vec<f32>,
    /// The last bytes of the answer, in which a stop string may have begun.
    tail: Vec<u8>,
    stop_reason: Option<StopReason>,
}

impl Sequence {
    /// Number of tokens of the answer.
    pub(super) fn drawn(&self) -> usize {
        self.ids.len() - self.prompt_tokens
    }

    /// Whether the current step computes the sequence's last token, so that the next token is drawn.
    pub(super) fn is_drawing(&self) -> bool {
        self.cached == self.ids.len()
    }

    /// Appends a token to the answer, and sets the stop reason if the answer ends with it.
    pub(super) fn push(
        &mut self,
        (id, logprob): (u32, f32),
        stop: &StopConditions<'_>,
        sampling: &Sampling,
    ) {
        self.ids.push(id);
        self.logprobs.push(logprob);
        self.stop_reason = if stop.ids.contains(&id) {
            Some(StopReason::StopToken)
        } else if stop.is_string_completed_by(id, &mut self.tail) {
            Some(StopReason::StopString)
        } else if self.drawn() >= sampling.max_new_tokens {
            Some(StopReason::Length)
        } else {
            None
        };
    }
}

/// The running sequences, the waiting prompts and the pages.
#[derive(Debug)]
pub(super) struct Schedule<'a> {
    prompts: &'a [Vec<u32>],
    /// Index of the first waiting prompt.
    next: usize,
    pub(super) running: Vec<Sequence>,
    pages: PagePool,
    /// Number of pages of the pool.
    pub(super) page_count: usize,
    max_new_tokens: usize,
    limits: &'a BatchLimits,
}

impl<'a> Schedule<'a> {
    pub(super) fn new(
        prompts: &'a [Vec<u32>],
        max_new_tokens: usize,
        limits: &'a BatchLimits,
    ) -> Self {
        // The last token of an answer needs no position in the cache.
        let pages =
            |prompt: &Vec<u32>| (prompt.len() + max_new_tokens - 1).div_ceil(limits.page_size);
        let largest = prompts.iter().map(pages).max().unwrap_or(0);
        let all = prompts.iter().map(pages).sum::<usize>();
        // The largest sequence must fit; more pages than all sequences need would stay unused.
        let page_count = (limits.cache_tokens / limits.page_size).clamp(largest, all);
        Self {
            prompts,
            next: 0,
            running: Vec::new(),
            pages: PagePool::new(page_count, limits.page_size),
            page_count,
            max_new_tokens,
            limits,
        }
    }

    /// Admits prompts in order, while all positions that the next one may need are free.
    fn admit(&mut self) {
        while self.running.len() < self.limits.sequences {
            let Some(prompt) = self.prompts.get(self.next) else {
                return;
            };
            let positions = prompt.len() + self.max_new_tokens - 1;
            let allocation = self.pages.allocate(prompt, positions);
            let Some(PageAllocation { pages, shared }) = allocation else {
                return;
            };
            self.running.push(Sequence {
                prompt: self.next,
                ids: prompt.clone(),
                pages,
                longest: prompt.len() + self.max_new_tokens,
                prompt_tokens: prompt.len(),
                cached: shared,
                logprobs: Vec::new(),
                tail: Vec::new(),
                stop_reason: None,
            });
            self.next += 1;
        }
    }

    /// Returns the rows of the next step; none if all answers have ended.
    pub(super) fn rows(&mut self) -> Vec<StepRow> {
        self.admit();
        let mut rows = Vec::new();
        let mut prefill_left = self.limits.prefill_rows;
        for (sequence, running) in self.running.iter_mut().enumerate() {
            let uncached = running.ids.len() - running.cached;
            let taken = match running.drawn() {
                0 => uncached.min(prefill_left),
                _ => uncached,
            };
            if running.drawn() == 0 {
                prefill_left -= taken;
            }
            let ids = running.ids.iter().enumerate();
            let ids = ids.skip(running.cached).take(taken);
            rows.extend(ids.map(|(position, id)| StepRow {
                id: *id,
                position,
                sequence,
            }));
            running.cached += taken;
        }
        rows
    }

    /// Removes the sequences that have ended, and moves their answers to `answers`.
    pub(super) fn remove_ended(&mut self, answers: &mut [GeneratedAnswer]) {
        let pages = &mut self.pages;
        self.running.retain_mut(|sequence| {
            let Some(stop_reason) = sequence.stop_reason else {
                return true;
            };
            pages.release(&sequence.pages);
            if let Some(answer) = answers.get_mut(sequence.prompt) {
                *answer = GeneratedAnswer {
                    ids: sequence.ids.split_off(sequence.prompt_tokens),
                    logprobs: std::mem::take(&mut sequence.logprobs),
                    stop_reason,
                };
            }
            false
        });
    }
}
