//! Percentile bootstrap over prompts.
//!
//! A figure is a ratio of sums, Σ value / Σ tokens over all sequences, or Σ right /
//! Σ answers (`accuracy`). Tokens of a
//! sequence are not independent, and neither are several samples of one prompt, so
//! whole prompts are drawn with replacement (a cluster bootstrap; Davison & Hinkley,
//! Bootstrap Methods and their Application, 1997, §3.8), and the interval is from the
//! 2.5th to the 97.5th percentile of the ratio over the draws (§5.3). For a
//! difference both students are evaluated on each draw: paired, so what makes a
//! prompt hard for both cancels.

use std::collections::HashMap;

use potstill_datasets::SequenceValues;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{Error, Metric};

/// Fewest prompts behind a claim. With five, even five differences of the same sign
/// come about by chance in 2·2⁻⁵ = 6 % of cases; with six in 3 %.
pub const MIN_PROMPTS: usize = 6;

/// A mean with its 95 % interval, in the metric's unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The ratio over all sequences.
    pub mean: f64,
    /// 2.5th percentile over the draws.
    pub low: f64,
    /// 97.5th percentile over the draws.
    pub high: f64,
    /// How many prompts were drawn from.
    pub prompts: usize,
}

/// One prompt's sums: what is divided by (tokens, or answers), and `N` sums over them.
pub(crate) struct Cluster<const N: usize> {
    weight: f64,
    sums: [f64; N],
}

/// A ratio over all prompts, and over each draw, ascending.
pub(crate) struct Draws {
    pub(crate) mean: f64,
    pub(crate) sorted: Vec<f64>,
    pub(crate) prompts: usize,
}

impl Draws {
    /// The percentile interval.
    pub(crate) fn interval(&self) -> Interval {
        Interval {
            mean: self.mean,
            low: percentile(&self.sorted, 0.025),
            high: percentile(&self.sorted, 0.975),
            prompts: self.prompts,
        }
    }
}

/// A metric over `values` with its 95 % interval from `resamples` draws. The same
/// values, `resamples` and `seed` give the same interval.
///
/// # Errors
/// When no sequence has a token, or a value is not finite.
pub fn interval(
    values: &[SequenceValues],
    metric: Metric,
    resamples: usize,
    seed: u64,
) -> Result<Interval, Error> {
    check_finite(values, metric)?;
    mean(values, |value| metric.sum(value), resamples, seed)
}

/// The teacher's own negative log-likelihood, nats a token, with its 95 % interval: what
/// a student that equals the teacher would reach. Any one student's values give the same.
///
/// # Errors
/// When no sequence has a token.
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
    let draws = bootstrap(&clusters(sums), resamples, seed, |tokens, [a]| a / tokens)
        .ok_or(Error::NoTokens)?;
    Ok(draws.interval())
}

/// The difference a − b of a metric over the same sequences, with its 95 % interval.
///
/// # Errors
/// When the two lists are not of the same sequences with the same token counts in the
/// same order, when no sequence has a token, or when a value is not finite.
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
    let draws = bootstrap(&clusters(both), resamples, seed, difference).ok_or(Error::NoTokens)?;
    Ok(draws.interval())
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

/// Sums by prompt of (prompt, weight, sums), in the order in which prompts first appear.
/// What weighs nothing is left out.
pub(crate) fn clusters<'a, const N: usize>(
    items: impl Iterator<Item = (&'a str, f64, [f64; N])>,
) -> Vec<Cluster<N>> {
    let mut of_prompt: HashMap<&str, usize> = HashMap::new();
    let mut clusters: Vec<Cluster<N>> = Vec::new();
    for (prompt, weight, sums) in items.filter(|(_, weight, _)| *weight > 0.0) {
        let next = clusters.len();
        let at = *of_prompt.entry(prompt).or_insert(next);
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

/// The ratio over `resamples` draws of as many prompts as there are; none without prompts.
pub(crate) fn bootstrap<const N: usize>(
    clusters: &[Cluster<N>],
    resamples: usize,
    seed: u64,
    ratio: impl Fn(f64, [f64; N]) -> f64,
) -> Option<Draws> {
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
    Some(Draws {
        mean,
        sorted,
        prompts: clusters.len(),
    })
}

/// Linear interpolation between the two nearest order statistics.
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
        }
    }

    /// Sequences whose KL a token is standard normal times `spread` plus `mean`.
    fn normal(count: usize, mean: f64, spread: f64, seed: u64) -> Vec<SequenceValues> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..count)
            .map(|i| {
                // Sum of twelve uniforms: mean 6, variance 1.
                let z: f64 = (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
                value(i, 0, 10, 10.0 * (mean + spread * z))
            })
            .collect()
    }

    #[test]
    fn the_mean_weighs_tokens_not_sequences() {
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
    fn pairing_cancels_what_both_share() {
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
    fn samples_of_one_prompt_are_drawn_together() {
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
        let again = || interval(&values, Metric::Kl, 300, 11).unwrap();
        assert_eq!(again(), again());
    }

    #[test]
    fn one_sequence_gives_a_point() {
        let kl = interval(&[value(0, 0, 4, 2.0)], Metric::Kl, 100, 1).unwrap();
        assert_eq!((kl.low, kl.mean, kl.high, kl.prompts), (0.5, 0.5, 0.5, 1));
    }

    #[test]
    fn bad_values_are_named() {
        let empty = interval(&[value(0, 0, 0, 0.0)], Metric::Kl, 100, 1);
        assert!(matches!(empty, Err(Error::NoTokens)));
        let broken = [value(0, 0, 4, 1.0), value(1, 2, 4, f64::NAN)];
        insta::assert_snapshot!(
            interval(&broken, Metric::Kl, 100, 1).unwrap_err(),
            @"sequence 2 of prompt p1 has KL NaN: the model that was measured is broken there"
        );
        let a = [value(0, 0, 4, 1.0), value(1, 0, 4, 1.0)];
        let b = [value(0, 0, 4, 1.0), value(1, 1, 4, 1.0)];
        insta::assert_snapshot!(
            paired(&a, &b, Metric::Kl, 100, 1).unwrap_err(),
            @"the two students were not measured over the same sequences: number 1 is p1/0 (4 tokens) on one side and p1/1 (4 tokens) on the other; run `eval` for both again"
        );
        assert!(paired(&a, &b[..1], Metric::Kl, 100, 1).is_err());
    }
}
