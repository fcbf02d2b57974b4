//! Sampling over a paged KV cache, with sequences that enter and leave the batch as they go.
//!
//! A step computes the next token of every running answer and a piece of the prompts that were let in
//! last. Each layer keeps keys and values in a pool of pages; prompts that begin alike share them. An
//! answer that ends leaves at once and its pages go to the next prompt in line.
//!
//! In f32 on the CPU, an answer does not depend on what shares the batch, on its order or size, nor on how the
//! cache is cut into pages: each row of a step is computed by itself, bit for bit, and the randomness of
//! a token follows from its answer's seed and its place in the answer.

mod cache;
mod draw;
mod pages;
mod sampling;
mod schedule;

use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::{Error, Llama};

use cache::Cache;
use draw::draw;
pub use sampling::Sampling;
use schedule::{Schedule, Sequence};

/// What ends an answer before its length does. The token that does so is part of the answer.
#[derive(Clone, Copy)]
pub struct Stop<'a> {
    /// Ids that end an answer, such as EOS.
    pub ids: &'a [u32],
    /// Texts that end an answer once its tokens spell them; none may be empty.
    pub strings: &'a [Vec<u8>],
    /// What a token spells. It is asked only where there are `strings`.
    pub token_bytes: &'a dyn Fn(u32) -> Vec<u8>,
}

impl<'a> Stop<'a> {
    /// Nothing but these ids.
    #[must_use]
    pub fn at(ids: &'a [u32]) -> Self {
        Self {
            ids,
            strings: &[],
            token_bytes: &|_| Vec::new(),
        }
    }

    /// Whether `id` completes a stop string; `tail` is the end of the answer's bytes, and goes on.
    fn completed_by(&self, id: u32, tail: &mut Vec<u8>) -> bool {
        let Some(longest) = self.strings.iter().map(Vec::len).max() else {
            return false;
        };
        tail.extend((self.token_bytes)(id));
        let spelled = |string: &&Vec<u8>| tail.windows(string.len()).any(|part| part == *string);
        let completed = self.strings.iter().any(|string| spelled(&string));
        tail.drain(..tail.len().saturating_sub(longest - 1));
        completed
    }
}

/// What bounds memory. Answers do not depend on it.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Positions that the cache holds, over all sequences. A prompt waits until there is room for it and
    /// its longest answer. It is raised to what the longest one needs.
    pub cache_tokens: usize,
    /// Sequences that run at the same time; at least 1. Their logits exist at once.
    pub sequences: usize,
    /// Prompt tokens that a step computes at most; at least 1.
    pub prefill_rows: usize,
    /// Positions of a page; at least 1. Prompts share whole pages.
    pub page_size: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cache_tokens: 32_768,
            sequences: 64,
            prefill_rows: 512,
            page_size: 16,
        }
    }
}

/// What ended an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Its last token is one of [`Stop::ids`].
    StopId,
    /// Its last token completes one of [`Stop::strings`].
    StopString,
    /// It has as many tokens as it may have.
    Length,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The token ids, with the one that ended it.
    pub ids: Vec<u32>,
    /// Of each id, its log-probability in nats at temperature 1 over the whole vocabulary, whatever the
    /// penalty.
    pub logprobs: Vec<f32>,
    /// What ended it.
    pub end: End,
}

