//! Percentile bootstrap over prompts.
//!
//! A figure is a ratio of sums, Σ value / Σ tokens over all sequences, or Σ right / Σ answers (`accuracy`). Tokens of
//! a sequence are not independent, and neither are several samples of one prompt, so whole prompts are resampled
//! with replacement (a cluster bootstrap; Davison & Hinkley, Bootstrap Methods and their Application, 1997, §3.8).
//! The interval is from the 2.5th to the 97.5th percentile of the ratio over the resamples (§5.3). A difference is
//! paired: both models are evaluated on the same resample, so that the difficulty of a prompt for both cancels.

use std::collections::HashMap;

use potstill_datasets::SequenceValues;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::Error;
use crate::interval::Interval;
use crate::metric::Metric;

/// Sums over one prompt: the denominator (tokens, or answers), and `N` numerators.
pub(crate) struct Cluster<const N: usize> {
    weight: f64,
    sums: [f64; N],
}

/// A ratio over all prompts and over the resamples.
pub(crate) struct ResampledRatio {
    /// Ratio over all prompts.
    pub(crate) mean: f64,
    /// Ratios over the resamples, in ascending order.
    pub(crate) sorted: Vec<f64>,
    /// Number of prompts.
    pub(crate) prompts: usize,
}

impl ResampledRatio {
    /// Percentile interval of the ratio.
    pub(crate) fn interval(&self) -> Interval {
        Interval {
            mean: self.mean,
            low: percentile(&self.sorted, 0.025),
            high: percentile(&self.sorted, 0.975),
            prompts: self.prompts,
        }
    }
}

/// Computes a metric over `values` with its 95 % interval from `resamples` resamples. The same values, `resamples` and
/// `seed` give the same interval.
///
/// # Errors
/// If no sequence has a token, or a value is not finite.
pub fn interval(
    values: &[SequenceValues],
    metric: Metric,
    resamples: usize,
    seed: u64,
) -> Result<Interval, Error> {
    check_finite(values, metric)?;
    mean(values, |value| metric.sum(value), resamples, seed)
}

/// Computes the teacher's negative log-likelihood of the target tokens, nats per token, with its 95 % interval. A
/// student that equals the teacher has this negative log-likelihood. `values` may be those of any student.
///
/// # Errors
/// If no sequence has a token.
pub fn teacher_nll(
    values: &[SequenceValues],
    resamples: usize,
    seed: u64,
) -> Result<Interval, Error> {
    mean(values, |value| value.teacher_nll_nats, resamples, seed)
}

fn mean(
    values: &[SequenceValues],
    sum: impl Fn(&SequenceValues) -> f64,
    resamples: usize,
    seed: u64,
) -> Result<Interval, Error> {
    let sums = values.iter().map(|value| {
        let prompt = value.prompt_id.as_str();
        (prompt, f64::from(value.tokens), [sum(value)])
    });
    let ratio = bootstrap(&clusters(sums), resamples, seed, |tokens, [a]| a / tokens)
        .ok_or(Error::NoTokens)?;
    Ok(ratio.interval())
}

/// Computes the difference a − b of a metric over the same sequences, with its 95 % interval.
///
/// # Errors
/// If the two lists do not have the same sequences with the same token counts in the same order, if no sequence has
/// a token, or if a value is not finite.
pub fn paired(
    a: &[SequenceValues],
    b: &[SequenceValues],
    metric: Metric,
    resamples: usize,
    seed: u64,
) -> Result<Interval, Error> {
    check_finite(a, metric)?;
    check_finite(b, metric)?;
    check_paired(a, b)?;
    let both = a.iter().zip(b).map(|(a, b)| {
        let sums = [metric.sum(a), metric.sum(b)];
        (a.prompt_id.as_str(), f64::from(a.tokens), sums)
    });
    let difference = |tokens, [a, b]: [f64; 2]| (a - b) / tokens;
    let ratio = bootstrap(&clusters(both), resamples, seed, difference).ok_or(Error::NoTokens)?;
    Ok(ratio.interval())
}

fn check_finite(values: &[SequenceValues], metric: Metric) -> Result<(), Error> {
    match values.iter().find(|v| !metric.sum(v).is_finite()) {
        None => Ok(()),
        Some(v) => Err(Error::NotFinite {
            prompt_id: v.prompt_id.clone(),
            sample_index: v.sample_index,
            metric: metric.name(),
            value: metric.sum(v),
        }),
    }
}

