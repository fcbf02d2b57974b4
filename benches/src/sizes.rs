//! Sizes of the workloads, and the texts and targets of these sizes, drawn from fixed seeds.

use potstill::model::Config;

/// Sizes of the workloads for one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WorkloadSizes {
    /// Tokens of a text.
    pub(crate) tokens: usize,
    /// Tokens of a prompt.
    pub(crate) prompt: usize,
    /// Tokens of an answer.
    pub(crate) new: usize,
    /// Number of texts that are captured.
    pub(crate) texts: usize,
    /// Tokens of a distribution's support.
    pub(crate) top_k: usize,
    vocab: usize,
}

impl WorkloadSizes {
    /// Sizes for texts of `tokens` tokens, reduced where the model's context or vocabulary is smaller. `vocab` is the
    /// number of ids that are tokens: the rows of the embedding that pad it are not used.
    pub(crate) fn new(config: &Config, vocab: usize, tokens: usize) -> WorkloadSizes {
        let context = config.max_position_embeddings;
        WorkloadSizes {
            tokens: tokens.min(context),
            prompt: 32.min(context / 4),
            new: 64.min(context / 2),
            texts: 4,
            top_k: 64.min(vocab / 2),
            vocab,
        }
    }

    /// The same sizes with a support of 128 tokens.
    pub(crate) fn with_wide_support(self) -> WorkloadSizes {
        let top_k = 128.min(self.vocab / 2);
        WorkloadSizes { top_k, ..self }
    }

    /// Log-probabilities of a support: each token has e^−0.1 times the probability of the one before, and
    /// all together have `mass`; the rest is the tail's.
    pub(crate) fn falling_logprobs(&self, mass: f64) -> Vec<f32> {
        let falling: Vec<f64> = (0..self.top_k).map(|slot| -0.1 * slot as f64).collect();
        let log_sum = falling.iter().map(|log| log.exp()).sum::<f64>().ln();
        let logprob = |log: &f64| (log - log_sum + mass.ln()) as f32;
        falling.iter().map(logprob).collect()
    }

    /// `texts` texts of `tokens` uniformly drawn token ids.
    pub(crate) fn ids(&self, texts: usize, tokens: usize) -> Vec<Vec<u32>> {
        let mut random = SplitMix64(texts as u64 * 1_000_003 + tokens as u64);
        let mut text = |_| (0..tokens).map(|_| random.below(self.vocab)).collect();
        (0..texts).map(&mut text).collect()
    }

    /// Support and log-probabilities for each position of `text` except its first. The target token comes
    /// first, followed by uniformly drawn ones; the tail has 5 % of the mass.
    pub(crate) fn targets(&self, text: &[u32]) -> (Vec<Vec<u32>>, Vec<Vec<f32>>) {
        let logprobs = self.falling_logprobs(0.95);
        let mut random = SplitMix64(17);
        let support = text.iter().skip(1).map(|target| {
            let mut ids = vec![*target];
            while ids.len() < self.top_k {
                let id = random.below(self.vocab);
                if !ids.contains(&id) {
                    ids.push(id);
                }
            }
            ids
        });
        let support: Vec<Vec<u32>> = support.collect();
        let logprobs = vec![logprobs; support.len()];
        (support, logprobs)
    }
}

/// The generator of Steele, Lea and Flood 2014 (`SplitMix64`). Its quality is sufficient, since the token
/// ids have no meaning.
struct SplitMix64(u64);

impl SplitMix64 {
    fn below(&mut self, limit: usize) -> u32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % limit.max(1) as u64) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_distributions_with_a_tail_and_contain_the_target_token() {
        let sizes = WorkloadSizes {
            tokens: 9,
            prompt: 4,
            new: 4,
            texts: 1,
            top_k: 8,
            vocab: 20,
        };
        let ids = sizes.ids(1, 9);
        assert_eq!(ids, sizes.ids(1, 9));
        let (support, logprobs) = sizes.targets(&ids[0]);
        assert_eq!((support.len(), logprobs.len()), (8, 8));
        for ((support, logprobs), target) in support.iter().zip(&logprobs).zip(&ids[0][1..]) {
            assert_eq!(support.first(), Some(target));
            let mut unique = support.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), 8);
            assert!(unique.iter().all(|id| *id < 20));
            let mass: f64 = logprobs.iter().map(|log| f64::from(*log).exp()).sum();
            assert!((mass - 0.95).abs() < 1e-6, "{mass}");
        }
    }
}
