//! The loss of a global batch by its definition: dense, in f64, in plain loops. This code is slow, and shares only
//! the stored signals with the code that it is compared with.

use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_datasets::{DistributionRow, Signal};
use potstill_kernels::LogitTransform;

use crate::loss::{Divergence, Tail};
use crate::objective::Objective;

/// Value used for the logarithm of 0.
const EMPTY: f64 = -1.0e4;
/// Smallest mass of a tail, 2⁻⁶⁰.
const FLOOR: f64 = 8.673_617_379_884_035e-19;

/// Weights of adaptive KL, one for each row. They are constants of its gradient, so they are computed at one point
/// and used at the other points of the finite differences.
pub(super) type Weights = Vec<f64>;

/// Computes the mean over the rows of a global batch. `logits` has the raw logits at each position of each signal, and
/// `transform` the model's scale, softcap and number of tokens; the logits at position t predict token t + 1. Returns the weights of adaptive KL that were used: `weights` if
/// given, or else those at this point.
pub(super) fn batch_loss_by_definition(
    signals: &[Signal],
    logits: &[Vec<Vec<f64>>],
    transform: &LogitTransform,
    objective: &Objective,
    weights: Option<&Weights>,
) -> (f64, Weights) {
    let (mut sum, mut rows) = (0.0, 0);
    let mut used = Weights::new();
    for (signal, logits) in signals.iter().zip(logits) {
        let mut stored = signal.rows.rows();
        for t in 1..signal.token_ids.len() {
            if !signal.loss_mask[t] {
                continue;
            }
            let Some(row) = stored.next() else { continue };
            let given = weights.and_then(|weights| weights.get(rows).copied());
            let target_token = signal.token_ids[t] as usize;
            let (value, weight) = row_loss(
                row,
                target_token,
                &capped(&logits[t - 1], transform),
                objective,
                given,
            );
            sum += value;
            used.push(weight);
            rows += 1;
        }
    }
    (sum / rows.max(1) as f64, used)
}

fn row_loss(
    row: DistributionRow<'_>,
    target_token: usize,
    logits: &[f64],
    objective: &Objective,
    weight: Option<f64>,
) -> (f64, f64) {
    let tau = objective.temperature;
    let (mut total, mut used) = (0.0, 0.0);
    if objective.has_divergence() {
        let (p, q) = buckets(row, &softmax(logits, tau), objective);
        let scale = if objective.temperature_squared {
            tau * tau
        } else {
            1.0
        };
        for term in &objective.divergences() {
            let value = match &term.divergence {
                Divergence::ForwardKl if objective.tail == Tail::Draws => {
                    let cross: f64 = p.iter().zip(&q).map(|(p, q)| -p * log(*q)).sum();
                    cross - f64::from(row.entropy)
                }
                Divergence::AdaptiveKl { head_mass } => {
                    used = weight.unwrap_or_else(|| share_of_head(&p, &q, *head_mass));
                    used * kl(&p, &q) + (1.0 - used) * kl(&q, &p)
                }
                Divergence::Custom(custom) => custom.function.map_or(f64::NAN, |function| {
                    let tensor = |side: &[f64]| {
                        let side: Vec<f64> = side.iter().map(|x| log(*x)).collect();
                        let data = TensorData::new(side, [1, p.len()]);
                        Tensor::<2>::from_data(data, (&Device::flex(), DType::F64))
                    };
                    let value = function(tensor(&p), tensor(&q)).into_data();
                    value.iter::<f64>().sum()
                }),
                other => divergence(other, &p, &q),
            };
            total += term.weight * scale * value;
        }
    }
    if objective.cross_entropy > 0.0 {
        let q = softmax(logits, 1.0);
        let epsilon = objective.label_smoothing;
        let uniform: f64 = q.iter().map(|q| -q.ln()).sum::<f64>() / q.len() as f64;
        let value = (1.0 - epsilon) * -q[target_token].ln() + epsilon * uniform;
        total += objective.cross_entropy * value;
    }
    (total, used)
}

/// Computes the logits of the softmax: c·tanh(scale·z/c) of the columns that are tokens.
fn capped(logits: &[f64], transform: &LogitTransform) -> Vec<f64> {
    let tokens = transform.vocab.unwrap_or(logits.len());
    let cap = |z: &f64| match transform.softcap {
        Some(c) => c * (transform.scale * z / c).tanh(),
        None => transform.scale * z,
    };
    logits.iter().take(tokens).map(cap).collect()
}