fn check_paired(a: &[SequenceValues], b: &[SequenceValues]) -> Result<(), Error> {
    let key = |v: &SequenceValues| (v.prompt_id.clone(), v.sample_index, v.tokens);
    let describe = |v: Option<&SequenceValues>| match v {
        None => "absent".to_owned(),
        Some(v) => format!("{}/{} ({} tokens)", v.prompt_id, v.sample_index, v.tokens),
    };
    let differs = |i: &usize| a.get(*i).map(key) != b.get(*i).map(key);
    match (0..a.len().max(b.len())).find(differs) {
        None => Ok(()),
        Some(position) => Err(Error::NotPaired {
            position,
            left: describe(a.get(position)),
            right: describe(b.get(position)),
        }),
    }
}

/// Adds up (prompt, weight, sums) by prompt, in the order in which prompts first occur. Items of weight 0 are left
/// out.
pub(crate) fn clusters<'a, const N: usize>(
    items: impl Iterator<Item = (&'a str, f64, [f64; N])>,
) -> Vec<Cluster<N>> {
    let mut by_prompt: HashMap<&str, usize> = HashMap::new();
    let mut clusters: Vec<Cluster<N>> = Vec::new();
    for (prompt, weight, sums) in items.filter(|(_, weight, _)| *weight > 0.0) {
        let next = clusters.len();
        let at = *by_prompt.entry(prompt).or_insert(next);
        if at == next {
            clusters.push(Cluster {
                weight: 0.0,
                sums: [0.0; N],
            });
        }
        clusters[at].weight += weight;
        for (total, sum) in clusters[at].sums.iter_mut().zip(sums) {
            *total += sum;
        }
    }
    clusters
}

/// Computes the ratio over `resamples` resamples, each of as many prompts as there are; `None` without prompts.
pub(crate) fn bootstrap<const N: usize>(
    clusters: &[Cluster<N>],
    resamples: usize,
    seed: u64,
    ratio: impl Fn(f64, [f64; N]) -> f64,
) -> Option<ResampledRatio> {
    if clusters.is_empty() {
        return None;
    }
    let total = |picked: &mut dyn Iterator<Item = usize>| {
        let mut weight = 0.0;
        let mut sums = [0.0; N];
        for i in picked {
            weight += clusters[i].weight;
            for (total, sum) in sums.iter_mut().zip(clusters[i].sums) {
                *total += sum;
            }
        }
        ratio(weight, sums)
    };
    let mean = total(&mut (0..clusters.len()));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut sorted: Vec<f64> = (0..resamples.max(1))
        .map(|_| {
            total(
                &mut (0..clusters.len())
                    .map(|_| rng.random_range(0..clusters.len() as u64) as usize),
            )
        })
        .collect();
    sorted.sort_by(f64::total_cmp);
    Some(ResampledRatio {
        mean,
        sorted,
        prompts: clusters.len(),
    })
}

