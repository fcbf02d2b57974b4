//! What is kept of a teacher's distribution: a sparse row from a row of logits.
//!
//! With s = softcap(scale · z) / τ over the vocabulary and L = log Σ_i exp(s_i), log p(i) = s_i − L:
//!
//! ```text
//! support S     the top-k of s, the lower id first among equals, and the ids that are kept
//! log p(i)      for i in S
//! log p(tail)   lse(s_j, j ∉ S) − L, summed over the tail alone, never log(1 − Σ)
//! entropy       −Σ_i p(i) log p(i) over the whole vocabulary
//! log_z_at[T]   log Σ_i exp(log p(i) / T), so that log p_T(i) = log p(i) / T − log_z_at[T]
//! draws         m systematic draws from the tail, p(j) / p(tail), as counts
//! ```
//!
//! Systematic resampling (Kitagawa 1996): the points (u + j) / m, j = 0 … m − 1, with one u in [0, 1),
//! are looked up in the tail's cumulative distribution in the order of ids. A token of probability
//! q is drawn ⌊mq⌋ or ⌈mq⌉ times, mq on average, so the variance of its count is f(1 − f) with
//! f the fraction of mq: never above the mq(1 − q) of independent draws.
//!
//! On the CPU a row is read once for the largest of each block, a second time for the sums, and once more
//! for each temperature but 1; nothing of size v is written, unless the logits are not f32 or f64 as
//! they are. On other devices tensor operations do the same, and `[n, k + c + m]` comes back.

mod flex;
pub(crate) mod reference;
mod vectors;

use burn::tensor::{DType, Device, Tensor, TensorReadError};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::rows::Head;

/// What is kept of each row.
#[derive(Debug, Clone, Copy)]
pub struct Capture<'a> {
    /// From raw logits to those of the softmax.
    pub head: Head,
    /// How many of the likeliest tokens the support holds; more than the vocabulary keeps all of it.
    pub top_k: usize,
    /// The temperatures of `log_z_at`, above 0.
    pub temperatures: &'a [f32],
    /// How many draws are taken from the tail, m.
    pub draws: u32,
}

/// What differs from row to row.
#[derive(Debug, Clone, Default)]
pub struct CaptureRow {
    /// Ids that the support holds besides the top-k, in any order, repeated or not.
    pub kept: Vec<u32>,
    /// The randomness of the draws is a function of this seed,
    pub seed: u64,
    /// and of this position alone.
    pub position: u64,
}

/// A sparse distribution: exact on the support, one number and draws for the rest.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Captured {
    /// The support: unique, likeliest first, the lower id first where equal.
    pub ids: Vec<u32>,
    /// Log-probabilities of `ids`, nats.
    pub logprobs: Vec<f32>,
    /// Log of the mass outside the support, nats; −∞ where there is none.
    pub tail_logprob: f32,
    /// Entropy of the whole distribution, nats.
    pub entropy: f32,
    /// For each temperature T, log Σ exp(log p / T) over the vocabulary, nats.
    pub log_z_at: Vec<f32>,
    /// Ids drawn from the tail, ascending, each once; none where there is no tail.
    pub draw_ids: Vec<u32>,
    /// How often each of `draw_ids` was drawn; they sum to the number of draws.
    pub draw_counts: Vec<u32>,
}

/// The sparse distribution of each row of `logits_nv`, from `rows[n]` and `capture`; `None` for a row
/// that is no distribution: a NaN, +∞, nothing above −∞, or a token of probability 0 in the support.
///
/// A row's result is a function of that row alone, bit for bit, whatever stands beside it and
/// however many threads there are. No gradient passes.
///
/// # Shapes
/// - `logits_nv`: `[n, v]`, f64, f32, f16 or bf16, on any device; n is `rows.len()`.
///
/// # Errors
/// Where the device does not give its results back.
///
/// # Panics
/// As burn's own operations do, where the number of rows differs.
pub fn capture(
    logits_nv: Tensor<2>,
    rows: &[CaptureRow],
    capture: &Capture<'_>,
) -> Result<Vec<Option<Captured>>, TensorReadError> {
    let [n, v] = logits_nv.dims();
    assert_eq!(
        n,
        rows.len(),
        "capture: logits have {n} rows, and {} are described",
        rows.len()
    );
    if n == 0 || v == 0 {
        return Ok(vec![None; n]);
    }
    if logits_nv.device() != Device::flex() {
        return reference::capture_reference(logits_nv, rows, capture);
    }
    // Takes the buffer over where nobody else holds it, and copies it otherwise.
    let data = logits_nv.try_into_data()?;
    Ok(match data.dtype() {
        DType::F64 => flex::capture_rows::<f64, f64>(data.as_slice()?, v, rows, capture),
        DType::F16 => {
            flex::capture_rows::<burn::tensor::f16, f32>(data.as_slice()?, v, rows, capture)
        }
        DType::BF16 => {
            flex::capture_rows::<burn::tensor::bf16, f32>(data.as_slice()?, v, rows, capture)
        }
        _ => flex::capture_rows::<f32, f32>(data.as_slice()?, v, rows, capture),
    })
}

