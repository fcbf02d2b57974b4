//! The products of a linear layer in bf16: operands in their stored layout, sums in f32, at most one rounding.

use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, bf16};

use super::view;
use crate::flex::{compact, matrix, vec_written_by};
use crate::float::StoredFloat;
use crate::gemm::{Matrix, half};

/// Computes x·Wᵀ.
pub(super) fn forward(x: &FlexTensor, weight: &FlexTensor) -> FlexTensor {
    new_product::<bf16>(view(x), view(weight).transposed())
}

/// Computes x·Wᵀ into `y`, which must be as large and not shared.
pub(super) fn forward_into(y: &mut FlexTensor, x: &FlexTensor, weight: &FlexTensor) {
    let out = y.storage_mut::<bf16>();
    half::product_into(out, view(x), view(weight).transposed());
}

/// Computes A·B, or Aᵀ·B if `transposed`.
pub(super) fn product(a: &FlexTensor, b: &FlexTensor, transposed: bool) -> FlexTensor {
    let (mut left, right) = (view::<bf16>(a), view(b));
    if transposed {
        left = left.transposed();
    }
    new_product::<bf16>(left, right)
}

/// Computes Aᵀ·B in f32.
pub(super) fn transposed_product_f32(a: &FlexTensor, b: &FlexTensor) -> FlexTensor {
    new_product::<f32>(view(a).transposed(), view(b))
}

fn new_product<E: StoredFloat<f32>>(a: Matrix<'_, bf16>, b: Matrix<'_, bf16>) -> FlexTensor {
    let shape = [a.rows, b.columns];
    // SAFETY: the product writes all of its output.
    let out = unsafe { vec_written_by(shape[0] * shape[1], |out| half::product::<E>(out, a, b)) };
    matrix(out, shape)
}

/// Computes `sum` + Aᵀ·B, in place if the sum's storage is not shared. The sum is bf16 or f32.
pub(super) fn add_transposed_product(
    sum: FlexTensor,
    a: &FlexTensor,
    b: &FlexTensor,
) -> FlexTensor {
    let mut sum = compact(sum);
    let (left, right) = (view(a).transposed(), view(b));
    match sum.dtype() {
        DType::F32 => half::add_product(sum.storage_mut::<f32>(), left, right),
        _ => half::add_product(sum.storage_mut::<bf16>(), left, right),
    }
    sum
}

#[cfg(test)]
mod tests;
