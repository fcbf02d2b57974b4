//! Divisors of the rotary frequencies: llama.cpp stores those of the `llama3` scaling and of LongRoPE as tensors.

use serde_json::{Value, json};

use super::file::GgufFile;
use crate::Error;
use crate::keys::Keys;
use crate::rotary_table::RotaryKeys;
use potstill_kernels::BlockType;
use potstill_kernels::dequantize;

/// The tensor with the divisors of the `llama3` scaling.
pub(super) const LLAMA3_TENSOR: &str = "rope_freqs.weight";

/// Reads a tensor of divisors.
///
/// # Errors
/// Returns an error for an absent tensor, and for one that is not a row of F32.
pub(super) fn factors(file: &GgufFile, name: &str) -> Result<Vec<f32>, Error> {
    let Some(tensor) = file.tensor(name) else {
        return Err(file.broken(format!("the tensor `{name}` is absent")));
    };
    if tensor.kind != BlockType::F32 || tensor.shape.len() != 1 {
        return Err(file.broken(format!("the tensor `{name}` is not a row of F32")));
    }
    let mut bytes = vec![0; tensor.kind.bytes(tensor.shape[0])];
    file.read_tensor(tensor, 0, &mut bytes)?;
    Ok(dequantize(tensor.kind, &bytes))
}

/// Finds the constants of the `llama3` scaling that give the divisors of a file. All released models have the low and
/// high factors 1 and 4 and a power of two as original context; other constants are not found.
///
/// # Errors
/// Returns an error if no constants give the divisors.
pub(super) fn llama3_scaling(file: &GgufFile, base: f64, width: usize) -> Result<Value, Error> {
    let stored = factors(file, LLAMA3_TENSOR)?;
    let factor = stored
        .iter()
        .fold(1.0f32, |most, divisor| most.max(*divisor));
    for power in 4..24 {
        let scaling = json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1 << power,
        });
        let keys = json!({ "rope_theta": base, "rope_scaling": scaling });
        let Some(object) = keys.as_object() else {
            continue;
        };
        let keys = Keys::new(file.path(), object);
        let rotary = RotaryKeys::find(&keys, "full_attention", base)?;
        let divisors = rotary.table(width, 1 << power)?.divisors();
        let same = |(own, stored): (&f32, &f32)| (own - stored).abs() <= 1e-3 * stored.abs();
        if divisors.len() == stored.len() && divisors.iter().zip(&stored).all(same) {
            return Ok(scaling);
        }
    }
    Err(file.broken(format!(
        "the divisors of `{LLAMA3_TENSOR}` are not those of a `llama3` scaling with the factors 1 and 4"
    )))
}

#[cfg(test)]
mod tests {
    use crate::Config;
    use serde_json::json;

    /// The values of three frequencies of Llama 3.1 (θ 500,000, width 128), computed by hand.
    #[test]
    fn divisors_of_llama_3_1() {
        let config = Config::from_json(&json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 128, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1, "rope_theta": 500_000.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
        }));
        let divisors = config.unwrap().plan.rotary[0].divisors();
        assert_eq!((divisors[0], divisors[63]), (1.0, 8.0));
        // Pair 32: wave 2π·√500000 = 4442.88; s = (8192/4442.88 − 1)/3 = 0.281280.
        assert!((divisors[32] - 1.0 / ((1.0 - 0.281_280) / 8.0 + 0.281_280)).abs() < 1e-4);
    }
}
