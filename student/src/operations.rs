//! The operations of a training, counted from the configuration: FLOPs of the model, without those of layers that are
//! computed again.

use potstill_model::{AttentionColumns, Config};

use crate::memory::TrainedNumbers;
use crate::precision::Precision;
use crate::settings::TrainSettings;

/// Floating-point operations of a step, in the way of Chowdhery et al. 2022 (PaLM, appendix B).
///
/// A weight that a token is multiplied by takes 2 operations in the forward pass, 2 for the gradient of the input, and 2 for
/// its own gradient if it is trained: 6N for a whole model. Of experts, those that are chosen count; the lookup of embeddings
/// counts nothing, and the head does. Attention takes 6 operations for each column of scores and of sums, and each position of
/// the sequence: the causal mask is not taken off, windows are.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelOperations {
    /// Operations of a token outside of attention.
    weights: f64,
    attention: Vec<AttentionColumns>,
}

impl ModelOperations {
    /// Counts the operations of a training of a model of this configuration.
    #[must_use]
    pub fn of(config: &Config, settings: &TrainSettings) -> Self {
        let numbers = TrainedNumbers::of(config, settings);
        let used = config.used_weights() as f64 + numbers.adapter as f64;
        // The share of the weights that are trained is taken to be the same of those that a token uses.
        let trained = numbers.trained as f64 / (numbers.all + numbers.adapter).max(1) as f64;
        Self {
            weights: used * (4.0 + 2.0 * trained),
            attention: config.attention_columns(),
        }
    }

    /// Operations of sequences of these lengths, all together.
    #[must_use]
    pub fn of_lengths(&self, lengths: impl IntoIterator<Item = usize>) -> f64 {
        let of_length = |length: usize| {
            let attention = self.attention.iter().map(|layer| {
                let seen = layer.window.map_or(length, |window| window.min(length));
                6.0 * layer.columns as f64 * seen as f64
            });
            length as f64 * (self.weights + attention.sum::<f64>())
        };
        lengths.into_iter().map(of_length).sum()
    }
}

/// Peaks of devices, 10¹² operations a second with dense operands: words of the name that the driver gives, bf16 with sums in
/// f32, and f32 without tensor cores. From the vendors' data sheets.
const PEAKS: [(&[&str], f64, f64); 13] = [
    (&["B200"], 2250.0, 75.0),
    (&["H200"], 989.0, 67.0),
    (&["H100", "PCIe"], 756.0, 51.0),
    (&["H100", "NVL"], 835.0, 60.0),
    (&["H100"], 989.0, 67.0),
    (&["H800"], 989.0, 67.0),
    (&["A100"], 312.0, 19.5),
    (&["A800"], 312.0, 19.5),
    (&["L40S"], 362.0, 91.6),
    (&["L4"], 121.0, 30.3),
    (&["A10"], 125.0, 31.2),
    (&["RTX 4090"], 165.2, 82.6),
    (&["RTX 3090"], 71.0, 35.6),
];

/// Looks up how many operations a device of this name computes in a second at most; `None` for one that is not in the table.
#[must_use]
pub fn peak_flops(device: &str, precision: Precision) -> Option<f64> {
    let words: Vec<&str> = device.split([' ', '-', '_']).collect();
    let has = |part: &&str| match part.split_once(' ') {
        Some(_) => device.contains(part),
        None => words.contains(part),
    };
    let (_, bf16, f32) = PEAKS.iter().find(|(parts, ..)| parts.iter().all(has))?;
    Some(
        1e12 * match precision {
            Precision::Bf16 => bf16,
            Precision::F32 => f32,
        },
    )
}

#[cfg(test)]
mod tests {
    use potstill_model::Config;
    use serde_json::json;

    use super::*;
    use crate::adapter::AdapterSettings;

    /// A model of two layers of width 8, and its number of weights that are not the embedding.
    fn config(tied: bool, experts: bool) -> Config {
        let family = if experts { "qwen3_moe" } else { "llama" };
        let config = json!({
            "model_type": family, "vocab_size": 50, "hidden_size": 8, "intermediate_size": 16,
            "moe_intermediate_size": 4, "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
        });
        Config::from_json(&config).unwrap()
    }

    #[test]
    fn a_token_takes_six_operations_for_a_weight_and_those_of_attention() {
        let settings = TrainSettings::default();
        // Queries and output 8 × 8, keys and values 4 × 8, gate, up and down 16 × 8, two norms; the last norm; the head.
        let layer = 2.0 * 64.0 + 2.0 * 32.0 + 3.0 * 128.0 + 16.0;
        let weights = 2.0 * layer + 8.0 + 400.0;
        // Two layers, two heads of width 4.
        let attention = |length: f64| 12.0 * 2.0 * 8.0 * length;
        for tied in [true, false] {
            let operations = ModelOperations::of(&config(tied, false), &settings);
            let of_two = operations.of_lengths([10, 30]);
            let expected = 40.0 * 6.0 * weights + 10.0 * attention(10.0) + 30.0 * attention(30.0);
            assert!((of_two / expected - 1.0).abs() < 1e-12, "{tied}: {of_two}");
        }
        // A frozen weight needs no gradient of its own.
        let adapter = TrainSettings {
            adapter: Some(AdapterSettings {
                rank: 1,
                ..AdapterSettings::default()
            }),
            ..TrainSettings::default()
        };
        let frozen = ModelOperations::of(&config(true, false), &adapter).of_lengths([10]);
        let whole = ModelOperations::of(&config(true, false), &settings).of_lengths([10]);
        assert!(frozen > 10.0 * 4.0 * weights && frozen < 2.0 * whole);
        // Layers that are computed again count once.
        let again = TrainSettings {
            recompute: true,
            ..TrainSettings::default()
        };
        let again = ModelOperations::of(&config(true, false), &again).of_lengths([10]);
        assert_eq!(again, whole);
    }

    #[test]
    fn experts_that_are_not_chosen_take_no_operations() {
        let config = config(true, true);
        let settings = TrainSettings::default();
        let unused = (2 * 4 * 3 * 4 * 8) as f64;
        let operations = ModelOperations::of(&config, &settings);
        let used = config.parameters() as f64 - unused;
        assert_eq!(config.used_weights() as f64, used);
        // Routers are frozen, and are a small part.
        let share = operations.of_lengths([1]) / (6.0 * used);
        assert!((0.9..1.2).contains(&share), "{share}");
    }

    #[test]
    fn peaks_are_found_by_the_words_of_a_name() {
        let bf16 = |name: &str| {
            let peak = peak_flops(name, Precision::Bf16);
            peak.map(|peak| (peak / 1e11).round() / 10.0)
        };
        assert_eq!(bf16("NVIDIA H200"), Some(989.0));
        assert_eq!(bf16("NVIDIA H100 80GB HBM3"), Some(989.0));
        assert_eq!(bf16("NVIDIA H100 PCIe"), Some(756.0));
        assert_eq!(bf16("NVIDIA A100-SXM4-80GB"), Some(312.0));
        assert_eq!(bf16("NVIDIA L4"), Some(121.0));
        assert_eq!(bf16("NVIDIA L40S"), Some(362.0));
        assert_eq!(bf16("NVIDIA GeForce RTX 4090"), Some(165.2));
        assert_eq!(peak_flops("NVIDIA H200", Precision::F32), Some(67e12));
        assert_eq!(bf16("llvmpipe (LLVM 15.0.6, 256 bits)"), None);
    }
}
