//! Batched sampling over a preallocated KV cache.
//!
//! Prompts of different lengths share a batch: they are padded on the right, which a causal model does
//! not see, and each answer token of step s is cached in column (longest prompt + s) of its row, at the
//! position where it belongs. A bias hides the padding in between. A finished row stays in the batch and
//! its output is dropped, so what is computed never depends on when other rows end.

use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::{DType, Int, Tensor, TensorData};
use potstill_kernels::attention;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::attention::attend;
use crate::{Config, Error, Llama};

/// How an answer is drawn. Temperature, `top_k`, `top_p` and `min_p` apply in this order, each to what
/// the one before left, as in transformers; a temperature of 0 makes the other three idle.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// The most tokens of an answer, its EOS counted; at least 1.
    pub max_new_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token, and the lowest id among equals.
    pub temperature: f64,
    /// Only so many of the likeliest tokens are drawn from, and those as likely as the last of them; at
    /// least 1. `None` for all.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that together reach this probability (at this temperature) are drawn
    /// from; above 0 and at most 1.
    pub top_p: f64,
    /// Only tokens with at least this share of the likeliest token's probability (at this temperature)
    /// are drawn from; from 0, which leaves none out, to 1.
    pub min_p: f64,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The token ids, with the EOS that ended it.
    pub ids: Vec<u32>,
    /// Of each id, its log-probability in nats at temperature 1 over the whole vocabulary.
    pub logprobs: Vec<f32>,
    /// Whether an EOS ended it, rather than the length.
    pub finished: bool,
}

