//! Tensors of the CPU as slices, and which tensors the plain loops take.

// Memory that is written once is not filled with zeros first.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use burn::backend::DispatchDevice;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Tensor, TensorData};

/// Whether the plain f32 loops compute this tensor: f32 on the CPU.
pub(crate) fn plain_f32<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.dtype() == DType::F32 && on_cpu(tensor)
}

/// Whether the plain loops compute this tensor once it is f32: a half precision on the CPU, which has no
/// arithmetic of its own for it. Whatever is neither takes the same formula in tensor operations.
pub(crate) fn plain_half<const D: usize>(tensor: &Tensor<D>) -> bool {
    matches!(tensor.dtype(), DType::BF16 | DType::F16) && on_cpu(tensor)
}

fn on_cpu<const D: usize>(tensor: &Tensor<D>) -> bool {
    let device = tensor.device().inner();
    matches!(device.as_dispatch(), DispatchDevice::Flex(_))
}

/// In f32, which every half precision is part of.
pub(crate) fn wide<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor.cast(DType::F32)
}

/// The numbers of a tensor whose rows lie behind one another.
pub(crate) fn numbers(tensor: &FlexTensor) -> &[f32] {
    debug_assert!(tensor.is_contiguous());
    let start = tensor.layout().start_offset();
    let len = tensor.layout().num_elements();
    &tensor.storage::<f32>()[start..start + len]
}

/// Rows and columns.
pub(crate) fn shape2(tensor: &FlexTensor) -> [usize; 2] {
    let shape = tensor.layout().shape();
    [shape[0], shape[1]]
}

/// `len` numbers, all of which `write` writes.
///
/// # Safety
/// `write` must write every one of them.
pub(crate) unsafe fn written(len: usize, write: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    write(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: there is room for them, and the caller vouches that they are written.
    unsafe { values.set_len(len) };
    values
}

pub(crate) fn matrix(values: Vec<f32>, shape: [usize; 2]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

pub(crate) fn vector(values: Vec<f32>) -> FlexTensor {
    let len = values.len();
    FlexTensor::from_data(TensorData::new(values, [len]))
}

/// A tensor whose storage is its numbers and nothing else; the same one where it already is.
pub(crate) fn whole(tensor: FlexTensor) -> FlexTensor {
    let len = tensor.layout().num_elements();
    let alone = tensor.is_contiguous()
        && tensor.layout().start_offset() == 0
        && tensor.storage::<f32>().len() == len;
    if alone {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// Rows that one task takes where rows are cheap: enough for waking a thread to be worth it.
pub(crate) fn rows_a_task(columns: usize) -> usize {
    (65_536 / columns.max(1)).max(1)
}