/// Computes a percentile by linear interpolation between the two nearest order statistics.
pub(crate) fn percentile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * (at - at.floor())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(prompt: usize, sample_index: u32, tokens: u32, kl_nats: f64) -> SequenceValues {
        SequenceValues {
            prompt_id: format!("p{prompt}"),
            sample_index,
            tokens,
            kl_nats,
            nll_nats: 2.0 * kl_nats,
            agree: tokens / 2,
            teacher_nll_nats: 0.0,
            teacher_entropy_nats: 1.0,
            confidence: Vec::new(),
            expected: Vec::new(),
        }
    }

    /// Creates sequences whose KL per token is normally distributed with this mean and standard deviation `spread`.
    fn normal(count: usize, mean: f64, spread: f64, seed: u64) -> Vec<SequenceValues> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..count)
            .map(|i| {
                // The sum of twelve uniform numbers has mean 6 and variance 1.
                let z: f64 = (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
                value(i, 0, 10, 10.0 * (mean + spread * z))
            })
            .collect()
    }

    #[test]
    fn the_mean_is_over_tokens_not_over_sequences() {
        let values = [value(0, 0, 1, 1.0), value(1, 0, 9, 0.0)];
        let kl = interval(&values, Metric::Kl, 200, 1).unwrap();
        assert!((kl.mean - 0.1).abs() < 1e-12);
        let nll = interval(&values, Metric::Nll, 200, 1).unwrap();
        assert!((nll.mean - 0.2).abs() < 1e-12);
        let agreement = interval(&values, Metric::Agreement, 200, 1).unwrap();
        assert!((agreement.mean - 0.4).abs() < 1e-12);
    }

    #[test]
    fn the_interval_has_the_width_of_the_normal_approximation() {
        let values = normal(400, 1.0, 0.5, 3);
        let kl = interval(&values, Metric::Kl, 4000, 7).unwrap();
        let half = 1.96 * 0.5 / 20.0;
        assert!((kl.high - kl.mean - half).abs() < 0.2 * half, "{kl:?}");
        assert!((kl.mean - kl.low - half).abs() < 0.2 * half, "{kl:?}");
    }

    #[test]
    fn the_interval_covers_the_truth_in_about_95_percent() {
        let covered = (0..300)
            .filter(|seed| {
                let kl = interval(&normal(40, 1.0, 0.5, *seed), Metric::Kl, 400, 7).unwrap();
                kl.low <= 1.0 && 1.0 <= kl.high
            })
            .count();
        assert!((265..=297).contains(&covered), "{covered} of 300");
    }

    #[test]
    fn pairing_cancels_the_common_part_of_both_models() {
        let a = normal(50, 1.0, 0.5, 3);
        let b: Vec<_> = a
            .iter()
            .map(|v| SequenceValues {
                kl_nats: v.kl_nats + 0.1,
                ..v.clone()
            })
            .collect();
        let difference = paired(&a, &b, Metric::Kl, 500, 7).unwrap();
        assert!((difference.mean + 0.01).abs() < 1e-9);
        assert!(difference.high < 0.0 && difference.high - difference.low < 1e-9);
    }

    #[test]
    fn samples_of_one_prompt_are_resampled_together() {
        let values: Vec<_> = (0..8)
            .flat_map(|p| (0..4).map(move |s| value(p, s, 10, p as f64)))
            .collect();
        let one_each: Vec<_> = (0..8).map(|p| value(p, 0, 40, 4.0 * p as f64)).collect();
        assert_eq!(
            interval(&values, Metric::Kl, 300, 5).unwrap(),
            interval(&one_each, Metric::Kl, 300, 5).unwrap()
        );
    }

    #[test]
    fn the_same_seed_gives_the_same_interval() {
        let values = normal(30, 1.0, 0.5, 3);
        let measure = || interval(&values, Metric::Kl, 300, 11).unwrap();
        assert_eq!(measure(), measure());
    }

    #[test]
    fn one_sequence_gives_a_point() {
        let kl = interval(&[value(0, 0, 4, 2.0)], Metric::Kl, 100, 1).unwrap();
        assert_eq!((kl.low, kl.mean, kl.high, kl.prompts), (0.5, 0.5, 0.5, 1));
    }

    #[test]
    fn errors_name_the_sequence() {
        let empty = interval(&[value(0, 0, 0, 0.0)], Metric::Kl, 100, 1);
        assert!(matches!(empty, Err(Error::NoTokens)));
        let broken = [value(0, 0, 4, 1.0), value(1, 2, 4, f64::NAN)];
        assert_eq!(
            interval(&broken, Metric::Kl, 100, 1)
                .unwrap_err()
                .to_string(),
            "prompt p1, sample 2: KL is NaN\nhint: the model's weights or its outputs are not finite; train with a lower learning_rate"
        );
        let a = [value(0, 0, 4, 1.0), value(1, 0, 4, 1.0)];
        let b = [value(0, 0, 4, 1.0), value(1, 1, 4, 1.0)];
        assert_eq!(
            paired(&a, &b, Metric::Kl, 100, 1).unwrap_err().to_string(),
            "two models were not measured over the same sequences: number 1 is p1/0 (4 tokens) for one and p1/1 (4 tokens) for the other\nhint: run `eval` again"
        );
        assert!(paired(&a, &b[..1], Metric::Kl, 100, 1).is_err());
    }
}
