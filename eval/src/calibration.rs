//! Calibration: whether a model that gives a token 80 % expects it as often as the teacher does.
//!
//! At each position, q is the model's probability and p the teacher's probability of the teacher's most probable token
//! ([`SequenceValues::confidence`], [`SequenceValues::expected`]). Two figures compare them. The mean distance
//! Σ |q − p| / n is 0 only if the model gives every such token the teacher's probability. The expected calibration error
//! (Guo et al. 2017, arXiv 1706.04599, eq. 3) is Σ_b (n_b / n) · |mean p in b − mean q in b|, so a model that is too
//! confident at some positions and not confident enough at others of the same confidence has no error. Without the
//! teacher's distributions, q is the probability of the model's own most probable token and p is 1 or 0, whether it is
//! the target token; there is no distance then.
//!
//! The bins hold equally many tokens: their borders are the deciles of q over all tokens. Bins of equal width would put
//! most tokens of a good model into one bin (Nixon et al. 2019, arXiv 1904.01685, §3). Equal values of q share a bin, so
//! there are fewer bins if many are equal.
//!
//! |·| is convex, so the calibration errors of bootstrap resamples are biased upwards. Their interval is therefore the
//! basic one, 2·figure − percentile (Davison & Hinkley, 1997, §5.2), which removes this bias, clamped to at least 0 and
//! widened to include the figure. The distance is a mean and has no such bias.

use serde::{Deserialize, Serialize};

use potstill_datasets::SequenceValues;

use crate::bootstrap::{bootstrap, clusters, percentile};
use crate::error::Error;
use crate::estimate::Estimate;
use crate::figures::token_sums;
use crate::interval::Interval;

/// Largest number of bins.
pub const BINS: usize = 10;

/// Calibration of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Mean of |q − p|, 0 to 1; `None` if the teacher's distributions are not stored.
    pub distance: Option<Interval>,
    /// Expected calibration error, 0 to 1.
    pub error: Interval,
    /// The reliability table, without empty bins.
    pub bins: Vec<ReliabilityBin>,
}

/// A row of the reliability table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReliabilityBin {
    /// Lowest q of the bin's tokens.
    pub from: f64,
    /// Highest q of the bin's tokens.
    pub to: f64,
    /// Number of tokens in the bin, at least 1.
    pub tokens: u64,
    /// Mean of q, 0 to 1.
    pub confidence: f64,
    /// Mean of p, 0 to 1; without distributions the share of right predictions.
    pub expected: f64,
}

/// Computes the reliability table over all sequences, the mean distance if `has_distributions`, and the expected
/// calibration error, whose 95 % interval is from `resamples` resamples of prompts.
///
/// # Errors
/// If no sequence has a token, or if a sequence does not have two probabilities in 0 to 1 for each token.
pub fn calibration(
    sequences: &[SequenceValues],
    has_distributions: bool,
    resamples: usize,
    seed: u64,
) -> Result<Calibration, Error> {
    if let Some(broken) = sequences.iter().find(|sequence| !is_sound(sequence)) {
        return Err(Error::Probabilities {
            prompt_id: broken.prompt_id.clone(),
            sample_index: broken.sample_index,
        });
    }
    let borders = borders(sequences);
    let bin = |q: f32| borders.partition_point(|border| *border <= q);
    let gaps = sequences.iter().map(|sequence| {
        let mut gaps = [0.0; BINS];
        for (q, p) in pairs(sequence) {
            gaps[bin(q)] += f64::from(p) - f64::from(q);
        }
        let prompt = sequence.prompt_id.as_str();
        (prompt, f64::from(sequence.tokens), gaps)
    });
    let ratio = bootstrap(&clusters(gaps), resamples, seed, |tokens, gaps| {
        gaps.iter().map(|gap| gap.abs()).sum::<f64>() / tokens
    })
    .ok_or(Error::NoTokens)?;
    let mean = ratio.mean;
    let error = Interval {
        mean,
        low: (2.0 * mean - percentile(&ratio.sorted, 0.975)).clamp(0.0, mean),
        high: (2.0 * mean - percentile(&ratio.sorted, 0.025)).max(mean),
        prompts: ratio.prompts,
    };
    let distance = match has_distributions {
        true => Some(Estimate::of(&token_sums(sequences, distance)?).interval()),
        false => None,
    };
    Ok(Calibration {
        distance,
        error,
        bins: reliability(sequences, bin),
    })
}

