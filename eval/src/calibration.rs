//! Calibration: whether predictions with a confidence of 80 % are right in 80 % of cases.
//!
//! Tokens are counted in ten bins of equal width by the probability of the model's most likely token. The expected
//! calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3) is Σ_b (n_b / n) · |share right in b − mean confidence
//! in b|. A prediction is right if the most likely token is the target token.
//!
//! |·| is convex, so the errors of bootstrap resamples are biased upwards. The interval is therefore the basic one,
//! 2·figure − percentile (Davison & Hinkley, 1997, §5.2), which removes this bias, clamped to at least 0 and widened to
//! include the figure.

use serde::{Deserialize, Serialize};

use crate::bootstrap::{bootstrap, clusters, percentile};
use crate::error::Error;
use crate::interval::Interval;

/// Number of confidence bins, `[0, 0.1)` to `[0.9, 1]`.
pub const BINS: usize = 10;

/// Tokens of one sequence by confidence; each list has [`BINS`] entries.
#[derive(Debug, Clone, Copy)]
pub struct SequenceBins<'a> {
    /// Id of the prompt.
    pub prompt_id: &'a str,
    /// Number of tokens in each bin.
    pub tokens: &'a [u32],
    /// Sum of the confidence, the probability of the most likely token, in each bin.
    pub confidence: &'a [f64],
    /// Number of tokens in each bin at which the most likely token is the target token.
    pub correct: &'a [u32],
}

/// Calibration of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Expected calibration error, 0 to 1.
    pub error: Interval,
    /// The reliability table, without empty bins.
    pub bins: Vec<ReliabilityBin>,
}

/// A row of the reliability table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReliabilityBin {
    /// Lowest confidence of the bin.
    pub from: f64,
    /// Highest confidence of the bin.
    pub to: f64,
    /// Number of tokens in the bin, at least 1.
    pub tokens: u64,
    /// Mean confidence, 0 to 1.
    pub confidence: f64,
    /// Share of right predictions, 0 to 1.
    pub accuracy: f64,
}

