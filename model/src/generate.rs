//! Sampling over a paged KV cache with continuous batching: sequences enter and leave the batch between steps.
//!
//! A step computes the next token of every running answer, and a part of the prompts that were admitted last. Each layer
//! keeps keys and values in a pool of pages, and prompts with equal beginnings share pages. Layers with a sliding window
//! give back pages that have fallen behind it, and latent attention keeps latent vectors instead of keys and values. An
//! answer that ends leaves the batch at once, and its pages are given to the next waiting prompt.
//!
//! In f32 on the CPU, an answer does not depend on the other prompts of the batch, on their order or number, or on the
//! page size: the result of each row of a step depends on that row only, bit for bit, and the randomness of a token
//! depends on its answer's seed and its index in the answer.

mod cache;
mod draw;
mod pages;
mod sampling;
mod schedule;

use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::plan::{AttentionPlan, DecoderPlan};
use crate::{Decoder, Error};

use cache::KvCache;
use draw::draw;
pub use sampling::Sampling;
use schedule::{LayerNeeds, Schedule, Sequence};

/// Conditions that end an answer before its maximum length. The token that meets a condition is part of the answer.
#[derive(Clone, Copy)]
pub struct StopConditions<'a> {
    /// Token ids that end an answer, such as EOS.
    pub ids: &'a [u32],
    /// Strings that end an answer once its tokens spell them; none may be empty.
    pub strings: &'a [Vec<u8>],
    /// Function from a token id to the bytes that the token spells; called only if there are `strings`.
    pub token_bytes: &'a dyn Fn(u32) -> Vec<u8>,
}

impl<'a> StopConditions<'a> {
    /// Makes conditions of these ids only.
    #[must_use]
    pub fn at(ids: &'a [u32]) -> Self {
        Self {
            ids,
            strings: &[],
            token_bytes: &|_| Vec::new(),
        }
    }

    /// Whether `id` completes a stop string. `tail` holds the last bytes of the answer, to which the token's bytes are
    /// appended.
    fn is_string_completed_by(&self, id: u32, tail: &mut Vec<u8>) -> bool {
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

/// Limits of a batch that bound memory. Answers do not depend on them.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchLimits {
    /// Number of positions of the KV cache of each layer, over all sequences. A prompt waits until there is room for it and
    /// its longest answer, of which a layer with a window holds the last positions only. The number is raised to the need
    /// of the longest prompt.
    pub cache_tokens: usize,
    /// Largest number of sequences that run at the same time, and whose logits are held at once; at least 1.
    pub sequences: usize,
    /// Largest number of prompt tokens that a step computes; at least 1.
    pub prefill_rows: usize,
    /// Number of positions of a page; at least 1. Prompts share whole pages.
    pub page_size: usize,
}

impl Default for BatchLimits {
    fn default() -> Self {
        Self {
            cache_tokens: 32_768,
            sequences: 64,
            prefill_rows: 512,
            page_size: 16,
        }
    }
}

/// The reason why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The last token is one of [`StopConditions::ids`].
    StopToken,
    /// The last token completes one of [`StopConditions::strings`].
    StopString,
    /// The answer has its maximum number of tokens.
    Length,
}

/// A generated answer.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedAnswer {
    /// Token ids, including the token that ended the answer.
    pub ids: Vec<u32>,
    /// Log-probability of each id in nats, at temperature 1 over the whole vocabulary and without repetition penalty.
    pub logprobs: Vec<f32>,
    /// Reason why the answer ended.
    pub stop_reason: StopReason,
}

/// Samples one answer to each prompt. For several answers to one prompt, pass it several times with different seeds;
/// the copies share the cache of the prompt's whole pages.
///
/// The token of step s is drawn with a generator seeded by the prompt's seed and s. After each step, `progress` is
/// called with the number of tokens drawn so far; if it breaks, the result is `None`.
///
/// # Errors
/// Returns an error for a prompt that is empty, holds an id outside the vocabulary, or does not fit into the context
/// with its answer; for a number of seeds that differs from the number of prompts; for a setting out of range; and for
/// an empty stop string.
pub fn generate(
    model: &Decoder,
    prompts: &[Vec<u32>],
    stop: &StopConditions<'_>,
    sampling: &Sampling,
    seeds: &[u64],
    limits: &BatchLimits,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Vec<GeneratedAnswer>>, Error> {
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
    let needs = layer_needs(&model.config().plan);
    let mut schedule = Schedule::new(prompts, sampling.max_new_tokens, &needs, limits);
    let mut cache = KvCache::new(&model, &schedule, limits.page_size);
    let unset = GeneratedAnswer {
        ids: Vec::new(),
        logprobs: Vec::new(),
        stop_reason: StopReason::Length,
    };
    let mut answers = vec![unset; prompts.len()];
    let mut tokens = 0;
    loop {
        let rows = schedule.rows();
        if rows.is_empty() {
            return Ok(Some(answers));
        }
        let hidden_md = cache.step(&model, &rows, &schedule);
        if hidden_md.dims()[0] > 0 {
            let logits_mv = read_logits(model.logits(hidden_md))?;
            tokens += draw_tokens(&logits_mv, &mut schedule.running, stop, sampling, seeds);
            schedule.remove_ended(&mut answers);
        }
        if progress(tokens).is_break() {
            return Ok(None);
        }
    }
}

/// Returns what the schedule must know of the layers.
fn layer_needs(plan: &DecoderPlan) -> LayerNeeds {
    let windows = plan.layers.iter().map(|layer| match &layer.attention {
        AttentionPlan::Grouped(plan) => plan.window,
        AttentionPlan::Latent(_) => None,
    });
    let tables = plan.rotary.iter();
    let length_limits = tables.filter_map(|table| table.long.as_ref().map(|long| long.limit));
    LayerNeeds {
        windows: windows.collect(),
        length_limits: length_limits.collect(),
    }
}

/// Draws the next token of each sequence that has logits, in order of the rows; returns the number of tokens.
fn draw_tokens(
    logits_mv: &[f32],
    running: &mut [Sequence],
    stop: &StopConditions<'_>,
    sampling: &Sampling,
    seeds: &[u64],
) -> usize {
    let mut drawing: Vec<&mut Sequence> = running
        .iter_mut()
        .filter(|sequence| sequence.is_drawing())
        .collect();
    let v = logits_mv.len() / drawing.len().max(1);
    let next: Vec<(u32, f32)> = (drawing.par_iter().zip(logits_mv.par_chunks(v.max(1))))
        .map(|(sequence, logits_v)| {
            let seed = seeds.get(sequence.prompt).copied().unwrap_or(0);
            let step = sequence.drawn() as u64;
            draw(logits_v, &sequence.ids, sampling, seed, step)
        })
        .collect();
    for (sequence, next) in drawing.iter_mut().zip(&next) {
        sequence.push(*next, stop, sampling);
    }
    next.len()
}

fn check_limits(limits: &BatchLimits) -> Result<(), Error> {
    let settings = [
        ("sequences", limits.sequences),
        ("prefill_rows", limits.prefill_rows),
        ("page_size", limits.page_size),
    ];
    match settings.into_iter().find(|(_, value)| *value == 0) {
        Some((setting, _)) => Err(Error::Sampling {
            setting,
            value: 0.0,
            range: "at least 1",
        }),
        None => Ok(()),
    }
}

fn check_prompts(
    model: &Decoder,
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

fn read_logits(logits_mv: Tensor<2>) -> Result<Vec<f32>, Error> {
    logits_mv
        .try_into_vec_as::<f32>()
        .map_err(|error| Error::Device {
            what: "logits",
            why: error.to_string(),
        })
}
