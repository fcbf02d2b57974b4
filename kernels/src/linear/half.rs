//! The products of a linear layer in bf16: operands in their stored layout, sums in f32, one rounding.

use burn::backend::flex::FlexTensor;
use burn::tensor::{TensorData, bf16};

use super::view;
use crate::flex::compact;
use crate::gemm::half;

/// Computes x·Wᵀ.
pub(super) fn forward(x: &FlexTensor, weight: &FlexTensor) -> FlexTensor {
    let (x, weight) = (view::<bf16>(x), view(weight));
    let mut y = vec![bf16::ZERO; x.rows * weight.rows];
    half::product(&mut y, x, weight.transposed(), false);
    FlexTensor::from_data(TensorData::new(y, [x.rows, weight.rows]))
}

/// Computes A·B, or Aᵀ·B if `transposed`.
pub(super) fn product(a: &FlexTensor, b: &FlexTensor, transposed: bool) -> FlexTensor {
    let (mut left, right) = (view::<bf16>(a), view(b));
    if transposed {
        left = left.transposed();
    }
    let mut out = vec![bf16::ZERO; left.rows * right.columns];
    half::product(&mut out, left, right, false);
    FlexTensor::from_data(TensorData::new(out, [left.rows, right.columns]))
}

/// Computes `sum` + Aᵀ·B, in place if the sum's storage is not shared.
pub(super) fn add_transposed_product(
    sum: FlexTensor,
    a: &FlexTensor,
    b: &FlexTensor,
) -> FlexTensor {
    let mut sum = compact(sum);
    let out = sum.storage_mut::<bf16>();
    half::product(out, view(a).transposed(), view(b), true);
    sum
}

#[cfg(test)]
mod tests;
