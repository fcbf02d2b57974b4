//! The teacher's side of the loss: distributions over a support and one bucket for the rest, or
//! weights on a support and on draws from the rest.

use potstill_datasets::{Signal, SignalRow};
use potstill_kernels::TAIL_FLOOR_NATS;

use crate::error::Error;
use crate::loss::Tail;

/// The distributions of one sequence, one a loss position, in order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Target {
    /// In the order of the loss positions.
    pub rows: Vec<TargetRow>,
}

/// A distribution on the coarse vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct TargetRow {
    /// The support.
    pub ids: Vec<u32>,
    /// Probability of each; of a drawn token, its weight.
    pub p: Vec<f64>,
    /// Probability of everything else, at least 2⁻⁶⁰, so that all sum to 1; 0 where draws stand for it.
    pub tail: f64,
    /// Entropy of the whole distribution at temperature 1, nats: with it, weighted draws estimate the KL.
    pub entropy: f64,
}

impl Target {
    /// From a stored signal. With [`Tail::Draws`], each drawn token has the weight tail · count / m, so
    /// that Σ weight · f(token) is Σ p · f over the whole vocabulary on average; with the others, tail =
    /// 1 − Σ, in f64. A sum over 1, by rounding, is rescaled; how many rows were is returned beside
    /// the target.
    ///
    /// At a `temperature` other than 1 the signal's `log_z_at` holds one number, that of the temperature.
    ///
    /// # Errors
    /// As [`Signal::validate`]; [`Error::NoTemperature`] and [`Error::NoDraws`] where the record does not
    /// have what is asked for.
    pub fn new(signal: &Signal, tail: Tail, temperature: f64) -> Result<(Self, usize), Error> {
        signal.validate()?;
        let mut rescaled = 0;
        let mut rows = Vec::with_capacity(signal.rows.len());
        for row in &signal.rows {
            let missing = || (signal.prompt_id.clone(), signal.sample_index);
            let Some((mut target, was)) = at_temperature(row, temperature) else {
                let (prompt_id, sample_index) = missing();
                return Err(Error::NoTemperature {
                    temperature,
                    prompt_id,
                    sample_index,
                });
            };
            rescaled += usize::from(was);
            if tail == Tail::Draws && !put_draws(&mut target, row) {
                let (prompt_id, sample_index) = missing();
                return Err(Error::NoDraws {
                    prompt_id,
                    sample_index,
                });
            }
            rows.push(target);
        }
        Ok((Self { rows }, rescaled))
    }
}

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

/// Puts draws in the tail's place; false where there are none though the tail has mass.
fn put_draws(target: &mut TargetRow, row: &SignalRow) -> bool {
    let m: f64 = row.draw_counts.iter().map(|count| f64::from(*count)).sum();
    // The stored mass, which has digits that 1 − Σ has not.
    let mass = f64::from(row.tail_logprob).exp();
    target.tail = 0.0;
    target.ids.extend(&row.draw_ids);
    let weight = |count: &u32| mass * f64::from(*count) / m;
    target.p.extend(row.draw_counts.iter().map(weight));
    m > 0.0 || mass == 0.0
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

    /// p = (0.5, 0.3, 0.2) at T = 2 from the stored log-probabilities and log Σ p^(1/2).
    #[test]
    fn another_temperature_takes_its_own_normaliser() {
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
        assert!(!put_draws(&mut target.clone(), &stored));
        (stored.draw_ids, stored.draw_counts) = (vec![7, 9], vec![3, 1]);
        assert!(put_draws(&mut target, &stored));
        assert_eq!(target.ids, [0, 1, 7, 9]);
        assert_eq!(target.tail, 0.0);
        for (found, p) in target.p.iter().zip([0.5, 0.25, 0.1875, 0.0625]) {
            assert!((found - p).abs() < 1e-7, "{:?}", target.p);
        }
    }
}