/// Samples one answer to each prompt, all in one batch.
///
/// The token of step s is drawn with a generator seeded by `seeds[row]` and s, so a row's randomness
/// does not depend on the other rows. `progress` is told after each step how many tokens there are so
/// far; when it breaks, the answer is `None`.
///
/// # Errors
/// A prompt that is empty, holds an id outside of the vocabulary, or does not fit into the context with
/// its answer; another number of seeds than of prompts; a setting out of range.
pub fn generate(
    model: &Llama,
    prompts: &[Vec<u32>],
    eos: &[u32],
    sampling: &Sampling,
    seeds: &[u64],
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Vec<Generated>>, Error> {
    check_sampling(sampling)?;
    check_prompts(model, prompts, sampling, seeds)?;
    if prompts.is_empty() {
        return Ok(Some(Vec::new()));
    }
    let model = model.valid();
    let (mut session, hidden_bd) = Session::start(&model, prompts, sampling.max_new_tokens);
    let mut logits_bv = host(model.logits(hidden_bd))?;
    let mut answers = vec![
        Generated {
            ids: Vec::new(),
            logprobs: Vec::new(),
            finished: false,
        };
        prompts.len()
    ];
    for step in 0..sampling.max_new_tokens {
        let rows = logits_bv.par_chunks(model.config().vocab_size);
        let next: Vec<u32> = (answers.par_iter_mut().zip(seeds).zip(rows))
            .map(|((answer, seed), logits_v)| {
                if answer.finished {
                    // The row is done; what it computes is not looked at.
                    return answer.ids.last().copied().unwrap_or(0);
                }
                let (id, logprob) = draw(logits_v, sampling, *seed, step as u64);
                answer.ids.push(id);
                answer.logprobs.push(logprob);
                answer.finished = eos.contains(&id);
                id
            })
            .collect();
        let tokens = answers.iter().map(|answer| answer.ids.len()).sum();
        if progress(tokens).is_break() {
            return Ok(None);
        }
        let done = answers.iter().all(|answer| answer.finished);
        if done || step + 1 == sampling.max_new_tokens {
            break;
        }
        logits_bv = host(model.logits(session.step(&next)))?;
    }
    Ok(Some(answers))
}

fn check_sampling(sampling: &Sampling) -> Result<(), Error> {
    let out_of_range = |setting, value, range| Error::Sampling {
        setting,
        value,
        range,
    };
    if sampling.max_new_tokens == 0 {
        return Err(out_of_range("max_new_tokens", 0.0, "it is at least 1"));
    }
    if !(sampling.temperature >= 0.0 && sampling.temperature.is_finite()) {
        let range = "it is 0 (the likeliest token) or above";
        return Err(out_of_range("temperature", sampling.temperature, range));
    }
    if sampling.top_k == Some(0) {
        let range = "it is at least 1; leave it out to draw from all tokens";
        return Err(out_of_range("top_k", 0.0, range));
    }
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        let range = "it is above 0 and at most 1";
        return Err(out_of_range("top_p", sampling.top_p, range));
    }
    if !(sampling.min_p >= 0.0 && sampling.min_p <= 1.0) {
        let range = "it is at least 0 (which leaves no token out) and at most 1";
        return Err(out_of_range("min_p", sampling.min_p, range));
    }
    Ok(())
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
        if let Some((position, &id)) = ids
            .iter()
            .enumerate()
            .find(|(_, id)| **id as usize >= vocab_size)
        {
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

/// The state between two steps: what every layer has seen.
struct Session<'a> {
    model: &'a Llama,
    /// Keys and values of each layer, `[b, g, columns, e]`; columns from `filled` on are not yet set.
    cache: Vec<(Tensor<4>, Tensor<4>)>,
    /// 0 where a column holds a token of its row and −∞ on padding, `[b, 1, 1, columns]`.
    bias: Tensor<4>,
    filled: usize,
    /// The position of each row's next token.
    positions: Vec<usize>,
}

impl<'a> Session<'a> {
    /// Runs the prompts; also gives the hidden state `[b, d]` after each prompt's last token.
    fn start(model: &'a Llama, prompts: &[Vec<u32>], new_tokens: usize) -> (Self, Tensor<2>) {
        let (b, t) = (prompts.len(), longest(prompts));
        // The last token drawn is never fed back.
        let columns = t + new_tokens - 1;
        let config = model.config();
        let (device, dtype) = (model.device(), model.dtype());
        let positions: Vec<usize> = (0..b).flat_map(|_| 0..t).collect();
        let rotary = model.rotary(&positions);
        let mut x_nd = model.embedded(padded(prompts, t, &device));
        let mut cache = Vec::with_capacity(model.layers.len());
        for layer in &model.layers {
            let (q_nc, k_nc, v_nc) = layer.project(config, x_nd.clone(), &rotary);
            let (k_bgte, v_bgte) = (
                heads(k_nc.clone(), b, config),
                heads(v_nc.clone(), b, config),
            );
            let shape = [b, config.num_key_value_heads, columns, config.head_dim];
            let keep = |prompt_bgte: Tensor<4>| {
                let mut all = Tensor::zeros(shape, (&device, dtype));
                write(&mut all, prompt_bgte, 0);
                all
            };
            cache.push((keep(k_bgte), keep(v_bgte)));
            let mixed_nc = attention(q_nc, k_nc, v_nc, &vec![t; b], &config.attention());
            x_nd = layer.finish(config, x_nd, mixed_nc);
        }
        let last: Vec<i32> = prompts
            .iter()
            .enumerate()
            .map(|(row, ids)| (row * t + ids.len() - 1) as i32)
            .collect();
        let last = Tensor::<1, Int>::from_data(TensorData::new(last, [b]), &device);
        let session = Self {
            model,
            cache,
            bias: padding_bias(prompts, columns, t, dtype, &device),
            filled: t,
            positions: prompts.iter().map(Vec::len).collect(),
        };
        (session, model.final_norm(x_nd.select(0, last)))
    }

    /// Feeds one token to each row: the hidden states `[b, d]` after it.
    fn step(&mut self, ids: &[u32]) -> Tensor<2> {
        let config = self.model.config();
        let b = ids.len();
        let column = self.filled;
        let rows: Vec<Vec<u32>> = ids.iter().map(|id| vec![*id]).collect();
        let rotary = self.model.rotary(&self.positions);
        let bias = self.bias.clone().narrow(3, 0, column + 1);
        let mut x_nd = self.model.embedded(padded(&rows, 1, &self.model.device()));
        for (layer, (keys, values)) in self.model.layers.iter().zip(&mut self.cache) {
            let (q_nc, k_nc, v_nc) = layer.project(config, x_nd.clone(), &rotary);
            let [q_bhte, k_bgte, v_bgte] = [q_nc, k_nc, v_nc].map(|rows| heads(rows, b, config));
            write(keys, k_bgte, column);
            write(values, v_bgte, column);
            let seen = |all: &Tensor<4>| all.clone().narrow(2, 0, column + 1);
            let mixed_bhte = attend(q_bhte, seen(keys), seen(values), bias.clone());
            let mixed_nc = mixed_bhte.reshape([b, config.num_attention_heads * config.head_dim]);
            x_nd = layer.finish(config, x_nd, mixed_nc);
        }
        self.filled += 1;
        self.positions.iter_mut().for_each(|at| *at += 1);
        self.model.final_norm(x_nd)
    }
}

/// `[b·t, heads·e]` → `[b, heads, t, e]`.
fn heads(rows: Tensor<2>, b: usize, config: &Config) -> Tensor<4> {
    let [n, columns] = rows.dims();
    let heads = columns / config.head_dim;
    rows.reshape([b, n / b, heads, config.head_dim])
        .swap_dims(1, 2)
}

/// Puts `part` into the columns of `all` that start at `column`, in place.
fn write(all: &mut Tensor<4>, part: Tensor<4>, column: usize) {
    let [b, g, t, e] = part.dims();
    all.inplace(|all| all.slice_assign([0..b, 0..g, column..column + t, 0..e], part));
}

fn longest(prompts: &[Vec<u32>]) -> usize {
    prompts.iter().map(Vec::len).max().unwrap_or(0)
}

/// Token ids `[b, t]`, filled up with id 0 on the right.
fn padded(rows: &[Vec<u32>], t: usize, device: &burn::tensor::Device) -> Tensor<2, Int> {
    let mut ids = Vec::with_capacity(rows.len() * t);
    for row in rows {
        ids.extend(row.iter().map(|id| *id as i32));
        ids.resize(ids.len() + t - row.len(), 0);
    }
    Tensor::from_data(TensorData::new(ids, [rows.len(), t]), device)
}

/// 0 where a column holds a token of its row, −∞ between the end of a prompt and column `t`.
fn padding_bias(
    prompts: &[Vec<u32>],
    columns: usize,
    t: usize,
    dtype: DType,
    device: &burn::tensor::Device,
) -> Tensor<4> {
    let mut bias = vec![0f32; prompts.len() * columns];
    for (row, ids) in bias.chunks_mut(columns.max(1)).zip(prompts) {
        if let Some(padding) = row.get_mut(ids.len()..t) {
            padding.fill(f32::NEG_INFINITY);
        }
    }
    let data = TensorData::new(bias, [prompts.len(), 1, 1, columns]);
    Tensor::from_data(data, (device, dtype))
}

fn host(logits_bv: Tensor<2>) -> Result<Vec<f32>, Error> {
    logits_bv
        .try_into_vec_as::<f32>()
        .map_err(|error| Error::Device {
            what: "logits",
            why: error.to_string(),
        })
}

/// Draws the token of one step from one row of logits, with its log-probability at temperature 1.
fn draw(logits_v: &[f32], sampling: &Sampling, seed: u64, step: u64) -> (u32, f32) {
    let best = likeliest(logits_v);
    let largest = logits_v.get(best).copied().unwrap_or(0.0);
    let index = if sampling.temperature == 0.0 {
        best
    } else {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        generator.set_stream(step);
        let weight = |logit: f32| (f64::from(logit - largest) / sampling.temperature).exp();
        let mut weights: Vec<f64> = logits_v.iter().map(|logit| weight(*logit)).collect();
        if let Some(least) = sampling.top_k.and_then(|k| kth_largest(&weights, k)) {
            drop_below(least, &mut weights);
        }
        let nucleus = (sampling.top_p < 1.0).then(|| nucleus(&weights, sampling.top_p));
        // The likeliest token has the weight 1.
        drop_below(sampling.min_p, &mut weights);
        match nucleus {
            Some(ids) => pick(ids.into_iter(), &weights, generator.random()),
            None => pick(0..weights.len(), &weights, generator.random()),
        }
    };
    let mass: f64 = logits_v
        .iter()
        .map(|logit| f64::from(logit - largest).exp())
        .sum();
    let logit = logits_v.get(index).copied().unwrap_or(largest);
    let logprob = f64::from(logit - largest) - mass.ln();
    (index as u32, logprob as f32)
}

/// Index of the largest logit, the first among equals.
fn likeliest(logits_v: &[f32]) -> usize {
    let mut best = (0, f32::NEG_INFINITY);
    for (index, &logit) in logits_v.iter().enumerate() {
        if logit > best.1 {
            best = (index, logit);
        }
    }
    best.0
}

/// The k-th largest of `weights`, equal ones counted each; `None` where there are no more than k.
fn kth_largest(weights: &[f64], k: usize) -> Option<f64> {
    if k >= weights.len() {
        return None;
    }
    let mut sorted = weights.to_vec();
    let (_, kth, _) = sorted.select_nth_unstable_by(k.checked_sub(1)?, |a, b| b.total_cmp(a));
    Some(*kth)
}

/// Leaves smaller weights out of what is drawn from.
fn drop_below(least: f64, weights: &mut [f64]) {
    let small = weights.iter_mut().filter(|weight| **weight < least);
    small.for_each(|weight| *weight = 0.0);
}

/// The fewest tokens that reach `top_p` of all weight, heaviest first and the lower id among equals.
fn nucleus(weights: &[f64], top_p: f64) -> Vec<usize> {
    let total: f64 = weights.iter().sum();
    // All tokens below this weight together are less than the 1 − top_p that may be left out, so only the
    // others need to be sorted. The last factor is for rounding.
    let least = (1.0 - top_p) * total / weights.len() as f64 * 0.999;
    let mut heavy: Vec<(usize, f64)> = weights.iter().copied().enumerate().collect();
    heavy.retain(|(_, weight)| *weight >= least);
    heavy.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let mut reached = 0.0;
    let mut ids = Vec::new();
    for (id, weight) in heavy {
        ids.push(id);
        reached += weight;
        if reached >= top_p * total {
            break;
        }
    }
    ids
}

/// The first of `ids` at which the running weight passes the share `uniform` of theirs.
fn pick(ids: impl Iterator<Item = usize> + Clone, weights: &[f64], uniform: f64) -> usize {
    let weight = |id: &usize| weights.get(*id).copied().unwrap_or(0.0);
    let wanted = uniform * ids.clone().map(|id| weight(&id)).sum::<f64>();
    let mut reached = 0.0;
    let mut last = 0;
    for id in ids {
        // A token without weight is never drawn, not even by rounding at the end.
        if weight(&id) > 0.0 {
            last = id;
        }
        reached += weight(&id);
        if reached > wanted {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_p: f64) -> Sampling {
        Sampling {
            max_new_tokens: 1,
            temperature,
            top_k: None,
            top_p,
            min_p: 0.0,
        }
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals() {
        let (id, logprob) = draw(&[0.0, 2.0, 2.0, -1.0], &sampling(0.0, 1.0), 0, 0);
        assert_eq!(id, 1);
        let mass: f64 = [0f64, 2.0, 2.0, -1.0].iter().map(|z| z.exp()).sum();
        assert!((f64::from(logprob) - (2.0 - mass.ln())).abs() < 1e-6);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.5f32, 1.5, -0.3, 0.0];
        for (temperature, top_p) in [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)] {
            let weights: Vec<f64> = logits
                .iter()
                .map(|z| (f64::from(*z) / temperature).exp())
                .collect();
            let allowed = if top_p < 1.0 {
                nucleus(&weights, top_p)
            } else {
                vec![0, 1, 2, 3]
            };
            let total: f64 = allowed.iter().map(|id| weights[*id]).sum();
            let mut counts = [0usize; 4];
            let draws = 20_000;
            for seed in 0..draws {
                counts[draw(&logits, &sampling(temperature, top_p), seed, 3).0 as usize] += 1;
            }
            for id in 0..4 {
                let expected = if allowed.contains(&id) {
                    weights[id] / total
                } else {
                    0.0
                };
                let found = counts[id] as f64 / draws as f64;
                assert!((found - expected).abs() < 0.015, "{id}: {found} {expected}");
            }
        }
    }

    #[test]
    fn the_nucleus_is_that_of_a_full_sort() {
        let mut generator = ChaCha8Rng::seed_from_u64(5);
        for length in [1usize, 63, 64, 65, 500, 3000] {
            // Few distinct values, so that ties are common.
            let weights: Vec<f64> = (0..length)
                .map(|_| f64::from(generator.random_range(1..40u32)))
                .collect();
            let mut order: Vec<usize> = (0..length).collect();
            order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
            for top_p in [0.01, 0.5, 0.95, 1.0] {
                let wanted = top_p * weights.iter().sum::<f64>();
                let mut reached = 0.0;
                let mut expected = Vec::new();
                for id in &order {
                    expected.push(*id);
                    reached += weights[*id];
                    if reached >= wanted {
                        break;
                    }
                }
                assert_eq!(nucleus(&weights, top_p), expected);
            }
        }
    }

    /// Against what transformers' logits warpers leave of fixed logits: `make.py` made the file.
    #[test]
    fn draws_follow_the_distributions_of_transformers() {
        #[derive(serde::Deserialize)]
        struct Case {
            logits: Vec<f32>,
            temperature: f64,
            top_k: Option<usize>,
            top_p: f64,
            min_p: f64,
            probabilities: Vec<f64>,
        }
        let golden = include_str!("../tests/data/sampling/golden.json");
        let cases: Vec<Case> = serde_json::from_str(golden).unwrap();
        assert!(cases.len() >= 20);
        for case in cases {
            let sampling = Sampling {
                max_new_tokens: 1,
                temperature: case.temperature,
                top_k: case.top_k,
                top_p: case.top_p,
                min_p: case.min_p,
            };
            let draws = 20_000;
            let mut counts = vec![0usize; case.logits.len()];
            for seed in 0..draws {
                counts[draw(&case.logits, &sampling, seed, 3).0 as usize] += 1;
            }
            for (id, expected) in case.probabilities.iter().enumerate() {
                let found = counts[id] as f64 / draws as f64;
                // Five standard deviations, and never a token that was left out.
                let spread = 5.0 * (expected * (1.0 - expected) / draws as f64).sqrt();
                assert!(
                    (found - expected).abs() <= spread,
                    "{sampling:?}, token {id}: {found}, transformers {expected}"
                );
            }
        }
    }

    #[test]
    fn settings_that_leave_nothing_out_draw_as_none() {
        let logits: Vec<f32> = (0..60).map(|id| (id * 37 % 23) as f32 * 0.2).collect();
        let wide = Sampling {
            top_k: Some(60),
            min_p: 0.0,
            ..sampling(0.9, 1.0)
        };
        for seed in 0..200 {
            assert_eq!(
                draw(&logits, &wide, seed, 0),
                draw(&logits, &sampling(0.9, 1.0), seed, 0)
            );
        }
        let one = Sampling {
            top_k: Some(1),
            ..sampling(5.0, 1.0)
        };
        let share = Sampling {
            min_p: 1.0,
            ..sampling(5.0, 1.0)
        };
        let logits = [0.5f32, 3.0, 2.9];
        for seed in 0..50 {
            assert_eq!(draw(&logits, &one, seed, 0).0, 1);
            assert_eq!(draw(&logits, &share, seed, 0).0, 1);
        }
    }

    #[test]
    fn the_step_and_the_seed_decide() {
        let logits: Vec<f32> = (0..100).map(|id| (id % 7) as f32 * 0.1).collect();
        let at = |seed, step| draw(&logits, &sampling(1.0, 1.0), seed, step).0;
        assert_eq!(at(3, 4), at(3, 4));
        let distinct: std::collections::BTreeSet<u32> = (0..20)
            .flat_map(|seed| [at(seed, 0), at(seed, 1)])
            .collect();
        assert!(distinct.len() > 15);
    }
}
