//! The exponential of f32 in operations that the compiler vectorises: libm's takes one at a time.

/// log₂ e, and ln 2 in two parts: the first has so few digits that its multiples are exact.
const LOG2_E: f32 = std::f32::consts::LOG2_E;
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Adding it rounds to the nearest integer, which then stands in the low bits.
const ROUND: f32 = 12_582_912.0;
/// Below it the result is 0: results under the least normal number are not told apart from it.
const LEAST: f32 = -87.336_54;
/// Above it the result is infinite: the last third of a power of e is not worth a step.
const MOST: f32 = 88.376_26;

/// eˣ within 0.7 · 2⁻²³ of it; 0 below −87.3, ∞ above 88.3, NaN for NaN.
///
/// The same operations on every processor, hence the same bits: a fused multiply-add is rounded once,
/// wherever it is done. Cephes' method: x = n ln 2 + r with |r| ≤ ½ ln 2, a polynomial for eʳ, and n
/// into the exponent.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Comparisons rather than `clamp`, so that NaN goes through.
    let bounded = if x > MOST { MOST } else { x };
    let value = exp_to_most(bounded);
    if x > MOST { f32::INFINITY } else { value }
}

/// [`exp`] of what is at most 88.3; above that, any number.
#[inline(always)]
pub(crate) fn exp_to_most(x: f32) -> f32 {
    let bounded = if x < LEAST { LEAST } else { x };
    let shifted = bounded.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = (-n).mul_add(LN_2_LOW, (-n).mul_add(LN_2_HIGH, bounded));
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 5e-1);
    let value = p.mul_add(r * r, r) + 1.0;
    // The low bits of `shifted` are n; those of `ROUND` are shifted out.
    let exponent = (shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits());
    let value = value * f32::from_bits(exponent);
    if x < LEAST { 0.0 } else { value }
}

/// tanh x = ±(1 − e) / (1 + e) with e = exp(−2|x|), within 1e-7 of it: as near as a logit is to be
/// had that stood at the cap.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let e = exp_to_most(-2.0 * x.abs());
    ((1.0 - e) / (1.0 + e)).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_within_a_rounding_or_two() {
        let mut worst = 0.0f64;
        for step in 0..=1_750_000 {
            let x = -87.3 + step as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let found = f64::from(exp(x));
            worst = worst.max((found - exact).abs() / exact);
            assert_eq!(exp(x), exp_to_most(x));
        }
        assert!(worst < 0.7 * f64::from(f32::EPSILON), "{worst:e}");
    }

    #[test]
    fn ends_of_the_range() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-87.4), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(88.4), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        let near = f64::from(exp(88.3)) / f64::from(88.3f32).exp();
        assert!((near - 1.0).abs() < 1e-6, "{near}");
    }

    #[test]
    fn tanh_is_within_a_ten_millionth() {
        let mut worst = 0.0f64;
        for step in -200_000..=200_000 {
            let x = step as f32 * 1e-4;
            let found = f64::from(tanh(x));
            worst = worst.max((found - f64::from(x).tanh()).abs());
        }
        assert!(worst < 1e-7, "{worst:e}");
        assert_eq!(tanh(f32::NEG_INFINITY), -1.0);
        assert!(tanh(f32::NAN).is_nan());
    }
}
