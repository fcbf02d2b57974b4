//! The teacher's side of the loss: distributions over a support and one bucket for the tail, or weights on a
//! support and on draws from the tail.

use potstill_datasets::{DistributionRow, Signal};
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
    /// Converts a stored signal, which must be [valid](Signal::validate): it was checked where it was read or made.
    ///
    /// The tail at temperature 1 is the stored one; 1 − Σ p would be the rounding errors of Σ p where the tail is small.
    /// At another temperature the tail is 1 − Σ p, within the bound that the stored tail gives. Support and tail are
    /// then divided by their sum, which is 1 up to rounding. With [`Tail::Draws`], each drawn token has the weight
    /// tail · count / m, so that the expectation of Σ weight · f(token) is Σ p · f over the whole vocabulary. The number
    /// of rows whose support alone sums to more than 1 is returned beside the target.
    ///
    /// If `temperature` is not 1, the signal's `log_z_at` holds one number, the normaliser for it.
    ///
    /// # Errors
    /// [`Error::NoTemperature`] without the normaliser; [`Error::NoDraws`] without the draws that `tail` needs.
    pub fn new(signal: &Signal, tail: Tail, temperature: f64) -> Result<(Self, usize), Error> {
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
            if tail != Tail::Draws {
                target.tail = target.tail.max(TAIL_FLOOR_NATS.exp());
            } else if !replace_tail_by_draws(&mut target, row) {
                return Err(Error::NoDraws {
                    sequence: SequenceId::of(signal),
                });
            }
            rows.push(target);
        }
        Ok((Self { rows }, rescaled))
    }
}

/// Returns the distribution at a temperature with the tail as it is, which may be 0, and whether the support alone
/// sums to more than 1; `None` without a normaliser.
fn at_temperature(row: DistributionRow<'_>, temperature: f64) -> Option<(TargetRow, bool)> {
    let log_z = match temperature == 1.0 {
        true => 0.0,
        false => f64::from(row.log_z_at.first().copied().flatten()?),
    };
    let log_p = |logprob: &f32| f64::from(*logprob) / temperature - log_z;
    let mut p: Vec<f64> = row.logprobs.iter().map(|l| log_p(l).exp()).collect();
    let sum: f64 = p.iter().sum();
    let tail = tail_at(row.tail_logprob, sum, temperature, log_z);
    let total = sum + tail;
    p.iter_mut().for_each(|p| *p /= total);
    // Draws are appended to the support.
    let mut ids = Vec::with_capacity(row.ids.len() + row.draw_ids.len());
    ids.extend_from_slice(row.ids);
    let target = TargetRow {
        ids,
        p,
        tail: tail / total,
        entropy: f64::from(row.entropy),
    };
    Some((target, sum > 1.0))
}

/// Computes the mass of the tail at a temperature, where the support has the mass `sum`. Only the tail at temperature 1
/// is stored. Σ p^(1/T) over the tail is at least (Σ p)^(1/T) if T > 1 and at most that if T < 1, which keeps the
/// rounding errors of 1 − `sum` from being the tail.
fn tail_at(tail_logprob: f32, sum: f64, temperature: f64, log_z: f64) -> f64 {
    let bound = (f64::from(tail_logprob) / temperature - log_z).exp();
    match temperature {
        1.0 => bound,
        _ if tail_logprob == f32::NEG_INFINITY => 0.0,
        _ if temperature > 1.0 => (1.0 - sum).max(bound),
        _ => (1.0 - sum).max(0.0).min(bound),
    }
}

/// Replaces the tail by its draws; returns false if there are no draws although the tail has mass.
fn replace_tail_by_draws(target: &mut TargetRow, row: DistributionRow<'_>) -> bool {
    let m: f64 = row.draw_counts.iter().map(|count| f64::from(*count)).sum();
    let mass = std::mem::take(&mut target.tail);
    target.ids.extend(row.draw_ids);
    let weight = |count: &u32| mass * f64::from(*count) / m;
    target.p.extend(row.draw_counts.iter().map(weight));
    m > 0.0 || mass == 0.0
}