fn softmax(logits: &[f64], tau: f64) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = logits.iter().map(|z| ((z - largest) / tau).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

/// Returns p and q of each bucket: the support, and the tail as `objective.tail` treats it.
fn buckets(row: DistributionRow<'_>, q: &[f64], objective: &Objective) -> (Vec<f64>, Vec<f64>) {
    let tau = objective.temperature;
    let log_z = match tau == 1.0 {
        true => 0.0,
        false => f64::from(row.log_z_at.first().copied().flatten().unwrap_or(f32::NAN)),
    };
    let at = |logprob: &f32| (f64::from(*logprob) / tau - log_z).exp();
    let mut p: Vec<f64> = row.logprobs.iter().map(at).collect();
    let mut q_buckets: Vec<f64> = row.ids.iter().map(|id| q[*id as usize]).collect();
    let sum: f64 = p.iter().sum();
    let stored = f64::from(row.tail_logprob);
    let mut tail = match tau {
        1.0 => stored.exp(),
        _ if stored == f64::NEG_INFINITY => 0.0,
        _ if tau > 1.0 => (1.0 - sum).max((stored / tau - log_z).exp()),
        _ => (1.0 - sum).max(0.0).min((stored / tau - log_z).exp()),
    };
    p.iter_mut().for_each(|p| *p /= sum + tail);
    tail /= sum + tail;
    match objective.tail {
        Tail::Bucket => {
            let outside = (0..q.len()).filter(|i| !row.ids.contains(&(*i as u32)));
            p.push(tail.max(FLOOR));
            q_buckets.push(outside.map(|i| q[i]).sum::<f64>().max(FLOOR));
        }
        Tail::Renormalize => {
            for side in [&mut p, &mut q_buckets] {
                let sum: f64 = side.iter().sum();
                side.iter_mut().for_each(|x| *x /= sum);
            }
        }
        Tail::Ignore => {}
        Tail::Draws => {
            let m: u32 = row.draw_counts.iter().sum();
            for (id, count) in row.draw_ids.iter().zip(row.draw_counts) {
                p.push(tail * f64::from(*count) / f64::from(m));
                q_buckets.push(q[*id as usize]);
            }
        }
    }
    (p, q_buckets)
}

fn log(x: f64) -> f64 {
    x.ln().max(EMPTY)
}

fn kl(a: &[f64], b: &[f64]) -> f64 {
    let term = |(a, b): (&f64, &f64)| a * (log(*a) - log(*b));
    a.iter().zip(b).map(term).sum()
}

fn divergence(which: &Divergence, p: &[f64], q: &[f64]) -> f64 {
    let mixed = |share: f64| -> Vec<f64> {
        let both = p.iter().zip(q);
        both.map(|(p, q)| share * p + (1.0 - share) * q).collect()
    };
    match *which {
        Divergence::ForwardKl => kl(p, q),
        Divergence::ReverseKl => kl(q, p),
        Divergence::Jsd { beta: 0.0 } | Divergence::Alpha { alpha: 1.0 } => kl(p, q),
        Divergence::Jsd { beta: 1.0 } | Divergence::Alpha { alpha: 0.0 } => kl(q, p),
        Divergence::Jsd { beta } => {
            let m = mixed(beta);
            beta * kl(p, &m) + (1.0 - beta) * kl(q, &m)
        }
        Divergence::SkewKl { alpha } => kl(p, &mixed(alpha)),
        Divergence::SkewReverseKl { alpha } => kl(q, &mixed(1.0 - alpha)),
        Divergence::TotalVariation => {
            let gaps = p.iter().zip(q).map(|(p, q)| (p - q).abs());
            0.5 * gaps.sum::<f64>()
        }
        Divergence::Alpha { alpha } => {
            let rest = 1.0 - alpha;
            let term = |(p, q): (&f64, &f64)| {
                alpha * p + rest * q - (alpha * log(*p) + rest * log(*q)).exp()
            };
            p.iter().zip(q).map(term).sum::<f64>() / (alpha * rest)
        }
        // `row_loss` computes these two, which need other inputs.
        Divergence::AdaptiveKl { .. } | Divergence::Custom(_) => f64::NAN,
    }
}

/// Computes the share of Σ|p − q| in the head: the smallest set of the teacher's largest buckets with mass of at
/// least `head_mass`, together with all buckets as large as the smallest of the set.
fn share_of_head(p: &[f64], q: &[f64], head_mass: f64) -> f64 {
    let mut sorted = p.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let mut mass = 0.0;
    let mut least = f64::INFINITY;
    for p in sorted {
        if mass >= head_mass {
            break;
        }
        mass += p;
        least = p;
    }
    let gap = |(p, q): (&f64, &f64)| (p - q).abs();
    let all: f64 = p.iter().zip(q).map(gap).sum();
    let head: f64 = p.iter().zip(q).filter(|(p, _)| **p >= least).map(gap).sum();
    if all > 0.0 { head / all } else { 0.5 }
}
