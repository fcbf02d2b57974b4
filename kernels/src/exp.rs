//! The exponential of f32 in operations that the compiler vectorises; libm's takes one number at a time.

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 as a sum of two parts. The high part has so few digits that its multiples are exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// 1.5 · 2²³: adding this number rounds to the nearest integer and leaves the integer in the low bits.
const ROUND: f32 = 12_582_912.0;
/// Smallest argument whose result is not 0: the result would be below the least normal number.
const MIN_ARGUMENT: f32 = -87.336_54;
/// Largest argument whose result is finite. The f32 range ends at 88.72; the last third of a power of e would
/// need an extra step.
const MAX_ARGUMENT: f32 = 88.376_26;

/// Computes eˣ with a relative error of at most 0.7 · 2⁻²³; 0 below −87.3, ∞ above 88.3, NaN for NaN.
///
/// The bits are the same on every processor, because the operations are: a fused multiply-add is rounded once
/// everywhere. The method is that of Cephes' `expf`: x = n ln 2 + r with |r| ≤ ½ ln 2, a polynomial for eʳ, and
/// n added to the exponent.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // These are comparisons rather than `clamp`, so that NaN passes through.
    let bounded = if x > MAX_ARGUMENT { MAX_ARGUMENT } else { x };
    let value = exp_bounded(bounded);
    if x > MAX_ARGUMENT {
        f32::INFINITY
    } else {
        value
    }
}

/// Computes [`exp`] for x ≤ 88.3; the result for larger x is unspecified.
#[inline(always)]
pub(crate) fn exp_bounded(x: f32) -> f32 {
    let bounded = if x < MIN_ARGUMENT { MIN_ARGUMENT } else { x };
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
    // The low bits of `shifted` are n; the bits of `ROUND` are shifted out.
    let exponent = (shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits());
    let value = value * f32::from_bits(exponent);
    if x < MIN_ARGUMENT { 0.0 } else { value }
}

/// Computes tanh x = ±(1 − e) / (1 + e) with e = exp(−2|x|), with an absolute error below 1e-7.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let e = exp_bounded(-2.0 * x.abs());
    ((1.0 - e) / (1.0 + e)).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_the_stated_error() {
        let mut worst = 0.0f64;
        for step in 0..=1_750_000 {
            let x = -87.3 + step as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let found = f64::from(exp(x));
            worst = worst.max((found - exact).abs() / exact);
            assert_eq!(exp(x), exp_bounded(x));
        }
        assert!(worst < 0.7 * f64::from(f32::EPSILON), "{worst:e}");
    }

    #[test]
    fn exp_at_the_ends_of_its_range() {
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
    fn tanh_is_within_the_stated_error() {
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
