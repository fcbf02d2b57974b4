//! Softmax weights of one row of logits in host memory, for sampling.
//!
//! The weights are f64 because a token is drawn where the running sum of tens of thousands of weights passes a
//! random number.

use pulp::{Simd, WithSimd};

use crate::simd::vectorize;

/// Independent partial sums and maxima, so that the compiler vectorises the loops.
const LANES: usize = 16;

/// Returns the largest of `logits_v`, ignoring NaN; −∞ if there is none.
#[must_use]
pub fn largest_logit(logits_v: &[f32]) -> f32 {
    vectorize(LargestLogit(logits_v))
}

/// Writes exp((logit − `largest`) / `temperature`) for each of `logits_v` into `weights_v`, and returns the sum
/// of the weights, which is taken in a fixed order.
///
/// `weights_v` is resized to the number of logits. No logit may exceed `largest` by more than
/// 700 · `temperature`.
pub fn softmax_weights(
    logits_v: &[f32],
    largest: f32,
    temperature: f64,
    weights_v: &mut Vec<f64>,
) -> f64 {
    weights_v.clear();
    weights_v.resize(logits_v.len(), 0.0);
    vectorize(SoftmaxWeights {
        logits_v,
        largest,
        inverse_temperature: 1.0 / temperature,
        weights_v,
    })
}

struct LargestLogit<'a>(&'a [f32]);

impl WithSimd for LargestLogit<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = self.0.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, logit) in lanes.iter_mut().zip(chunk) {
                *lane = larger(*lane, *logit);
            }
        }
        let all = lanes.iter().chain(rest).copied();
        all.fold(f32::NEG_INFINITY, larger)
    }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

struct SoftmaxWeights<'a> {
    logits_v: &'a [f32],
    largest: f32,
    inverse_temperature: f64,
    weights_v: &'a mut [f64],
}

impl WithSimd for SoftmaxWeights<'_> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        let (largest, inverse) = (self.largest, self.inverse_temperature);
        let mut lanes = [0f64; LANES];
        let (logits, logits_rest) = self.logits_v.as_chunks::<LANES>();
        let (weights, weights_rest) = self.weights_v.as_chunks_mut::<LANES>();
        for (logits, weights) in logits.iter().zip(weights) {
            for i in 0..LANES {
                weights[i] = exp(f64::from(logits[i] - largest) * inverse);
                lanes[i] += weights[i];
            }
        }
        let mut sum: f64 = lanes.iter().sum();
        for (logit, weight) in logits_rest.iter().zip(weights_rest) {
            *weight = exp(f64::from(logit - largest) * inverse);
            sum += *weight;
        }
        sum
    }
}

/// ln 2 as a sum of two parts. The high part has so few digits that its multiples are exact.
const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
/// 1.5 · 2⁵²: adding this number rounds to the nearest integer and leaves the integer in the low bits.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// Smallest argument whose result is not 0.
const MIN_ARGUMENT: f64 = -708.0;

/// 1 / i! for i from 13 down to 2.
const TAYLOR: [f64; 12] = [
    1.605_904_383_682_161_3e-10,
    2.087_675_698_786_81e-9,
    2.505_210_838_544_172e-8,
    2.755_731_922_398_589e-7,
    2.755_731_922_398_589_3e-6,
    2.480_158_730_158_73e-5,
    1.984_126_984_126_984e-4,
    1.388_888_888_888_889e-3,
    8.333_333_333_333_333e-3,
    4.166_666_666_666_666_4e-2,
    1.666_666_666_666_666_6e-1,
    0.5,
];

/// Computes eˣ for x ≤ 700 with an error of at most 2 units in the last place; 0 below −708. The bits are the
/// same on every processor, because no fused multiplication is used.
#[inline(always)]
fn exp(x: f64) -> f64 {
    let bounded = if x < MIN_ARGUMENT { MIN_ARGUMENT } else { x };
    // x = n ln 2 + r with |r| ≤ ½ ln 2.
    let shifted = bounded * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = bounded - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = TAYLOR[0];
    for coefficient in &TAYLOR[1..] {
        p = p * r + coefficient;
    }
    let power = p * (r * r) + r + 1.0;
    let value = f64::from_bits(power.to_bits().wrapping_add(shifted.to_bits() << 52));
    if x < MIN_ARGUMENT { 0.0 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_libm() {
        let mut worst = 0f64;
        for step in 0..=2_000_000 {
            let x = -700.0 + f64::from(step) * 4e-4;
            worst = worst.max((exp(x) - x.exp()).abs() / x.exp());
        }
        assert!(worst < 2.0 * f64::EPSILON, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!([exp(-708.5), exp(f64::NEG_INFINITY)], [0.0, 0.0]);
    }

    #[test]
    fn weights_agree_with_the_definition_at_every_length() {
        for length in [0usize, 1, 15, 16, 17, 100] {
            let logits: Vec<f32> = (0..length)
                .map(|i| (i * 37 % 23) as f32 * 0.4 - 3.0)
                .collect();
            let largest = largest_logit(&logits);
            assert_eq!(logits.contains(&largest), length > 0);
            assert!(logits.iter().all(|logit| *logit <= largest));
            let mut weights = vec![7.0; 5];
            let sum = softmax_weights(&logits, largest, 0.7, &mut weights);
            assert_eq!(weights.len(), length);
            for (weight, logit) in weights.iter().zip(&logits) {
                let exact = (f64::from(logit - largest) / 0.7).exp();
                assert!((weight - exact).abs() <= 1e-14 * exact);
            }
            assert!((sum - weights.iter().sum::<f64>()).abs() < 1e-12);
        }
        assert_eq!(largest_logit(&[f32::NAN, 1.0, f32::NAN]), 1.0);
    }
}