/// Sums |q − p| over the tokens of a sequence.
pub(crate) fn distance(sequence: &SequenceValues) -> f64 {
    pairs(sequence)
        .map(|(q, p)| (f64::from(q) - f64::from(p)).abs())
        .sum()
}

fn pairs(sequence: &SequenceValues) -> impl Iterator<Item = (f32, f32)> {
    let expected = sequence.expected.iter().copied();
    sequence.confidence.iter().copied().zip(expected)
}

fn is_sound(sequence: &SequenceValues) -> bool {
    let lengths = [sequence.confidence.len(), sequence.expected.len()];
    lengths == [sequence.tokens as usize; 2]
        && pairs(sequence).all(|(q, p)| (0.0..=1.0).contains(&q) && (0.0..=1.0).contains(&p))
}

/// Returns the lowest q of each bin except the first, in ascending order: the deciles of q over all tokens.
fn borders(sequences: &[SequenceValues]) -> Vec<f32> {
    let mut sorted: Vec<f32> = (sequences.iter())
        .flat_map(|sequence| sequence.confidence.iter().copied())
        .collect();
    sorted.sort_unstable_by(f32::total_cmp);
    let deciles = (1..BINS).map(|k| sorted.get(k * sorted.len() / BINS).copied());
    deciles.flatten().collect()
}