/// Samples one answer to each prompt; several answers to one prompt are asked for by giving it several
/// times, with other seeds, and share the cache of its whole pages.
///
/// The token of step s is drawn with a generator seeded by `seeds[row]` and s. `progress` is told after
/// each step how many tokens there are so far; when it breaks, the answer is `None`.
///
/// # Errors
/// A prompt that is empty, holds an id outside of the vocabulary, or does not fit into the context with
/// its answer; another number of seeds than of prompts; a setting out of range; an empty stop string.
pub fn generate(
    model: &Llama,
    prompts: &[Vec<u32>],
    stop: &Stop<'_>,
    sampling: &Sampling,
    seeds: &[u64],
    limits: &Limits,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Vec<Generated>>, Error> {
    sampling::check(sampling)?;
    check_limits(limits)?;
    check_prompts(model, prompts, sampling, seeds)?;
    if let Some(index) = stop.strings.iter().position(Vec::is_empty) {
        return Err(Error::EmptyStop { index });
    }
    if prompts.is_empty() {
        return Ok(Some(Vec::new()));
    }
    let model = model.valid();
    let mut schedule = Schedule::new(prompts, sampling.max_new_tokens, limits);
    let mut cache = Cache::new(&model, schedule.page_count, limits.page_size);
    let unset = Generated {
        ids: Vec::new(),
        logprobs: Vec::new(),
        end: End::Length,
    };
    let mut answers = vec![unset; prompts.len()];
    let mut tokens = 0;
    loop {
        let rows = schedule.rows();
        if rows.is_empty() {
            return Ok(Some(answers));
        }
        let hidden_md = cache.step(&model, &rows, &schedule.running);
        if hidden_md.dims()[0] > 0 {
            let logits_mv = host(model.logits(hidden_md))?;
            tokens += next_tokens(&logits_mv, &mut schedule.running, stop, sampling, seeds);
            schedule.release(&mut answers);
        }
        if progress(tokens).is_break() {
            return Ok(None);
        }
    }
}

/// Draws the next token of each sequence that has logits, in their order; gives how many.
fn next_tokens(
    logits_mv: &[f32],
    running: &mut [Sequence],
    stop: &Stop<'_>,
    sampling: &Sampling,
    seeds: &[u64],
) -> usize {
    let mut drawing: Vec<&mut Sequence> = running.iter_mut().filter(|s| s.draws()).collect();
    let v = logits_mv.len() / drawing.len().max(1);
    let next: Vec<(u32, f32)> = (drawing.par_iter().zip(logits_mv.par_chunks(v.max(1))))
        .map(|(sequence, logits_v)| {
            let seed = seeds.get(sequence.prompt).copied().unwrap_or(0);
            let step = sequence.drawn() as u64;
            draw(logits_v, &sequence.text, sampling, seed, step)
        })
        .collect();
    for (sequence, next) in drawing.iter_mut().zip(&next) {
        sequence.push(*next, stop, sampling);
    }
    next.len()
}

fn check_limits(limits: &Limits) -> Result<(), Error> {
    let settings = [
        ("sequences", limits.sequences),
        ("prefill_rows", limits.prefill_rows),
        ("page_size", limits.page_size),
    ];
    match settings.into_iter().find(|(_, value)| *value == 0) {
        Some((setting, _)) => Err(Error::Sampling {
            setting,
            value: 0.0,
            range: "it is at least 1",
        }),
        None => Ok(()),
    }
}

fn check_prompts(
    model: &Llama,
    prompts: &[Vec<u32>],
    sampling: &Sampling,
    seeds: &[u64],
) -> Result<(), Error> {
    let limit = model.config().max_position_embeddings;
    let vocab_size = model.config().vocab_size;
    if seeds.len() != prompts.len() {
        return Err(Error::Seeds {
            prompts: prompts.len(),
            seeds: seeds.len(),
        });
    }
    for (prompt, ids) in prompts.iter().enumerate() {
        if ids.is_empty() {
            return Err(Error::EmptyPrompt { prompt });
        }
        if ids.len().saturating_add(sampling.max_new_tokens) > limit {
            return Err(Error::PromptTooLong {
                prompt,
                tokens: ids.len(),
                max_new_tokens: sampling.max_new_tokens,
                limit,
            });
        }
        let outside = |(_, id): &(usize, &u32)| **id as usize >= vocab_size;
        if let Some((position, &id)) = ids.iter().enumerate().find(outside) {
            return Err(Error::TokenId {
                prompt,
                position,
                id,
                vocab_size,
            });
        }
    }
    Ok(())
}

fn host(logits_mv: Tensor<2>) -> Result<Vec<f32>, Error> {
    logits_mv
        .try_into_vec_as::<f32>()
        .map_err(|error| Error::Device {
            what: "logits",
            why: error.to_string(),
        })
}
