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

macro_rules! half_computed_in_f32 {
    ($t:ty) => {
        impl StoredFloat<f32> for $t {
            #[inline(always)]
            fn widen(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn narrow(value: f32) -> $t {
                <$t>::from_f32(value)
            }
            fn as_computed(_: &[$t]) -> Option<&[f32]> {
                None
            }
        }
    };
}
half_computed_in_f32!(f16);
half_computed_in_f32!(bf16);
