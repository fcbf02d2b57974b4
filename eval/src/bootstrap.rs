//! Bootstrap over prompts, for figures that are not a mean, such as the expected calibration error.
//!
//! Tokens of a sequence are not independent, and neither are several samples of one prompt, so whole prompts are resampled
//! with replacement (a cluster bootstrap; Davison & Hinkley, Bootstrap Methods and their Application, 1997, §3.8). Means
//! and differences of means have intervals in closed form (`estimate`).

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

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

    #[test]
    fn resamples_are_of_whole_prompts_and_repeatable() {
        let items = || (0..8).flat_map(|p| (0..4).map(move |_| (NAMES[p], 10.0, [p as f64])));
        let one_each = (0..8).map(|p| (NAMES[p], 40.0, [4.0 * p as f64]));
        let ratio = |clusters: &[Cluster<1>]| {
            let ratio = bootstrap(clusters, 300, 5, |weight, [sum]| sum / weight).unwrap();
            (ratio.mean, ratio.sorted)
        };
        let found = ratio(&clusters(items()));
        assert_eq!(found, ratio(&clusters(one_each)));
        assert_eq!(found, ratio(&clusters(items())));
        assert!((found.0 - 0.35).abs() < 1e-12);
        // The standard deviation of 0 to 7 is 2.29, over 10 tokens and √8 prompts.
        let (low, high) = (percentile(&found.1, 0.025), percentile(&found.1, 0.975));
        assert!(
            (high - low - 2.0 * 1.96 * 0.0810).abs() < 0.05,
            "{low} {high}"
        );
        assert!(bootstrap(&clusters::<1>([].into_iter()), 9, 1, |w, [s]| s / w).is_none());
    }

    const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
}