/// Sums the teacher's −log p of the target tokens, nats.
pub(crate) fn teacher_nll(signal: &Signal) -> f64 {
    let nll = |(position, row): (usize, DistributionRow<'_>)| {
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
    use potstill_datasets::SignalRow;

    use super::*;

    /// A row whose tail is the rest of the mass.
    fn row(p: &[f64]) -> SignalRow {
        let rest = 1.0 - p.iter().sum::<f64>();
        SignalRow {
            ids: (0..p.len() as u32).collect(),
            logprobs: p.iter().map(|p| p.ln() as f32).collect(),
            tail_logprob: rest.max(0.0).ln() as f32,
            entropy: 0.0,
            log_z_at: Vec::new(),
            draw_ids: Vec::new(),
            draw_counts: Vec::new(),
        }
    }

    #[test]
    fn the_buckets_sum_to_one() {
        for p in [vec![0.5, 0.25], vec![0.9, 0.1000005], vec![1.0]] {
            let (target, _) = at_temperature(row(&p).view(), 1.0).unwrap();
            let sum: f64 = target.p.iter().sum::<f64>() + target.tail;
            assert!((sum - 1.0).abs() < 1e-12, "{sum}");
        }
    }

    /// A tail of 1e-9 is far below the rounding errors of the support's f32 log-probabilities, so 1 − Σ p would be wrong
    /// by orders of magnitude.
    #[test]
    fn a_small_tail_is_the_stored_one() {
        let mut stored = row(&[0.6, 0.3, 0.1 - 1e-9]);
        stored.tail_logprob = 1e-9f64.ln() as f32;
        stored.log_z_at = vec![Some(0.0)];
        let signal = Signal {
            prompt_id: String::new(),
            sample_index: 0,
            token_ids: vec![0, 0],
            loss_mask: vec![false, true],
            rows: [stored.clone()].into_iter().collect(),
            provenance: 0,
        };
        let (target, _) = Target::new(&signal, Tail::Bucket, 1.0).unwrap();
        assert!(
            (target.rows[0].tail - 1e-9).abs() < 1e-14,
            "{:?}",
            target.rows
        );
        // Without a tail, the least mass is kept, since its logarithm is taken.
        stored.tail_logprob = f32::NEG_INFINITY;
        let signal = Signal {
            rows: [stored].into_iter().collect(),
            ..signal
        };
        for temperature in [0.5, 1.0, 2.0] {
            let (target, _) = Target::new(&signal, Tail::Bucket, temperature).unwrap();
            assert_eq!(target.rows[0].tail, TAIL_FLOOR_NATS.exp());
        }
    }

    /// The tail is two tokens of equal probability. Its mass at a temperature is within the bound from its mass at 1.
    #[test]
    fn a_small_tail_at_another_temperature_is_within_its_bound() {
        let full = [0.75_f64, 0.25 - 2e-9, 1e-9, 1e-9];
        for t in [0.5, 0.8, 1.25, 2.0] {
            let z: f64 = full.iter().map(|p| p.powf(1.0 / t)).sum();
            let exact = 2.0 * full[3].powf(1.0 / t) / z;
            let mut stored = row(&full[..2]);
            stored.tail_logprob = 2e-9f64.ln() as f32;
            stored.log_z_at = vec![Some(z.ln() as f32)];
            let (target, _) = at_temperature(stored.view(), t).unwrap();
            let (low, high) = match t > 1.0 {
                true => (0.999 * 2f64.powf(1.0 / t - 1.0), 1.0 + 1e-7 / exact),
                false => (0.0, 1.001 * 2f64.powf(1.0 / t - 1.0)),
            };
            let ratio = target.tail / exact;
            assert!(
                (low..=high).contains(&ratio),
                "{t}: {ratio}, {low} to {high}"
            );
        }
    }

    #[test]
    fn a_sum_over_one_is_rescaled_and_counted() {
        assert!(at_temperature(row(&[0.9, 0.1005]).view(), 1.0).unwrap().1);
        assert!(!at_temperature(row(&[0.9, 0.05]).view(), 1.0).unwrap().1);
    }

    /// Computes p = (0.5, 0.3, 0.2) at T = 2 from the stored log-probabilities and log Σ p^(1/2).
    #[test]
    fn another_temperature_needs_its_own_normaliser() {
        let full = [0.5f64, 0.3, 0.2];
        let z: f64 = full.iter().map(|p| p.sqrt()).sum();
        let mut stored = row(&full[..2]);
        assert!(at_temperature(stored.view(), 2.0).is_none());
        stored.log_z_at = vec![Some(z.ln() as f32)];
        let (target, _) = at_temperature(stored.view(), 2.0).unwrap();
        for (found, p) in target.p.iter().zip(full) {
            assert!((found - p.sqrt() / z).abs() < 1e-6);
        }
        assert!((target.tail - full[2].sqrt() / z).abs() < 1e-6);
    }

    #[test]
    fn draws_share_the_mass_of_the_tail() {
        let mut stored = row(&[0.5, 0.25]);
        stored.tail_logprob = 0.25f32.ln();
        let (mut target, _) = at_temperature(stored.view(), 1.0).unwrap();
        assert!(!replace_tail_by_draws(&mut target.clone(), stored.view()));
        (stored.draw_ids, stored.draw_counts) = (vec![7, 9], vec![3, 1]);
        assert!(replace_tail_by_draws(&mut target, stored.view()));
        assert_eq!(target.ids, [0, 1, 7, 9]);
        assert_eq!(target.tail, 0.0);
        for (found, p) in target.p.iter().zip([0.5, 0.25, 0.1875, 0.0625]) {
            assert!((found - p).abs() < 1e-7, "{:?}", target.p);
        }
    }
}
