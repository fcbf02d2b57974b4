//! The teacher's side of the loss: distributions over a support and one bucket for the rest.

use potstill_datasets::{Signal, SignalRow};
use potstill_kernels::TAIL_FLOOR_NATS;

/// The distributions of one sequence, one a loss position, in order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Target {
    /// In the order of the loss positions.
    pub rows: Vec<TargetRow>,
}

/// A distribution on the coarse vocabulary; it sums to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct TargetRow {
    /// The support.
    pub ids: Vec<u32>,
    /// Probability of each.
    pub p: Vec<f64>,
    /// Probability of everything else, at least 2⁻⁶⁰.
    pub tail: f64,
}

impl Target {
    /// From a stored signal with the convention "tail bucket": tail = 1 − Σ, in f64. A sum over 1,
    /// by rounding, is rescaled; how many rows were is returned beside the target.
    ///
    /// # Errors
    /// As [`Signal::validate`].
    pub fn tail_bucket(signal: &Signal) -> Result<(Self, usize), potstill_datasets::Error> {
        signal.validate()?;
        let mut rescaled = 0;
        let rows = signal.rows.iter().map(|row| {
            let (row, was) = tail_bucket(row);
            rescaled += usize::from(was);
            row
        });
        let rows = rows.collect();
        Ok((Self { rows }, rescaled))
    }
}

fn tail_bucket(row: &SignalRow) -> (TargetRow, bool) {
    let mut p: Vec<f64> = row.logprobs.iter().map(|&l| f64::from(l).exp()).collect();
    let sum: f64 = p.iter().sum();
    let rescaled = sum > 1.0;
    if rescaled {
        p.iter_mut().for_each(|p| *p /= sum);
    }
    let tail = (1.0 - sum).max(TAIL_FLOOR_NATS.exp());
    (
        TargetRow {
            ids: row.ids.clone(),
            p,
            tail,
        },
        rescaled,
    )
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
            let (target, _) = tail_bucket(&row(&p));
            let sum: f64 = target.p.iter().sum::<f64>() + target.tail;
            assert!((sum - 1.0).abs() < 1e-12, "{sum}");
            assert!(target.tail >= 2f64.powi(-60) * 0.999);
        }
    }

    #[test]
    fn a_sum_over_one_is_rescaled_and_counted() {
        assert!(tail_bucket(&row(&[0.9, 0.1005])).1);
        assert!(!tail_bucket(&row(&[0.9, 0.05])).1);
    }
}