fn reliability(sequences: &[SequenceValues], bin: impl Fn(f32) -> usize) -> Vec<ReliabilityBin> {
    let empty = ReliabilityBin {
        from: f64::INFINITY,
        to: f64::NEG_INFINITY,
        tokens: 0,
        confidence: 0.0,
        expected: 0.0,
    };
    let mut bins = vec![empty; BINS];
    for (q, p) in sequences.iter().flat_map(pairs) {
        let bin = &mut bins[bin(q)];
        let (q, p) = (f64::from(q), f64::from(p));
        (bin.from, bin.to) = (bin.from.min(q), bin.to.max(q));
        bin.tokens += 1;
        bin.confidence += q;
        bin.expected += p;
    }
    bins.retain(|bin| bin.tokens > 0);
    for bin in &mut bins {
        bin.confidence /= bin.tokens as f64;
        bin.expected /= bin.tokens as f64;
    }
    bins
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn sequence(prompt: usize, pairs: &[(f32, f32)]) -> SequenceValues {
        SequenceValues {
            prompt_id: format!("p{prompt}"),
            sample_index: 0,
            tokens: pairs.len() as u32,
            kl_nats: 0.0,
            nll_nats: 0.0,
            agree: 0,
            teacher_nll_nats: 0.0,
            teacher_entropy_nats: 0.0,
            confidence: pairs.iter().map(|(q, _)| *q).collect(),
            expected: pairs.iter().map(|(_, p)| *p).collect(),
        }
    }

    /// Generates 40 tokens a prompt of uniform confidence c in 0.1 to 1, which are right with probability `right(c)`.
    fn drawn(prompts: usize, right: impl Fn(f32) -> f32, seed: u64) -> Vec<SequenceValues> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut token = || {
            let c = 0.1 + 0.9 * rng.random::<f32>();
            (c, f32::from(u8::from(rng.random::<f32>() < right(c))))
        };
        let mut tokens = || (0..40).map(|_| token()).collect::<Vec<_>>();
        (0..prompts).map(|i| sequence(i, &tokens())).collect()
    }

    /// Tokens of fixed, uneven and partly equal probabilities, the same as in the Python below.
    fn fixed() -> Vec<SequenceValues> {
        let token = |i: u32| {
            let q = ((i * 37 % 101) as f32 / 101.0).min(0.75);
            let p = (i * 53 % 97) as f32 / 97.0;
            (q, p)
        };
        let tokens: Vec<_> = (0..257).map(token).collect();
        let chunks = tokens.chunks(20).enumerate();
        chunks.map(|(i, chunk)| sequence(i, chunk)).collect()
    }

    #[test]
    fn the_figures_equal_those_of_numpy() {
        // python: i = arange(257); q = minimum((i*37%101)/101, 0.75); p = (i*53%97)/97 in float32;
        // borders = sort(q)[[k*257//10 for k in 1..9]]; b = searchsorted(borders, q, side="right")
        let found = calibration(&fixed(), true, 200, 7).unwrap();
        let distance = found.distance.unwrap();
        assert!((distance.mean - 0.300946566182).abs() < 1e-9, "{found:?}");
        assert!(
            (found.error.mean - 0.224447331601).abs() < 1e-9,
            "{found:?}"
        );
        assert!(distance.low < distance.mean && distance.mean < distance.high);
        let expected = [
            (23, 0.000000000, 0.079207920, 0.037882049, 0.466606895),
            (28, 0.089108914, 0.188118815, 0.136845829, 0.400957282),
            (25, 0.198019803, 0.287128717, 0.241584162, 0.462268031),
            (26, 0.297029704, 0.386138618, 0.341584159, 0.541633613),
            (26, 0.396039605, 0.485148519, 0.440594060, 0.603885793),
            (25, 0.495049506, 0.584158421, 0.540594074, 0.454020608),
            (25, 0.594059408, 0.683168292, 0.639603949, 0.453195869),
            (15, 0.693069279, 0.742574275, 0.717491762, 0.496219924),
            (64, 0.750000000, 0.750000000, 0.750000000, 0.510631433),
        ];
        assert_eq!(found.bins.len(), expected.len(), "equal values share a bin");
        for (bin, (tokens, from, to, confidence, expected)) in found.bins.iter().zip(expected) {
            assert_eq!(bin.tokens, tokens);
            let found = [bin.from, bin.to, bin.confidence, bin.expected];
            for (found, expected) in found.iter().zip([from, to, confidence, expected]) {
                assert!((found - expected).abs() < 1e-8, "{bin:?}");
            }
        }
    }

    #[test]
    fn without_distributions_there_is_no_distance() {
        let found = calibration(&drawn(5, |c| c, 3), false, 50, 7).unwrap();
        assert_eq!(found.distance, None);
    }

    #[test]
    fn a_calibrated_model_has_a_small_error_and_a_small_lower_end() {
        let found = calibration(&drawn(300, |c| c, 1), false, 1000, 7).unwrap();
        assert!(
            found.error.mean < 0.02 && found.error.low < 0.005,
            "{found:?}"
        );
        assert!(found.bins.iter().all(|bin| bin.tokens == 1200), "{found:?}");
    }

    #[test]
    fn the_interval_of_an_overconfident_model_covers_the_truth() {
        // Tokens are right with probability c − 0.1, so the error is 0.1.
        let covered = (0..100)
            .filter(|seed| {
                let found = calibration(&drawn(60, |c| c - 0.1, *seed), false, 300, 7).unwrap();
                found.error.low <= 0.1 && 0.1 <= found.error.high
            })
            .count();
        assert!((85..=100).contains(&covered), "{covered} of 100");
    }

    #[test]
    fn probabilities_that_are_not_one_for_each_token_are_errors() {
        let mut broken = drawn(3, |c| c, 1);
        broken[1].expected.pop();
        assert_eq!(
            calibration(&broken, true, 10, 7).unwrap_err().to_string(),
            "prompt p1, sample 0: the probabilities for calibration are not one in 0 to 1 for each token\nhint: run `eval` again"
        );
        for wrong in [f32::NAN, 1.5, -0.1] {
            let mut broken = drawn(3, |c| c, 1);
            broken[2].confidence[4] = wrong;
            let error = calibration(&broken, true, 10, 7).unwrap_err();
            assert!(matches!(error, Error::Probabilities { .. }), "{wrong}");
        }
        assert!(matches!(
            calibration(&[], true, 10, 1),
            Err(Error::NoTokens)
        ));
    }
}
