//! Records of one position, one for each seed: as the product stores them, and with the draws of other samplers.

use std::collections::BTreeMap;

use potstill_datasets::SignalRow;
use potstill_kernels::{CaptureOptions, CaptureRow, LogitTransform, capture};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::positions::Position;
use crate::plain::constant;

/// Methods to take m draws from the tail. They differ in the m points, and in the order of tokens in which the points
/// are looked up in the cumulative distribution.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Sampler {
    /// Points (u + j) / m in the order of ids, as `capture` takes them.
    Stored,
    /// Points (u + j) / m in an order shuffled by the seed.
    Permuted,
    /// Independent points.
    Independent,
}

/// Number of seeds.
pub(super) fn seeds(sampler: Sampler) -> usize {
    match sampler {
        Sampler::Stored => 2048,
        // Only the variance of these samplers is estimated, which needs fewer seeds than the mean.
        Sampler::Permuted | Sampler::Independent => 1024,
    }
}

/// Creates one record for each seed; `index` is the number of the position.
pub(super) fn records(
    position: &Position,
    index: u64,
    top_k: usize,
    draws: u32,
    sampler: Sampler,
) -> Vec<SignalRow> {
    let seeds = seeds(sampler);
    if sampler == Sampler::Stored {
        return captured(position, index, top_k, draws, seeds);
    }
    // Records of different seeds differ only in their draws.
    let mut rows = vec![captured(position, index, top_k, 0, 1).remove(0); seeds];
    let tail = tail(position, &rows[0]);
    for (seed, row) in rows.iter_mut().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed as u64);
        rng.set_stream(1000 + index);
        draw(row, tail.clone(), draws, sampler, &mut rng);
    }
    rows
}

/// Creates a record of the k likeliest tokens and the target token, without draws.
pub(super) fn plain(position: &Position, k: usize) -> SignalRow {
    captured(position, 0, k, 0, 1).remove(0)
}

fn captured(
    position: &Position,
    index: u64,
    top_k: usize,
    draws: u32,
    seeds: usize,
) -> Vec<SignalRow> {
    let row = |seed: usize| CaptureRow {
        kept: vec![position.target_token],
        seed: seed as u64,
        position: index,
    };
    let rows: Vec<CaptureRow> = (0..seeds).map(row).collect();
    let settings = CaptureOptions {
        head: LogitTransform::default(),
        top_k,
        temperatures: &[],
        draws,
    };
    // Log-probabilities are valid logits: they differ from the original ones by a constant.
    let logits_nv = constant(&vec![position.log_p.clone()]).repeat_dim(0, seeds);
    let captured = capture(logits_nv, &rows, &settings).unwrap();
    let stored = captured.into_iter().map(|row| {
        let row = row.unwrap();
        SignalRow {
            ids: row.ids,
            logprobs: row.logprobs,
            tail_logprob: row.tail_logprob,
            entropy: row.entropy,
            log_z_at: Vec::new(),
            draw_ids: row.draw_ids,
            draw_counts: row.draw_counts,
        }
    });
    stored.collect()
}

/// Returns the tokens outside the support, with p(j) / p(tail).
fn tail(position: &Position, row: &SignalRow) -> Vec<(u32, f64)> {
    let ids = (0..position.log_p.len() as u32).filter(|id| !row.ids.contains(id));
    let mut tail: Vec<(u32, f64)> = ids
        .map(|id| (id, position.log_p[id as usize].exp()))
        .collect();
    let mass: f64 = tail.iter().map(|(_, p)| p).sum();
    tail.iter_mut().for_each(|(_, p)| *p /= mass);
    tail
}

fn draw(
    row: &mut SignalRow,
    mut tail: Vec<(u32, f64)>,
    draws: u32,
    sampler: Sampler,
    rng: &mut ChaCha8Rng,
) {
    let m = f64::from(draws);
    let mut points: Vec<f64> = match sampler {
        Sampler::Independent => (0..draws).map(|_| rng.random()).collect(),
        Sampler::Stored | Sampler::Permuted => {
            let u: f64 = rng.random();
            (0..draws).map(|j| (u + f64::from(j)) / m).collect()
        }
    };
    points.sort_by(f64::total_cmp);
    if sampler == Sampler::Permuted {
        tail.shuffle(rng);
    }
    let (mut points, mut share) = (points.into_iter().peekable(), 0.0);
    let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
    for (id, p) in tail {
        share += p;
        while points.next_if(|point| *point < share).is_some() {
            *counts.entry(id).or_insert(0) += 1;
        }
    }
    (row.draw_ids, row.draw_counts) = counts.into_iter().unzip();
}

/// Computes the variance of each token's count by theory, with q = p(j) / p(tail): f(1 − f), f the fraction of mq, for
/// systematic draws in any order that does not depend on u; mq(1 − q) for independent ones. `None` on
/// the support, which is exact.
pub(super) fn count_variance(
    position: &Position,
    row: &SignalRow,
    draws: u32,
    sampler: Sampler,
) -> Vec<Option<f64>> {
    let mut variances = vec![None; position.log_p.len()];
    for (id, q) in tail(position, row) {
        let expected = f64::from(draws) * q;
        let fraction = expected.fract();
        variances[id as usize] = Some(match sampler {
            Sampler::Independent => expected * (1.0 - q),
            Sampler::Stored | Sampler::Permuted => fraction * (1.0 - fraction),
        });
    }
    variances
}
