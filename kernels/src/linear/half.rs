//! The three products in bf16: operands as they lie, sums in f32, one rounding.

use burn::backend::flex::FlexTensor;
use burn::tensor::{TensorData, bf16};

use crate::flex::shape2;
use crate::gemm::{Matrix, half};

/// x·Wᵀ.
pub(super) fn forward(x: &FlexTensor, weight: &FlexTensor) -> FlexTensor {
    let (x, weight) = (view(x), view(weight));
    let mut y = vec![bf16::ZERO; x.rows * weight.rows];
    half::rows_by_rows(&mut y, x, weight);
    FlexTensor::from_data(TensorData::new(y, [x.rows, weight.rows]))
}

/// A·B or Aᵀ·B.
pub(super) fn product(a: &FlexTensor, b: &FlexTensor, transposed: bool) -> FlexTensor {
    let (mut left, right) = (view(a), view(b));
    if transposed {
        left = left.transposed();
    }
    let mut out = vec![bf16::ZERO; left.rows * right.columns];
    half::product(&mut out, left, right, false);
    FlexTensor::from_data(TensorData::new(out, [left.rows, right.columns]))
}

/// `sum` + Aᵀ·B, in place where nobody else holds the sum.
pub(super) fn onto(sum: FlexTensor, a: &FlexTensor, b: &FlexTensor) -> FlexTensor {
    let mut sum = if sum.is_contiguous() {
        sum
    } else {
        sum.to_contiguous()
    };
    let start = sum.layout().start_offset();
    let len = sum.layout().num_elements();
    let out = &mut sum.storage_mut::<bf16>()[start..start + len];
    half::product(out, view(a).transposed(), view(b), true);
    sum
}

/// Of a tensor whose rows lie behind one another.
fn view(tensor: &FlexTensor) -> Matrix<'_, bf16> {
    debug_assert!(tensor.is_contiguous());
    let [rows, columns] = shape2(tensor);
    let start = tensor.layout().start_offset();
    let numbers = &tensor.storage::<bf16>()[start..start + rows * columns];
    Matrix::new(numbers, rows, columns)
}

#[cfg(test)]
mod tests;
