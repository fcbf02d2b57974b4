//! Capture of a teacher's distribution: a sparse row is computed from a row of logits.
//!
//! With s = softcap(scale · z) / τ over the vocabulary and L = log Σ_i exp(s_i), log p(i) = s_i − L:
//!
//! ```text
//! support S     the top-k of s, the lower id first among equals, and the extra ids of the row
//! log p(i)      for i in S
//! log p(tail)   lse(s_j, j ∉ S) − L, summed over the tail alone, never log(1 − Σ)
//! entropy       −Σ_i p(i) log p(i) over the whole vocabulary
//! log_z_at[T]   log Σ_i exp(log p(i) / T), so that log p_T(i) = log p(i) / T − log_z_at[T]
//! draws         m systematic draws from the tail, p(j) / p(tail), as counts
//! ```
//!
//! Systematic resampling (Kitagawa 1996): the points (u + j) / m, j = 0 … m − 1, with one u in [0, 1), are looked up in
//! the tail's cumulative distribution in the order of ids. A token of probability q is drawn ⌊mq⌋ or ⌈mq⌉ times, mq
//! times on average. So the variance of its count is f(1 − f), where f is the fractional part of mq: never above the
//! mq(1 − q) of independent draws.
//!
//! On the CPU a row is read once for the maximum of each block, a second time for the sums, and once more for each
//! temperature other than 1. Nothing of size v is written if the logits are f32 or f64 and the logit transform is the
//! identity. On other devices the op runs in tensor operations and reads `[n, k + c + m]` numbers back.

mod flex;
pub(crate) mod reference;
mod vectors;

use burn::tensor::{DType, Device, Tensor, TensorReadError, bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::rows::LogitTransform;

/// Options of [`capture`].
#[derive(Debug, Clone, Copy)]
pub struct CaptureOptions<'a> {
    /// The transform from raw logits to the logits of the softmax.
    pub head: LogitTransform,
    /// Number of likeliest tokens in the support; larger than the vocabulary for all of its tokens.
    pub top_k: usize,
    /// Temperatures of `log_z_at`, above 0.
    pub temperatures: &'a [f32],
    /// Number m of draws from the tail.
    pub draws: u32,
}

/// The inputs of [`capture`] that differ between rows.
#[derive(Debug, Clone, Default)]
pub struct CaptureRow {
    /// Extra ids that the support holds besides the top-k, in any order, repeated or not.
    pub kept: Vec<u32>,
    /// Seed of the draws. Their randomness depends on this seed and on `position` only.
    pub seed: u64,
    /// Position of the row, the second input of the draws' randomness.
    pub position: u64,
}

/// A sparse distribution: exact on the support, with the mass of the tail and draws from it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Captured {
    /// Ids of the support: unique, likeliest first, the lower id first among equals.
    pub ids: Vec<u32>,
    /// Log-probabilities of `ids` in nats.
    pub logprobs: Vec<f32>,
    /// Log of the mass outside the support in nats; −∞ for an empty tail.
    pub tail_logprob: f32,
    /// Entropy of the whole distribution in nats.
    pub entropy: f32,
    /// For each temperature T, log Σ exp(log p / T) over the vocabulary in nats.
    pub log_z_at: Vec<f32>,
    /// Ids drawn from the tail, ascending and unique; none for an empty tail.
    pub draw_ids: Vec<u32>,
    /// Number of times that each of `draw_ids` was drawn; the counts sum to the number of draws.
    pub draw_counts: Vec<u32>,
}

/// Captures the sparse distribution of each row of `logits_nv`, with the inputs `rows[n]`. The result is `None` for a
/// row that is no distribution: with a NaN or +∞, with nothing above −∞, or with a token of probability 0 in the
/// support.
///
/// A row's result depends on that row only, bit for bit, and not on the other rows or the number of threads. No
/// gradient passes.
///
/// # Shapes
/// - `logits_nv`: `[n, v]`, f64, f32, f16 or bf16, on any device; n is `rows.len()`.
///
/// # Errors
/// Returns an error if the device fails to return its results.
///
/// # Panics
/// Panics if the number of rows differs, as burn's own operations do.
pub fn capture(
    logits_nv: Tensor<2>,
    rows: &[CaptureRow],
    options: &CaptureOptions<'_>,
) -> Result<Vec<Option<Captured>>, TensorReadError> {
    let [n, v] = logits_nv.dims();
    assert_eq!(
        n,
        rows.len(),
        "capture: the logits have {n} rows, and {} rows are described",
        rows.len()
    );
    if n == 0 || v == 0 {
        return Ok(vec![None; n]);
    }
    if logits_nv.device() != Device::flex() {
        return reference::capture_reference(logits_nv, rows, options);
    }
    // The data takes over the tensor's buffer if it is not shared, and copies it otherwise.
    let data = logits_nv.try_into_data()?;
    Ok(match data.dtype() {
        DType::F64 => flex::capture_rows::<f64, f64>(data.as_slice()?, v, rows, options),
        DType::F16 => flex::capture_rows::<f16, f32>(data.as_slice()?, v, rows, options),
        DType::BF16 => flex::capture_rows::<bf16, f32>(data.as_slice()?, v, rows, options),
        _ => flex::capture_rows::<f32, f32>(data.as_slice()?, v, rows, options),
    })
}

impl CaptureRow {
    /// Draws u in [0, 1): the first of the m points in units of 1 / m.
    fn uniform(&self) -> f64 {
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        generator.set_stream(self.position);
        generator.random()
    }
}

/// Counts the points (u + j) / m below `share` of the tail's mass.
fn points_below(share: f64, draws: u32, uniform: f64) -> u32 {
    (share * f64::from(draws) - uniform)
        .ceil()
        .clamp(0.0, f64::from(draws)) as u32
}

/// Sums over the tail, relative to the tail's largest logit.
#[derive(Debug, Clone, PartialEq)]
struct TailSums {
    /// The largest s outside the support; −∞ for an empty tail.
    largest: f64,
    /// Σ exp(s − largest).
    total: f64,
    /// Σ exp(s − largest) (s − largest).
    weighted: f64,
    /// For each temperature, Σ exp((s − largest) / T); unspecified for T = 1.
    at: Vec<f64>,
}

impl TailSums {
    /// The sums of an empty tail.
    fn empty(temperatures: usize) -> Self {
        Self {
            largest: f64::NEG_INFINITY,
            total: 0.0,
            weighted: 0.0,
            at: vec![0.0; temperatures],
        }
    }
}

/// Computes the sparse row without its draws, from (s, id) of the support in any order and the sums over the tail.
/// Returns `None` if a logit or log-probability of the support is not finite.
fn summarize(support: &[(f64, u32)], tail: &TailSums, temperatures: &[f32]) -> Option<Captured> {
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
        let tail = if has_tail {
            ((tail.largest - largest) / t).exp() * at
        } else {
            0.0
        };
        log_z_at.push(match t == 1.0 {
            true => 0.0,
            false => ((on_support.sum::<f64>() + tail).ln() - log_total / t) as f32,
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
