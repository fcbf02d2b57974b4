//! What a child process is asked to measure and what it answers; the same request goes to both
//! sides, as JSON.

use std::path::PathBuf;

use potstill_model::Config;
use serde::{Deserialize, Serialize};

/// What a child measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Work {
    /// Optimizer steps.
    Step,
    /// Hidden states of a text, and logits after its last token.
    Prefill,
    /// Greedy answers.
    Decode,
    /// The teacher's sparse distributions over texts.
    Capture,
    /// Where the time of a step goes; Potstill only.
    Profile,
    /// The gradient of one text, once, for its peak memory; Potstill only.
    Memory,
    /// The loss from hidden states and head, with both gradients, and its three products alone.
    Loss,
    /// The same once, for its peak memory; Potstill only.
    #[serde(rename = "loss-memory")]
    LossMemory,
}

/// How a side computes the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum How {
    /// Potstill, in chunks by the kernels.
    #[default]
    Fused,
    /// Potstill, by tensor operations on all rows at once.
    Plain,
    /// PyTorch, an operation at a time.
    Eager,
    /// PyTorch, `torch.compile`.
    Compile,
    /// Liger's fused linear JSD, with a dense teacher of the same width.
    LigerJsd,
    /// Liger's fused linear KL, from dense probabilities.
    LigerKl,
    /// Liger's fused linear cross-entropy, from one token a row.
    LigerCrossEntropy,
}

impl How {
    pub(crate) fn name(self) -> &'static str {
        match self {
            How::Fused => "Potstill",
            How::Plain => "Potstill, plain",
            How::Eager => "PyTorch",
            How::Compile => "PyTorch, compiled",
            How::LigerJsd => "Liger, JSD",
            How::LigerKl => "Liger, KL",
            How::LigerCrossEntropy => "Liger, cross-entropy",
        }
    }

    /// Whether it computes the loss that is asked for, and not another one of its kind.
    pub(crate) fn same_loss(self) -> bool {
        matches!(self, How::Fused | How::Plain | How::Eager | How::Compile)
    }

    /// Products of 2·n·d·v floating-point operations: logits, both gradients, and a teacher's logits.
    pub(crate) fn products(self) -> u64 {
        match self {
            How::LigerJsd => 4,
            _ => 3,
        }
    }
}

/// The shape of [`Work::Loss`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct LossShape {
    /// n.
    pub(crate) rows: usize,
    /// d.
    pub(crate) width: usize,
    /// v.
    pub(crate) vocab: usize,
    /// Rows of logits at a time, in Potstill.
    pub(crate) chunk_rows: usize,
}

/// The number type that a model computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Float {
    /// Single precision.
    F32,
    /// Brain floating point: as wide as f32, with 8 bits of precision.
    Bf16,
}

impl Float {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Float::F32 => "f32",
            Float::Bf16 => "bf16",
        }
    }

    pub(crate) fn bytes(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::Bf16 => 2,
        }
    }

    /// How far a number that both sides computed may differ.
    pub(crate) fn tolerance(self) -> f64 {
        match self {
            Float::F32 => 1e-3,
            Float::Bf16 => 5e-2,
        }
    }
}

/// One measurement. The peer in `benches/peer.py` reads the same fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Request {
    #[serde(rename = "part")]
    pub(crate) work: Work,
    /// The checkpoint's folder.
    pub(crate) model: PathBuf,
    pub(crate) dtype: Float,
    pub(crate) device: String,
    pub(crate) threads: usize,
    /// Repetitions that are not measured; none begins after `budget_s`.
    pub(crate) warm_up: usize,
    /// How the side that gets the request computes the loss.
    #[serde(default)]
    pub(crate) how: How,
    #[serde(default)]
    pub(crate) loss: LossShape,
    /// The most that are measured.
    pub(crate) repetitions: usize,
    /// After so long no further one begins, but two are measured unless one takes thrice as long.
    pub(crate) budget_s: f64,
    /// Token ids, texts of one length.
    pub(crate) ids: Vec<Vec<u32>>,
    /// Of each position of the first text but its first: the tokens of the teacher's distribution.
    pub(crate) support: Vec<Vec<u32>>,
    /// Their log-probabilities, nats; those of one row, alike for all, in [`Work::Loss`].
    pub(crate) logprobs: Vec<Vec<f32>>,
    /// Tokens that a captured distribution keeps.
    pub(crate) top_k: usize,
    /// Tokens of an answer.
    pub(crate) new_tokens: usize,
    pub(crate) learning_rate: f64,
    pub(crate) weight_decay: f64,
    /// The largest global norm of a gradient.
    pub(crate) clip: f64,
}

