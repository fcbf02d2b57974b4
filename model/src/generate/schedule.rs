//! Which rows the next step computes: a token of every running answer, and a piece of the prompts.
//!
//! Prompts are admitted and computed in their order. So by the time a sequence reads a page that it
//! shares, the sequence before it that fills the page has done so, in the same step or earlier.

use super::pages::{Given, Pages};
use super::{End, Generated, Limits, Sampling, Stop};

/// One token that a step computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Row {
    pub(super) id: u32,
    pub(super) position: usize,
    /// Index of its sequence among the running ones.
    pub(super) sequence: usize,
}

/// A prompt with its answer so far.
#[derive(Debug)]
pub(super) struct Sequence {
    /// Index of the prompt.
    pub(super) prompt: usize,
    /// Ids of the prompt and of the answer.
    pub(super) text: Vec<u32>,
    pub(super) pages: Vec<u32>,
    prompt_tokens: usize,
    /// Positions that the cache holds, or will after the step at hand.
    fed: usize,
    logprobs: Vec<f32>,
    /// The end of the answer's bytes, where a stop string may have begun.
    tail: Vec<u8>,
    end: Option<End>,
}

impl Sequence {
    /// Tokens of the answer.
    pub(super) fn drawn(&self) -> usize {
        self.text.len() - self.prompt_tokens
    }

    /// Whether the step at hand computes the last token there is, so that the next one is drawn.
    pub(super) fn draws(&self) -> bool {
        self.fed == self.text.len()
    }

    /// Puts a token behind the answer, and says what ended it.
    pub(super) fn push(&mut self, (id, logprob): (u32, f32), stop: &Stop<'_>, sampling: &Sampling) {
        self.text.push(id);
        self.logprobs.push(logprob);
        self.end = if stop.ids.contains(&id) {
            Some(End::StopId)
        } else if stop.completed_by(id, &mut self.tail) {
            Some(End::StopString)
        } else if self.drawn() >= sampling.max_new_tokens {
            Some(End::Length)
        } else {
            None
        };
    }
}

/// The sequences that run, and the pages they have.
#[derive(Debug)]
pub(super) struct Schedule<'a> {
    prompts: &'a [Vec<u32>],
    /// The first prompt that waits.
    next: usize,
    pub(super) running: Vec<Sequence>,
    pages: Pages,
    /// Pages of the pool.
    pub(super) page_count: usize,
    new_tokens: usize,
    limits: &'a Limits,
}

impl<'a> Schedule<'a> {
    pub(super) fn new(prompts: &'a [Vec<u32>], new_tokens: usize, limits: &'a Limits) -> Self {
        // The last token drawn is never fed back.
        let pages = |prompt: &Vec<u32>| (prompt.len() + new_tokens - 1).div_ceil(limits.page_size);
        let largest = prompts.iter().map(pages).max().unwrap_or(0);
        let all = prompts.iter().map(pages).sum::<usize>();
        // One sequence always fits; more pages than all of them need would be idle.
        let page_count = (limits.cache_tokens / limits.page_size).clamp(largest, all);
        Self {
            prompts,
            next: 0,
            running: Vec::new(),
            pages: Pages::new(page_count, limits.page_size),
            page_count,
            new_tokens,
            limits,
        }
    }

    /// Lets prompts in, in their order, as long as all positions that the next one can need are free.
    fn admit(&mut self) {
        while self.running.len() < self.limits.sequences {
            let Some(prompt) = self.prompts.get(self.next) else {
                return;
            };
            let positions = prompt.len() + self.new_tokens - 1;
            let Some(Given { pages, shared }) = self.pages.take(prompt, positions) else {
                return;
            };
            self.running.push(Sequence {
                prompt: self.next,
                text: prompt.clone(),
                pages,
                prompt_tokens: prompt.len(),
                fed: shared,
                logprobs: Vec::new(),
                tail: Vec::new(),
                end: None,
            });
            self.next += 1;
        }
    }

    /// The rows of the next step; none when all is done.
    pub(super) fn rows(&mut self) -> Vec<Row> {
        self.admit();
        let mut rows = Vec::new();
        let mut left = self.limits.prefill_rows;
        for (sequence, running) in self.running.iter_mut().enumerate() {
            let waiting = running.text.len() - running.fed;
            let taken = match running.drawn() {
                0 => waiting.min(left),
                _ => waiting,
            };
            if running.drawn() == 0 {
                left -= taken;
            }
            let ids = running
                .text
                .iter()
                .enumerate()
                .skip(running.fed)
                .take(taken);
            rows.extend(ids.map(|(position, id)| Row {
                id: *id,
                position,
                sequence,
            }));
            running.fed += taken;
        }
        rows
    }

    /// Moves sequences that have ended into their places of `answers`.
    pub(super) fn release(&mut self, answers: &mut [Generated]) {
        let pages = &mut self.pages;
        self.running.retain_mut(|sequence| {
            let Some(end) = sequence.end else {
                return true;
            };
            pages.give_back(&sequence.pages);
            if let Some(answer) = answers.get_mut(sequence.prompt) {
                *answer = Generated {
                    ids: sequence.text.split_off(sequence.prompt_tokens),
                    logprobs: std::mem::take(&mut sequence.logprobs),
                    end,
                };
            }
            false
        });
    }
}