/// Computes the reliability table over all sequences, and the expected calibration error with its 95 % interval from
/// `resamples` resamples of prompts.
///
/// # Errors
/// If no sequence has a token, or if the bins of a sequence are not counts of the same tokens.
pub fn calibration(
    sequences: &[SequenceBins],
    resamples: usize,
    seed: u64,
) -> Result<Calibration, Error> {
    if let Some(broken) = sequences.iter().find(|sequence| !is_sound(sequence)) {
        return Err(Error::Bins {
            prompt_id: broken.prompt_id.to_owned(),
        });
    }
    let gaps = sequences.iter().map(|sequence| {
        let mut gaps = [0.0; BINS];
        let both = sequence.confidence.iter().zip(sequence.correct);
        for (gap, (confidence, correct)) in gaps.iter_mut().zip(both) {
            *gap = f64::from(*correct) - confidence;
        }
        let tokens: f64 = sequence.tokens.iter().copied().map(f64::from).sum();
        (sequence.prompt_id, tokens, gaps)
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
    let bins = (0..BINS).filter_map(|b| bin(sequences, b)).collect();
    Ok(Calibration { error, bins })
}

/// Checks the bins of a sequence. Rounding may make a sum of confidences slightly larger than the count.
fn is_sound(sequence: &SequenceBins) -> bool {
    let SequenceBins {
        tokens,
        confidence,
        correct,
        ..
    } = sequence;
    let lengths = [tokens.len(), confidence.len(), correct.len()] == [BINS; 3];
    let mut bins = tokens.iter().zip(*confidence).zip(*correct);
    lengths
        && bins.all(|((tokens, confidence), correct)| {
            let most = f64::from(*tokens) * (1.0 + 1e-3);
            correct <= tokens && (0.0..=most).contains(confidence)
        })
}

fn bin(sequences: &[SequenceBins], b: usize) -> Option<ReliabilityBin> {
    let count = |entry: fn(&SequenceBins, usize) -> Option<u32>| -> u64 {
        let each = sequences.iter().filter_map(|s| entry(s, b));
        each.map(u64::from).sum()
    };
    let tokens = count(|s, b| s.tokens.get(b).copied());
    let correct = count(|s, b| s.correct.get(b).copied());
    let confidence: f64 = sequences.iter().filter_map(|s| s.confidence.get(b)).sum();
    (tokens > 0).then(|| ReliabilityBin {
        from: b as f64 / BINS as f64,
        to: (b + 1) as f64 / BINS as f64,
        tokens,
        confidence: confidence / tokens as f64,
        accuracy: correct as f64 / tokens as f64,
    })
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    struct Sequence {
        prompt_id: String,
        tokens: [u32; BINS],
        confidence: [f64; BINS],
        correct: [u32; BINS],
    }

    /// Generates tokens of uniform confidence c in 0.1 to 1, which are right with probability `right(c)`.
    fn drawn(prompts: usize, right: impl Fn(f64) -> f64, seed: u64) -> Vec<Sequence> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let one = |i| {
            let mut sequence = Sequence {
                prompt_id: format!("p{i}"),
                tokens: [0; BINS],
                confidence: [0.0; BINS],
                correct: [0; BINS],
            };
            for _ in 0..40 {
                let c = 0.1 + 0.9 * rng.random::<f64>();
                let b = ((c * 10.0) as usize).min(BINS - 1);
                sequence.tokens[b] += 1;
                sequence.confidence[b] += c;
                sequence.correct[b] += u32::from(rng.random::<f64>() < right(c));
            }
            sequence
        };
        (0..prompts).map(one).collect()
    }

    fn measure(sequences: &[Sequence], resamples: usize) -> Result<Calibration, Error> {
        let bins: Vec<SequenceBins> = sequences
            .iter()
            .map(|s| SequenceBins {
                prompt_id: &s.prompt_id,
                tokens: &s.tokens,
                confidence: &s.confidence,
                correct: &s.correct,
            })
            .collect();
        calibration(&bins, resamples, 7)
    }

    #[test]
    fn the_table_and_the_error_equal_a_computation_by_hand() {
        let sequence = |prompt: &str, tokens: [u32; 2], confidence: [f64; 2], correct: [u32; 2]| {
            let mut s = Sequence {
                prompt_id: prompt.to_owned(),
                tokens: [0; BINS],
                confidence: [0.0; BINS],
                correct: [0; BINS],
            };
            for (i, b) in [5, 9].into_iter().enumerate() {
                s.tokens[b] = tokens[i];
                s.confidence[b] = confidence[i];
                s.correct[b] = correct[i];
            }
            s
        };
        let found = measure(
            &[
                sequence("a", [2, 4], [1.1, 3.8], [1, 4]),
                sequence("b", [2, 2], [1.1, 1.9], [2, 1]),
            ],
            200,
        )
        .unwrap();
        // Bin 5 has 4 tokens, confidence 0.55, 0.75 right; bin 9 has 6 tokens, confidence 0.95, 5/6 right.
        assert_eq!(found.bins.len(), 2);
        let (low, high) = (&found.bins[0], &found.bins[1]);
        assert_eq!((low.from, low.to, low.tokens), (0.5, 0.6, 4));
        assert!((low.confidence - 0.55).abs() < 1e-12 && (low.accuracy - 0.75).abs() < 1e-12);
        assert_eq!((high.from, high.to, high.tokens), (0.9, 1.0, 6));
        let expected = 0.4 * 0.2 + 0.6 * (0.95 - 5.0 / 6.0);
        assert!((found.error.mean - expected).abs() < 1e-12, "{found:?}");
        assert_eq!(found.error.prompts, 2);
    }

    #[test]
    fn a_calibrated_model_has_a_small_error_and_a_small_lower_end() {
        let found = measure(&drawn(300, |c| c, 1), 1000).unwrap();
        assert!(
            found.error.mean < 0.02 && found.error.low < 0.005,
            "{found:?}"
        );
        assert_eq!(found.bins.len(), 9, "none below 0.1");
    }

    #[test]
    fn the_interval_of_an_overconfident_model_covers_the_truth() {
        // Tokens are right with probability c − 0.1, so the error is 0.1.
        let covered = (0..100)
            .filter(|seed| {
                let found = measure(&drawn(60, |c| c - 0.1, *seed), 300).unwrap();
                found.error.low <= 0.1 && 0.1 <= found.error.high
            })
            .count();
        assert!((85..=100).contains(&covered), "{covered} of 100");
    }

    #[test]
    fn inconsistent_bins_are_errors() {
        let mut broken = drawn(3, |c| c, 1);
        broken[1].correct[4] = broken[1].tokens[4] + 1;
        assert_eq!(
            measure(&broken, 10).unwrap_err().to_string(),
            "the confidence bins of prompt p1 are not counts of the same tokens in 10 bins\nhint: run `eval` again"
        );
        broken[1].correct[4] = 0;
        broken[1].confidence[4] = f64::NAN;
        assert!(matches!(measure(&broken, 10), Err(Error::Bins { .. })));
        let short = SequenceBins {
            prompt_id: "p",
            tokens: &[1],
            confidence: &[0.5],
            correct: &[1],
        };
        assert!(matches!(
            calibration(&[short], 10, 1),
            Err(Error::Bins { .. })
        ));
        assert!(matches!(calibration(&[], 10, 1), Err(Error::NoTokens)));
    }
}
