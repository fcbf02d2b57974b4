//! The loss of a window by its definition: dense, in f64, in plain loops. Slow, and shares nothing with
//! what it is held against but the stored signals.

use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_datasets::{Signal, SignalRow};

use crate::loss::{Divergence, Tail};
use crate::objective::Objective;

/// What stands for the logarithm of 0.
const EMPTY: f64 = -1.0e4;
/// The least mass of a tail.
const FLOOR: f64 = 8.673_617_379_884_035e-19;

/// The weights of adaptive KL, row by row: constants of its gradient, taken at one point and used at
/// others.
pub(super) type Weights = Vec<f64>;

/// Mean over a window's rows. `logits` has for each signal the raw logits at each of its positions;
/// those at position t predict token t + 1. `weights` are those of adaptive KL, if they are given;
/// else they are taken here, and come back.
pub(super) fn window_loss(
    signals: &[Signal],
    logits: &[Vec<Vec<f64>>],
    objective: &Objective,
    weights: Option<&Weights>,
) -> (f64, Weights) {
    let (mut sum, mut rows) = (0.0, 0);
    let mut taken = Weights::new();
    for (signal, logits) in signals.iter().zip(logits) {
        let mut stored = signal.rows.iter();
        for t in 1..signal.token_ids.len() {
            if !signal.loss_mask[t] {
                continue;
            }
            let Some(row) = stored.next() else { continue };
            let given = weights.and_then(|weights| weights.get(rows).copied());
            let realised = signal.token_ids[t] as usize;
            let (value, weight) = row_loss(row, realised, &logits[t - 1], objective, given);
            sum += value;
            taken.push(weight);
            rows += 1;
        }
    }
    (sum / rows.max(1) as f64, taken)
}

fn row_loss(
    row: &SignalRow,
    realised: usize,
    logits: &[f64],
    objective: &Objective,
    weight: Option<f64>,
) -> (f64, f64) {
    let tau = objective.temperature;
    let (mut total, mut taken) = (0.0, 0.0);
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
                    taken = weight.unwrap_or_else(|| share_of_head(&p, &q, *head_mass));
                    taken * kl(&p, &q) + (1.0 - taken) * kl(&q, &p)
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
        let value = (1.0 - epsilon) * -q[realised].ln() + epsilon * uniform;
        total += objective.cross_entropy * value;
    }
    (total, taken)
}

fn softmax(logits: &[f64], tau: f64) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = logits.iter().map(|z| ((z - largest) / tau).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

/// p and q, bucket by bucket: the support, and what the tail's convention makes of the rest.
fn buckets(row: &SignalRow, q: &[f64], objective: &Objective) -> (Vec<f64>, Vec<f64>) {
    let tau = objective.temperature;
    let log_z = match tau == 1.0 {
        true => 0.0,
        false => f64::from(row.log_z_at.first().copied().flatten().unwrap_or(f32::NAN)),
    };
    let at = |logprob: &f32| (f64::from(*logprob) / tau - log_z).exp();
    let mut p: Vec<f64> = row.logprobs.iter().map(at).collect();
    let mut of_q: Vec<f64> = row.ids.iter().map(|id| q[*id as usize]).collect();
    let sum: f64 = p.iter().sum();
    if sum > 1.0 {
        p.iter_mut().for_each(|p| *p /= sum);
    }
    match objective.tail {
        Tail::Bucket => {
            let outside = (0..q.len()).filter(|i| !row.ids.contains(&(*i as u32)));
            p.push((1.0 - sum).max(FLOOR));
            of_q.push(outside.map(|i| q[i]).sum::<f64>().max(FLOOR));
        }
        Tail::Renormalize => {
            for side in [&mut p, &mut of_q] {
                let sum: f64 = side.iter().sum();
                side.iter_mut().for_each(|x| *x /= sum);
            }
        }
        Tail::Ignore => {}
        Tail::Draws => {
            let m: u32 = row.draw_counts.iter().sum();
            let mass = f64::from(row.tail_logprob).exp();
            for (id, count) in row.draw_ids.iter().zip(&row.draw_counts) {
                p.push(mass * f64::from(*count) / f64::from(m));
                of_q.push(q[*id as usize]);
            }
        }
    }
    (p, of_q)
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
        // They are taken where their other inputs are.
        Divergence::AdaptiveKl { .. } | Divergence::Custom(_) => f64::NAN,
    }
}

/// Share of Σ|p − q| in the smallest set of the teacher's largest buckets that holds `head_mass`; buckets
/// as large as its smallest belong to it.
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