/// What a child measured.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Reply {
    /// Of each repetition.
    pub(crate) seconds: Vec<f64>,
    /// Numbers that have to be the same on both sides: the losses of all steps, logits, token ids,
    /// means over captured positions.
    #[serde(default)]
    pub(crate) check: Vec<f64>,
    /// Resident bytes before the first repetition.
    #[serde(default)]
    pub(crate) before_bytes: Option<u64>,
    /// The most resident bytes there ever were.
    #[serde(default)]
    pub(crate) peak_bytes: Option<u64>,
    /// The three products alone, of each repetition of [`Work::Loss`].
    #[serde(default)]
    pub(crate) products: Vec<f64>,
    /// The most bytes that a repetition of [`Work::Loss`] took above inputs and gradients.
    #[serde(default)]
    pub(crate) above_bytes: Option<u64>,
    /// What there is to say about how the side went about it.
    #[serde(default)]
    pub(crate) note: String,
    /// The parts of [`Work::Profile`], seconds each; of [`Work::Loss`], passes over one chunk of logits.
    #[serde(default)]
    pub(crate) parts: Vec<(String, f64)>,
    /// Processor time of the whole child.
    #[serde(default)]
    pub(crate) cpu_s: f64,
    /// Names and versions of what computed.
    pub(crate) engine: String,
}

/// How much is computed. Less than asked for where the model's context is shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Tokens of a text.
    pub(crate) tokens: usize,
    /// Tokens of a prompt.
    pub(crate) prompt: usize,
    /// Tokens of an answer.
    pub(crate) new: usize,
    /// Texts that are captured.
    pub(crate) texts: usize,
    /// Tokens of a distribution's support.
    pub(crate) top_k: usize,
    vocab: usize,
}

impl Sizes {
    pub(crate) fn of(config: &Config, tokens: usize) -> Sizes {
        let context = config.max_position_embeddings;
        Sizes {
            tokens: tokens.min(context),
            prompt: 32.min(context / 4),
            new: 64.min(context / 2),
            texts: 4,
            top_k: 64.min(config.vocab_size / 2),
            vocab: config.vocab_size,
        }
    }

    /// The same with twice the tokens in a support.
    pub(crate) fn wide(self) -> Sizes {
        let top_k = 128.min(self.vocab / 2);
        Sizes { top_k, ..self }
    }

    /// What one step does, in words.
    pub(crate) fn step(&self) -> String {
        let Sizes { tokens, top_k, .. } = self;
        format!(
            "one text of {tokens} tokens, loss at {} of them: forward, KL to {top_k} tokens and the tail, backward, clipping by the global norm, AdamW",
            tokens.saturating_sub(1)
        )
    }

    /// Log-probabilities that fall by a tenth from one token of the support to the next and leave the rest
    /// of `mass` to the tail.
    pub(crate) fn falling(&self, mass: f64) -> Vec<f32> {
        let falling: Vec<f64> = (0..self.top_k).map(|slot| -0.1 * slot as f64).collect();
        let log_sum = falling.iter().map(|log| log.exp()).sum::<f64>().ln();
        let log = |log: &f64| (log - log_sum + mass.ln()) as f32;
        falling.iter().map(log).collect()
    }

    /// So many texts of so many tokens, drawn alike from the vocabulary.
    pub(crate) fn ids(&self, texts: usize, tokens: usize) -> Vec<Vec<u32>> {
        let mut random = Random(texts as u64 * 1_000_003 + tokens as u64);
        let mut text = |_| (0..tokens).map(|_| random.below(self.vocab)).collect();
        (0..texts).map(&mut text).collect()
    }

    /// Targets for each position of `text` but its first: the token that comes, and others drawn
    /// alike, under a distribution that falls by a tenth from one to the next and leaves 5 % to the
    /// tail.
    pub(crate) fn targets(&self, text: &[u32]) -> (Vec<Vec<u32>>, Vec<Vec<f32>>) {
        let logprobs = self.falling(0.95);
        let mut random = Random(17);
        let support = text.iter().skip(1).map(|realised| {
            let mut ids = vec![*realised];
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

/// Steele, Lea and Flood 2014, `SplitMix64`: enough for token ids that mean nothing.
struct Random(u64);

impl Random {
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
    fn targets_are_distributions_with_a_tail_and_the_realised_token() {
        let sizes = Sizes {
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
        for ((support, logprobs), realised) in support.iter().zip(&logprobs).zip(&ids[0][1..]) {
            assert_eq!(support.first(), Some(realised));
            let mut unique = support.clone();
            unique.sort_unstable();
            unique.dedup();
            assert_eq!(unique.len(), 8);
            assert!(unique.iter().all(|id| *id < 20));
            let mass: f64 = logprobs.iter().map(|log| f64::from(*log).exp()).sum();
            assert!((mass - 0.95).abs() < 1e-6, "{mass}");
        }
    }

    #[test]
    fn a_request_reads_as_it_was_written() {
        let text = r#"{"part":"decode","model":"m","dtype":"bf16","device":"cpu","threads":2,"warm_up":1,
            "repetitions":3,"budget_s":1.0,"ids":[[1,2]],"support":[],"logprobs":[],"top_k":64,
            "new_tokens":8,"learning_rate":1e-5,"weight_decay":0.01,"clip":1.0}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        let again = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&again).unwrap(), request);
        assert_eq!((request.work, request.dtype), (Work::Decode, Float::Bf16));
    }
}
