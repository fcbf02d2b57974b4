//! Float types that the plain loops are generic over: the type in memory and the type of the arithmetic.

use burn::tensor::{Element, bf16, f16};

use crate::exp::{exp_bounded, tanh};

/// A type of numbers in memory, computed with as `W`.
pub(crate) trait StoredFloat<W>: Element + bytemuck::Pod + Send + Sync {
    /// Converts to the computing type, exactly.
    fn widen(self) -> W;

    /// Rounds to the stored type, to nearest.
    fn narrow(value: W) -> Self;

    /// Returns the numbers themselves where the stored type is the computing type, and `None` elsewhere.
    fn as_computed(row: &[Self]) -> Option<&[W]>;
}

/// A type that loops compute in: f32, or f64 for f64 tensors.
pub(crate) trait ComputeFloat:
    Element + bytemuck::Pod + Default + Send + Sync + PartialOrd
{
    const NEG_INFINITY: Self;

    fn from_f64(value: f64) -> Self;
    fn into_f64(self) -> f64;
    /// e^x for x ≤ 88; larger arguments may overflow f32.
    fn exp(self) -> Self;
    fn tanh(self) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// self · factor + addend with one rounding.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
}

macro_rules! compute_float {
    ($t:ty, $exp:path, $tanh:path) => {
        impl ComputeFloat for $t {
            const NEG_INFINITY: $t = <$t>::NEG_INFINITY;

            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn into_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn tanh(self) -> Self {
                $tanh(self)
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self + other
            }
            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self - other
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self * other
            }
            #[inline(always)]
            fn div(self, other: Self) -> Self {
                self / other
            }
            #[inline(always)]
            fn mul_add(self, factor: Self, addend: Self) -> Self {
                <$t>::mul_add(self, factor, addend)
            }
        }

        impl StoredFloat<$t> for $t {
            #[inline(always)]
            fn widen(self) -> $t {
                self
            }
            #[inline(always)]
            fn narrow(value: $t) -> $t {
                value
            }
            fn as_computed(row: &[$t]) -> Option<&[$t]> {
                Some(row)
            }
        }
    };
}
compute_float!(f32, exp_bounded, tanh);
compute_float!(f64, f64::exp, f64::tanh);

impl StoredFloat<f32> for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn as_computed(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

/// The conversions have no branches, so that loops over them are vectorised.
impl StoredFloat<f32> for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        // Half a unit of the last place that is kept, less one bit if that place is even: ties go to even.
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        // A NaN keeps its sign and stays a NaN.
        let nan = bits | 0x0040_0000;
        let bits = if value.is_nan() { nan } else { rounded };
        Self::from_bits((bits >> 16) as u16)
    }
    fn as_computed(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

/// Evaluates an expression in which `$E` is the type of the stored numbers: f32, f16 or bf16.
///
/// # Panics
/// Panics on other types; the public functions of the ops do not pass them.
macro_rules! with_stored_type {
    ($dtype:expr, $E:ident => $result:expr) => {
        match $dtype {
            burn::tensor::DType::F32 => {
                type $E = f32;
                $result
            }
            burn::tensor::DType::BF16 => {
                type $E = burn::tensor::bf16;
                $result
            }
            burn::tensor::DType::F16 => {
                type $E = burn::tensor::f16;
                $result
            }
            other => unreachable!("a loop that computes in f32 got a tensor of {other:?}"),
        }
    };
}
pub(crate) use with_stored_type;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_of_bf16_equal_those_of_the_half_crate() {
        for high in 0..=u16::MAX {
            let wide = <bf16 as StoredFloat<f32>>::widen(bf16::from_bits(high));
            let number = bf16::from_bits(high).to_f32();
            assert!(wide == number || wide.is_nan() && number.is_nan());
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(high) << 16 | low);
                let found = <bf16 as StoredFloat<f32>>::narrow(value);
                assert_eq!(found.to_bits(), bf16::from_f32(value).to_bits(), "{value}");
            }
        }
    }
}
