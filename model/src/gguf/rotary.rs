//! Divisors of the rotary frequencies: llama.cpp stores those of the `llama3` scaling and of LongRoPE as tensors.

use std::f64::consts::PI;

use serde_json::{Value, json};

use super::block::BlockType;
use super::codec::dequantize;
use super::file::GgufFile;
use crate::Error;

/// The tensor with the divisors of the `llama3` scaling.
pub(super) const LLAMA3_TENSOR: &str = "rope_freqs.weight";

/// The constants of the `llama3` scaling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Llama3 {
    pub(super) factor: f64,
    pub(super) low_freq_factor: f64,
    pub(super) high_freq_factor: f64,
    pub(super) original: f64,
}

impl Llama3 {
    /// The divisor of each of `width / 2` frequencies: 1 for short waves, `factor` for long ones, between them
    /// 1 / ((1 − s) / factor + s), where s goes from 0 to 1.
    pub(super) fn divisors(&self, base: f64, width: usize) -> Vec<f32> {
        let low = self.original / self.low_freq_factor;
        let high = self.original / self.high_freq_factor;
        let divisor = |pair: usize| {
            // llama.cpp's converter computes the frequencies in f32.
            let frequency = 1.0 / (base as f32).powf(2.0 * pair as f32 / width as f32);
            let wave = 2.0 * PI / f64::from(frequency);
            if wave < high {
                return 1.0;
            }
            if wave > low {
                return self.factor as f32;
            }
            let smooth = (self.original / wave - self.low_freq_factor)
                / (self.high_freq_factor - self.low_freq_factor);
            (1.0 / ((1.0 - smooth) / self.factor + smooth)) as f32
        };
        (0..width / 2).map(divisor).collect()
    }
}

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
    let candidates = (4..24).map(|power| Llama3 {
        factor: f64::from(factor),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original: f64::from(1 << power),
    });
    let fits = |scaling: &Llama3| {
        let divisors = scaling.divisors(base, width);
        let same = |(own, stored): (&f32, &f32)| (own - stored).abs() <= 1e-3 * stored.abs();
        divisors.len() == stored.len() && divisors.iter().zip(&stored).all(same)
    };
    match candidates.clone().find(fits) {
        Some(scaling) => Ok(json!({
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original,
        })),
        None => Err(file.broken(format!(
            "the divisors of `{LLAMA3_TENSOR}` are not those of a `llama3` scaling with the factors 1 and 4"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of three frequencies of Llama 3.1 (θ 500,000, width 128), computed by hand.
    #[test]
    fn divisors_of_llama_3_1() {
        let scaling = Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original: 8192.0,
        };
        let divisors = scaling.divisors(500_000.0, 128);
        assert_eq!((divisors[0], divisors[63]), (1.0, 8.0));
        // Pair 32: wave 2π·√500000 = 4442.88; s = (8192/4442.88 − 1)/3 = 0.281280.
        assert!((divisors[32] - 1.0 / ((1.0 - 0.281_280) / 8.0 + 0.281_280)).abs() < 1e-4);
    }
}
