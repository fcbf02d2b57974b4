//! CPU tensors as slices, and which tensors the plain loops take.

// Output vectors are allocated without being zeroed, because the loops write every element once.
#![allow(unsafe_code)]

use std::borrow::Cow;
use std::mem::MaybeUninit;

use burn::backend::DispatchDevice;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Element, Tensor, TensorData};

use crate::float::{StoredFloat, with_stored_type};
use crate::simd::vectorize_closure;
use crate::team::for_each_chunk;

/// Whether a tensor is f32 on the CPU, so that the f32 loops compute it directly.
pub(crate) fn is_cpu_f32<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.dtype() == DType::F32 && is_on_cpu(tensor)
}

/// Whether a tensor is f32, f16 or bf16 on the CPU, so that loops that compute in f32 take it. Any other tensor is
/// computed in tensor operations.
pub(crate) fn is_cpu_float<const D: usize>(tensor: &Tensor<D>) -> bool {
    is_cpu_f32(tensor) || is_cpu_half(tensor)
}

/// Whether a tensor is f16 or bf16 on the CPU. The CPU has no arithmetic for these types, so the loops compute
/// such a tensor in f32.
pub(crate) fn is_cpu_half<const D: usize>(tensor: &Tensor<D>) -> bool {
    matches!(tensor.dtype(), DType::BF16 | DType::F16) && is_on_cpu(tensor)
}

/// Whether a tensor is on the CPU, tracked by autodiff or not.
pub(crate) fn is_on_cpu<const D: usize>(tensor: &Tensor<D>) -> bool {
    let device = tensor.device().inner();
    matches!(device.as_dispatch(), DispatchDevice::Flex(_))
}

/// Casts to f32, which holds every number of the half precisions exactly.
pub(crate) fn to_f32<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    tensor.cast(DType::F32)
}

/// The elements of a contiguous tensor as a slice.
pub(crate) fn elements<E: Element + bytemuck::Pod>(tensor: &FlexTensor) -> &[E] {
    debug_assert!(tensor.is_contiguous());
    let start = tensor.layout().start_offset();
    &tensor.storage::<E>()[start..start + tensor.layout().num_elements()]
}

/// Rows and columns of a matrix.
pub(crate) fn shape2(tensor: &FlexTensor) -> [usize; 2] {
    let shape = tensor.layout().shape();
    [shape[0], shape[1]]
}

/// The elements of a contiguous f32, f16 or bf16 tensor in f32; borrowed if they are f32.
pub(crate) fn widened(tensor: &FlexTensor) -> Cow<'_, [f32]> {
    with_stored_type!(tensor.dtype(), E => match E::as_computed(elements::<E>(tensor)) {
        Some(numbers) => Cow::Borrowed(numbers),
        None => elements::<E>(tensor).iter().map(|x| x.widen()).collect(),
    })
}

/// Numbers per task of a conversion.
const CONVERTED_CHUNK: usize = 1 << 15;

/// Returns a contiguous f32, f16 or bf16 matrix in f32, converted on all threads.
pub(crate) fn widened_matrix(tensor: FlexTensor) -> FlexTensor {
    if tensor.dtype() == DType::F32 {
        return tensor;
    }
    let shape = shape2(&tensor);
    with_stored_type!(tensor.dtype(), E => {
        let numbers = elements::<E>(&tensor);
        matrix(converted(numbers, #[inline(always)] |x: E| x.widen()), shape)
    })
}

/// Returns a contiguous f32 matrix in f32, f16 or bf16, rounded to nearest on all threads.
pub(crate) fn narrowed_matrix(tensor: FlexTensor, dtype: DType) -> FlexTensor {
    if dtype == DType::F32 {
        return tensor;
    }
    let shape = shape2(&tensor);
    with_stored_type!(dtype, E => {
        let numbers = elements::<f32>(&tensor);
        matrix(converted(numbers, #[inline(always)] |x: f32| E::narrow(x)), shape)
    })
}

fn converted<A: Copy + Sync, B: Send>(numbers: &[A], convert: impl Fn(A) -> B + Sync) -> Vec<B> {
    let write = |out: &mut [MaybeUninit<B>]| {
        for_each_chunk(out, CONVERTED_CHUNK, |task, out| {
            let numbers = &numbers[task * CONVERTED_CHUNK..];
            vectorize_closure(
                #[inline(always)]
                || {
                    for (out, number) in out.iter_mut().zip(numbers) {
                        out.write(convert(*number));
                    }
                },
            );
        });
    };
    // SAFETY: there are as many numbers as outputs, so each output is written.
    unsafe { vec_written_by(numbers.len(), write) }
}

/// Allocates `len` numbers and lets `write` initialise all of them.
///
/// # Safety
/// `write` must write every one of them.
pub(crate) unsafe fn vec_written_by<E>(
    len: usize,
    write: impl FnOnce(&mut [MaybeUninit<E>]),
) -> Vec<E> {
    let mut values = Vec::with_capacity(len);
    write(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is at least `len`, and the caller guarantees that all elements are written.
    unsafe { values.set_len(len) };
    values
}

pub(crate) fn matrix<E: Element>(values: Vec<E>, shape: [usize; 2]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// Returns a vector of a type with which the loops compute in f32, rounded to nearest.
pub(crate) fn vector(values: Vec<f32>, dtype: DType) -> FlexTensor {
    let len = values.len();
    FlexTensor::from_data(TensorData::new(values, [len]).convert_dtype(dtype))
}

/// Makes a tensor contiguous with a storage that holds its elements and nothing else. A tensor that is so
/// already is returned without a copy.
pub(crate) fn compact(tensor: FlexTensor) -> FlexTensor {
    let bytes = tensor.layout().num_elements() * tensor.dtype().size();
    if tensor.is_contiguous() && tensor.bytes().len() == bytes {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// Rows per task for ops that do little work per number: 65,536 numbers, so that a task costs more than waking
/// a thread.
pub(crate) fn rows_per_task(columns: usize) -> usize {
    (65_536 / columns.max(1)).max(1)
}
