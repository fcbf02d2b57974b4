//! Sign-flip tests: exact tests of a paired difference that assume no distribution.
//!
//! If two models do not differ, a prompt's sums might as well be those of the other model. The p-value is the share of
//! all such exchanges whose difference is at least as large as the measured one (Fisher 1935, The Design of Experiments,
//! §21). For one answer for each prompt this is the exact form of McNemar's test.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::estimate::WeightedSum;

/// Largest number of prompts for which all exchanges are enumerated.
const ENUMERATED: usize = 12;

/// Number of exchanges that are drawn at random for more prompts. The standard error of p = 0.05 is then 0.002.
const DRAWS: u64 = 9_999;

/// Seed of the random exchanges, so that a report can be computed again.
const SEED: u64 = 18;

/// Differences within this share of the measured one count as equal to it: their sums were rounded differently.
const ROUNDING: f64 = 1e-9;

/// Returns the p-value of the difference of two ratios, from the sums of each prompt for both models. At most 64 prompts
/// are exchanged.
pub(crate) fn sign_flip(left: &[WeightedSum], right: &[WeightedSum]) -> f64 {
    let total =
        |cells: &[WeightedSum], part: fn(&WeightedSum) -> f64| cells.iter().map(part).sum::<f64>();
    let (left_value, left_weight) = (total(left, |c| c.value), total(left, |c| c.weight));
    let (right_value, right_weight) = (total(right, |c| c.value), total(right, |c| c.weight));
    let steps: Vec<(f64, f64)> = left
        .iter()
        .zip(right)
        .map(|(l, r)| (r.value - l.value, r.weight - l.weight))
        .collect();
    let difference = |exchanged: u64| {
        let (mut value, mut weight) = (0.0, 0.0);
        for (i, step) in steps.iter().take(64).enumerate() {
            // A branch on random bits would be mispredicted half of the time.
            let is_exchanged = (exchanged >> i & 1) as f64;
            value += is_exchanged * step.0;
            weight += is_exchanged * step.1;
        }
        let left = (left_value + value) / (left_weight + weight);
        (left - (right_value - value) / (right_weight - weight)).abs()
    };
    let bound = difference(0) * (1.0 - ROUNDING);
    if steps.len() <= ENUMERATED {
        let all = 1_u64 << steps.len();
        let extreme = (0..all).filter(|exchanged| difference(*exchanged) >= bound);
        return extreme.count() as f64 / all as f64;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let extreme = (0..DRAWS).filter(|_| difference(rng.next_u64()) >= bound);
    // The measured assignment is one of the exchanges.
    (1 + extreme.count()) as f64 / (1 + DRAWS) as f64
}

/// Returns the exact p-value of a sum of whole differences, one for each prompt, for any number of prompts.
pub(crate) fn sign_flip_counts(differences: &[i64]) -> f64 {
    let total: i64 = differences.iter().sum();
    let reach: u64 = differences.iter().map(|d| d.unsigned_abs()).sum();
    // Probability of each sum, from −reach to reach.
    let mut probability = vec![0.0; 2 * reach as usize + 1];
    probability[reach as usize] = 1.0;
    let mut next = probability.clone();
    for step in differences.iter().map(|d| d.unsigned_abs() as usize) {
        if step == 0 {
            continue;
        }
        let at = |i: Option<usize>| i.and_then(|i| probability.get(i)).copied().unwrap_or(0.0);
        for (i, new) in next.iter_mut().enumerate() {
            *new = 0.5 * (at(i.checked_sub(step)) + at(Some(i + step)));
        }
        std::mem::swap(&mut probability, &mut next);
    }
    let distance = |i: usize| (i as i64 - reach as i64).unsigned_abs();
    let extreme = probability.iter().enumerate();
    let extreme = extreme.filter(|(i, _)| distance(*i) >= total.unsigned_abs());
    extreme.map(|(_, p)| p).sum::<f64>().min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(prompts: usize, own_weights: bool) -> (Vec<WeightedSum>, Vec<WeightedSum>) {
        let share = |value: usize, period: usize, scale: f64| (value % period) as f64 / scale;
        let left = |i: usize| {
            let weight = 10.0 + share(7 * i, 5, 1.0);
            let mean = 1.0 + share(5 * i, 7, 10.0) + share(3 * i, 4, 40.0);
            WeightedSum {
                value: weight * mean,
                weight,
            }
        };
        let right = |i: usize| {
            let weight = match own_weights {
                true => 10.0 + share(3 * i, 4, 1.0),
                false => 10.0 + share(7 * i, 5, 1.0),
            };
            let mean = 1.1 + share(5 * i, 7, 12.0) + share(2 * i, 5, 50.0);
            WeightedSum {
                value: weight * mean,
                weight,
            }
        };
        (
            (0..prompts).map(left).collect(),
            (0..prompts).map(right).collect(),
        )
    }

    /// python: itertools.product over all exchanges, and scipy.stats.permutation_test with permutation_type="samples"
    #[test]
    fn p_values_equal_those_of_scipy() {
        for (prompts, own_weights, expected) in [
            (8, false, 0.03125),
            (8, true, 0.0546875),
            (12, false, 0.00732421875),
        ] {
            let (left, right) = cells(prompts, own_weights);
            assert_eq!(
                sign_flip(&left, &right),
                expected,
                "{prompts} {own_weights}"
            );
        }
    }

    #[test]
    fn drawn_exchanges_approximate_all_of_them() {
        let (left, right) = cells(20, false);
        let steps = || left.iter().zip(&right).map(|(l, r)| l.value - r.value);
        let total = steps().sum::<f64>().abs();
        let steps: Vec<f64> = steps().collect();
        let extreme = (0..1_u32 << 20).filter(|exchanged| {
            let sign = |i: usize| if exchanged >> i & 1 == 1 { -1.0 } else { 1.0 };
            let sum: f64 = steps.iter().enumerate().map(|(i, d)| sign(i) * d).sum();
            sum.abs() >= total - 1e-9
        });
        let exact = extreme.count() as f64 / f64::from(1 << 20);
        let found = sign_flip(&left, &right);
        let error = (exact * (1.0 - exact) / DRAWS as f64).sqrt();
        assert!(
            (found - exact).abs() < 4.0 * error + 1e-4,
            "{found} instead of {exact}"
        );
        assert_eq!(found, sign_flip(&left, &right));
    }

    #[test]
    fn for_one_answer_it_is_the_exact_form_of_mcnemar() {
        // python: scipy.stats.binomtest(3, 14).pvalue and binomtest(40, 60).pvalue; ties do not count.
        for (left_only, right_only, expected) in
            [(3, 11, 0.057_373_046_875), (40, 20, 0.013_489_293_731)]
        {
            let mut differences = vec![1; left_only];
            differences.extend(vec![-1; right_only]);
            differences.extend([0; 100]);
            let found = sign_flip_counts(&differences);
            assert!(
                (found - expected).abs() < 1e-10,
                "{found} instead of {expected}"
            );
        }
        assert_eq!(sign_flip_counts(&[0; 5]), 1.0);
        assert_eq!(sign_flip_counts(&[]), 1.0);
        // python: scipy.stats.permutation_test, permutation_type="samples"
        assert_eq!(
            sign_flip_counts(&[3, -1, 2, 0, 2, 1, -1, 3, 1, 2]),
            0.0546875
        );
    }
}