impl CaptureRow {
    /// u in [0, 1): where the first of the m points lies, in units of 1 / m.
    fn uniform(&self) -> f64 {
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        generator.set_stream(self.position);
        generator.random()
    }
}

/// How many of the points (u + j) / m lie below `share` of the tail's mass.
fn points_below(share: f64, draws: u32, uniform: f64) -> u32 {
    (share * f64::from(draws) - uniform)
        .ceil()
        .clamp(0.0, f64::from(draws)) as u32
}

/// Sums over the tail, each against the tail's own largest logit.
#[derive(Debug, Clone, PartialEq)]
struct TailSums {
    /// The largest s outside the support; −∞ where the tail has no mass.
    largest: f64,
    /// Σ exp(s − largest).
    total: f64,
    /// Σ exp(s − largest) (s − largest).
    weighted: f64,
    /// For each temperature, Σ exp((s − largest) / T); anything where T is 1.
    at: Vec<f64>,
}

impl TailSums {
    /// A tail without mass.
    fn empty(temperatures: usize) -> Self {
        Self {
            largest: f64::NEG_INFINITY,
            total: 0.0,
            weighted: 0.0,
            at: vec![0.0; temperatures],
        }
    }
}

/// The row, less its draws, from the support's (s, id) in any order and the sums over the rest.
/// `None` where a number is not finite that has to be.
fn summary(support: &[(f64, u32)], tail: &TailSums, temperatures: &[f32]) -> Option<Captured> {
    let largest = support.iter().map(|(s, _)| *s).fold(tail.largest, f64::max);
    if !largest.is_finite() {
        return None;
    }
    let on_support: f64 = support.iter().map(|(s, _)| (s - largest).exp()).sum();
    let log_total = (on_support + (tail.largest - largest).exp() * tail.total).ln();
    let has_tail = tail.largest.is_finite() && tail.total > 0.0;
    // exp(largest of the tail − largest) may underflow; its logarithm does not.
    let tail_shift = tail.largest - largest - log_total;
    let tail_logprob = match has_tail {
        true => tail_shift + tail.total.ln(),
        false => f64::NEG_INFINITY,
    };

    let mut pairs = Vec::with_capacity(support.len());
    let (mut mean_logprob, mut log_z_at) = (0.0, Vec::with_capacity(temperatures.len()));
    for (s, id) in support {
        let logprob = s - largest - log_total;
        if !logprob.is_finite() {
            return None;
        }
        mean_logprob += logprob.exp() * logprob;
        pairs.push((logprob as f32, *id));
    }
    if has_tail {
        mean_logprob += tail_logprob.exp() * (tail.weighted / tail.total + tail_shift);
    }
    for (temperature, at) in temperatures.iter().zip(&tail.at) {
        let t = f64::from(*temperature);
        let on_support = support.iter().map(|(s, _)| ((s - largest) / t).exp());
        let of_tail = if has_tail {
            ((tail.largest - largest) / t).exp() * at
        } else {
            0.0
        };
        log_z_at.push(match t == 1.0 {
            true => 0.0,
            false => ((on_support.sum::<f64>() + of_tail).ln() - log_total / t) as f32,
        });
    }
    pairs.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let (logprobs, ids) = pairs.into_iter().unzip();
    Some(Captured {
        ids,
        logprobs,
        tail_logprob: tail_logprob as f32,
        entropy: (-mean_logprob).max(0.0) as f32,
        log_z_at,
        ..Captured::default()
    })
}
