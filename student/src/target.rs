//! The teacher's side of the loss: distributions over a support and one bucket for the tail, or weights on a
//! support and on draws from the tail.

use potstill_datasets::{Signal, SignalRow};
use potstill_kernels::TAIL_FLOOR_NATS;

use crate::error::{Error, SequenceId};
use crate::loss::Tail;

/// The teacher's distributions for one sequence.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Target {
    /// One distribution for each loss position, in order.
    pub rows: Vec<TargetRow>,
}

/// The teacher's distribution on the coarse vocabulary at one loss position.
#[derive(Debug, Clone, PartialEq)]
pub struct TargetRow {
    /// Token ids of the support, and of the draws if draws are used.
    pub ids: Vec<u32>,
    /// Probability of each token of the support; weight of each drawn token.
    pub p: Vec<f64>,
    /// Probability of the tail, at least 2⁻⁶⁰, so that all probabilities sum to 1; 0 if draws replace the tail.
    pub tail: f64,
    /// Entropy of the whole distribution at temperature 1, nats. The KL estimated from weighted draws needs it.
    pub entropy: f64,
}

impl Target {
    /// Converts a stored signal. With [`Tail::Draws`], each drawn token has the weight tail · count / m, so
    /// that the expectation of Σ weight · f(token) is Σ p · f over the whole vocabulary; with the other tails,
    /// tail = 1 − Σ p, in f64. Rows whose probabilities sum to more than 1 by rounding are rescaled; their
    /// number is returned beside the target.
    ///
    /// If `temperature` is not 1, the signal's `log_z_at` holds one number, the normaliser for it.
    ///
    /// # Errors
    /// As [`Signal::validate`]; [`Error::NoTemperature`] without the normaliser; [`Error::NoDraws`] without
    /// the draws that `tail` needs.
    pub fn new(signal: &Signal, tail: Tail, temperature: f64) -> Result<(Self, usize), Error> {
        signal.validate()?;
        let mut rescaled = 0;
        let mut rows = Vec::with_capacity(signal.rows.len());
        for row in &signal.rows {
            let Some((mut target, is_rescaled)) = at_temperature(row, temperature) else {
                return Err(Error::NoTemperature {
                    temperature,
                    sequence: SequenceId::of(signal),
                });
            };
            rescaled += usize::from(is_rescaled);
            if tail == Tail::Draws && !replace_tail_by_draws(&mut target, row) {
                return Err(Error::NoDraws {
                    sequence: SequenceId::of(signal),
                });
            }
            rows.push(target);
        }
        Ok((Self { rows }, rescaled))
    }
}

/// Returns the distribution at a temperature, and whether it was rescaled; `None` without a normaliser.
fn at_temperature(row: &SignalRow, temperature: f64) -> Option<(TargetRow, bool)> {
    let log_z = match temperature == 1.0 {
        true => 0.0,
        false => f64::from(row.log_z_at.first().copied().flatten()?),
    };
    let log_p = |logprob: &f32| f64::from(*logprob) / temperature - log_z;
    let mut p: Vec<f64> = row.logprobs.iter().map(|l| log_p(l).exp()).collect();
    let sum: f64 = p.iter().sum();
    let rescaled = sum > 1.0;
    if rescaled {
        p.iter_mut().for_each(|p| *p /= sum);
    }
    let target = TargetRow {
        ids: row.ids.clone(),
        p,
        tail: (1.0 - sum).max(TAIL_FLOOR_NATS.exp()),
        entropy: f64::from(row.entropy),
    };
    Some((target, rescaled))
}

/// Replaces the tail by its draws; returns false if there are no draws although the tail has mass.
fn replace_tail_by_draws(target: &mut TargetRow, row: &SignalRow) -> bool {
    let m: f64 = row.draw_counts.iter().map(|count| f64::from(*count)).sum();
    // The stored mass is more precise than 1 − Σ p.
    let mass = f64::from(row.tail_logprob).exp();
    target.tail = 0.0;
    target.ids.extend(&row.draw_ids);
    let weight = |count: &u32| mass * f64::from(*count) / m;
    target.p.extend(row.draw_counts.iter().map(weight));
    m > 0.0 || mass == 0.0
}

/// Sums the teacher's −log p of the target tokens, nats.
pub(crate) fn teacher_nll(signal: &Signal) -> f64 {
    let nll = |(position, row): (usize, &SignalRow)| {
        let slot = row
            .ids
            .iter()
            .position(|id| Some(id) == signal.token_ids.get(position))?;
        row.logprobs.get(slot).map(|&logprob| -f64::from(logprob))
    };
    signal
        .loss_positions()
        .zip(&signal.rows)
        .filter_map(nll)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(p: &[f64]) -> SignalRow {
        SignalRow {
            ids: (0..p.len() as u32).collect(),
            logprobs: p.iter().map(|p| p.ln() as f32).collect(),
            tail_logprob: f32::NEG_INFINITY,
            entropy: 0.0,
            log_z_at: Vec::new(),
            draw_ids: Vec::new(),
            draw_counts: Vec::new(),
        }
    }

    #[test]
    fn the_buckets_sum_to_one() {
        for p in [vec![0.5, 0.25], vec![0.9, 0.1000005], vec![1.0]] {
            let (target, _) = at_temperature(&row(&p), 1.0).unwrap();
            let sum: f64 = target.p.iter().sum::<f64>() + target.tail;
            assert!((sum - 1.0).abs() < 1e-12, "{sum}");
            assert!(target.tail >= 2f64.powi(-60) * 0.999);
        }
    }

    #[test]
    fn a_sum_over_one_is_rescaled_and_counted() {
        assert!(at_temperature(&row(&[0.9, 0.1005]), 1.0).unwrap().1);
        assert!(!at_temperature(&row(&[0.9, 0.05]), 1.0).unwrap().1);
    }

    /// Computes p = (0.5, 0.3, 0.2) at T = 2 from the stored log-probabilities and log Σ p^(1/2).
    #[test]
    fn another_temperature_needs_its_own_normaliser() {
        let full = [0.5f64, 0.3, 0.2];
        let z: f64 = full.iter().map(|p| p.sqrt()).sum();
        let mut stored = row(&full[..2]);
        assert!(at_temperature(&stored, 2.0).is_none());
        stored.log_z_at = vec![Some(z.ln() as f32)];
        let (target, _) = at_temperature(&stored, 2.0).unwrap();
        for (found, p) in target.p.iter().zip(full) {
            assert!((found - p.sqrt() / z).abs() < 1e-6);
        }
        assert!((target.tail - full[2].sqrt() / z).abs() < 1e-6);
    }

    #[test]
    fn draws_share_the_mass_of_the_tail() {
        let mut stored = row(&[0.5, 0.25]);
        stored.tail_logprob = 0.25f32.ln();
        let (mut target, _) = at_temperature(&stored, 1.0).unwrap();
        assert!(!replace_tail_by_draws(&mut target.clone(), &stored));
        (stored.draw_ids, stored.draw_counts) = (vec![7, 9], vec![3, 1]);
        assert!(replace_tail_by_draws(&mut target, &stored));
        assert_eq!(target.ids, [0, 1, 7, 9]);
        assert_eq!(target.tail, 0.0);
        for (found, p) in target.p.iter().zip([0.5, 0.25, 0.1875, 0.0625]) {
            assert!((found - p).abs() < 1e-7, "{:?}", target.p);
        }
    }
}
