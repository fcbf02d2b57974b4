//! The CubeCL form, for every GPU that CubeCL supports. Arithmetic is in f32, whatever the type of the logits.
//!
//! One cube of 256 units processes one row, and each unit processes vectors of columns. The support tokens within a
//! segment of 65,536 columns are marked in a bitmap of 8 KiB in shared memory, which is built once per segment. So
//! the loop over a segment needs no barrier, and tests one word of the bitmap per vector.
//!
//! - `row_stats`: each unit keeps a running maximum and Σ exp of its own columns outside the support, with one sum for
//!   each lane of a vector; then planes and the cube add them. The logits of the support are gathered by slot
//!   separately, so nothing is ever subtracted from a sum.
//! - `row_gradient`: a vector without support tokens is read and written by one unit. A vector with support tokens is
//!   processed by the unit of its first support token, which takes log q from the statistics. So each number is read
//!   and written by the same unit, in one launch, in place, without a barrier over device memory, whose meaning
//!   differs between WGSL and CUDA.
//!
//! Rows may have gaps between them, as in CUDA's pitched allocations, and are not copied because of that. Indices are
//! u32: a launch covers at most as many rows as u32 can index and the device has cubes, and further launches cover
//! the rest. No float is added atomically, so the same input gives the same bits. (The bitmap's words are set with an
//! atomic or, whose order does not matter.)
//!
//! Traffic for a row of v logits of b bytes: the statistics read v·b bytes, and k sectors of 32 bytes a second time;
//! the gradient reads v·b and writes v·b. The k ids and statistics are small compared with that. Instructions per bf16
//! logit, compiled by NVRTC for sm_90: 8 for the statistics and 18 for the gradient (28 and 37 with a softcap, whose
//! tanh is CUDA's).

// Kernels are launched without bound checks; `check_shapes` and `vector_size` ensure that all indices are valid.
#![allow(unsafe_code)]

#[cfg(feature = "cuda-sources")]
mod cuda;
mod gradient;
mod row;
mod stats;

#[cfg(feature = "cuda-sources")]
pub(crate) use cuda::cuda_kernels;

use std::ops::Range;

use super::{LogQSum, LogitTransform, RowOps, TransformConstants, extra_columns, stats_dtype};
use burn::backend::TensorMetadata;
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::{
    CubeBackend, kernel::into_contiguous_aligned, ops::numeric::empty_device_dtype,
    tensor::CubeTensor,
};
use cubecl::features::Plane;
use cubecl::prelude::*;

use gradient::gradient_kernel;
use row::UNITS;
use stats::stats_kernel;

impl RowOps for CubeBackend {
    fn row_stats(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        transform: LogitTransform,
        sum: LogQSum,
    ) -> FloatTensor<Self> {
        let (n, v, dtype) = (logits.shape()[0], logits.shape()[1], logits.dtype);
        check_shapes(&logits, &support, &[]);
        let constants = KernelTransform::new(&transform.constants(v));
        let logits = with_contiguous_columns(logits);
        let shape = Shape::new([n, support.shape()[1] + extra_columns(sum)]);
        let out = empty_like(&logits, shape, DType::F32);
        let lanes = vector_size(&[&logits]);
        for rows in launches(&[&logits]) {
            let launch_logits = slice_rows(&logits, &rows);
            // SAFETY: `vector_size` ensures that the last vectors of the rows are within the buffer; every other
            // index is below the tensor's shape, and the loops end with the row's columns.
            unsafe {
                stats_kernel::launch_unchecked(
                    &out.client,
                    CubeCount::Static(rows.len() as u32, 1, 1),
                    CubeDim::new_1d(UNITS as u32),
                    lanes,
                    launch_logits.into_tensor_arg(),
                    support.clone().into_tensor_arg(),
                    out.clone().into_tensor_arg(),
                    rows.start as u32,
                    constants.inner,
                    constants.outer,
                    constants.vocab,
                    constants.capped,
                    sum == LogQSum::Included,
                    has_planes(&out),
                    out.client.name() == "cuda",
                    [logits.dtype, support.dtype].map(dtype_to_storage_type),
                );
            }
        }
        match stats_dtype(dtype) {
            DType::F64 => Self::float_cast(out, FloatDType::F64),
            _ => out,
        }
    }

    fn row_gradient(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        stats: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        transform: LogitTransform,
    ) -> FloatTensor<Self> {
        check_shapes(&logits, &support, &[&stats, &gradient]);
        let constants = KernelTransform::new(&transform.constants(logits.shape()[1]));
        let logits = with_contiguous_columns(logits);
        let in_place = logits.can_mut() && logits.is_nonoverlapping();
        let out = match in_place {
            true => logits.clone(),
            false => empty_like(&logits, logits.shape(), logits.dtype),
        };
        let lanes = vector_size(&[&logits, &out]);
        for rows in launches(&[&logits, &out]) {
            let (from, to) = (slice_rows(&logits, &rows), slice_rows(&out, &rows));
            let to = match in_place {
                true => to.as_tensor_alias(0),
                false => to.into_tensor_arg(),
            };
            // SAFETY: the indices are valid for the same reasons as in `row_stats`. `out` is not shared with another
            // tensor, and the units of a cube write different columns.
            unsafe {
                gradient_kernel::launch_unchecked(
                    &out.client,
                    CubeCount::Static(rows.len() as u32, 1, 1),
                    CubeDim::new_1d(UNITS as u32),
                    lanes,
                    from.into_tensor_arg(),
                    support.clone().into_tensor_arg(),
                    stats.clone().into_tensor_arg(),
                    gradient.clone().into_tensor_arg(),
                    to,
                    rows.start as u32,
                    constants.inner,
                    constants.outer,
                    constants.vocab,
                    constants.capped,
                    has_planes(&out),
                    [logits.dtype, support.dtype, stats.dtype].map(dtype_to_storage_type),
                );
            }
        }
        out
    }
}

/// Asserts the shapes that the kernels rely on, because they index without bound checks. `stats` are the statistics
/// and their gradient.
fn check_shapes(logits: &CubeTensor, support: &CubeTensor, stats: &[&CubeTensor]) {
    let (n, k) = (logits.shape()[0], support.shape()[1]);
    let fits = |tensor: &&CubeTensor| tensor.shape()[0] == n && tensor.shape()[1] >= k + 2;
    assert!(
        k > 0 && support.shape()[0] == n && stats.iter().all(fits),
        "row kernels: logits of {n} rows, support {:?}, statistics and gradient {:?}",
        support.shape(),
        stats
            .iter()
            .map(|tensor| tensor.shape())
            .collect::<Vec<_>>()
    );
}

/// The logit transform in the form of the kernels: s = outer · z, or outer · tanh(inner · z) if `capped`.
struct KernelTransform {
    inner: f32,
    outer: f32,
    vocab: u32,
    capped: bool,
}

impl KernelTransform {
    fn new(transform: &TransformConstants) -> Self {
        let TransformConstants {
            scale,
            softcap,
            inv_temperature,
            vocab,
        } = *transform;
        let capped = softcap != 0.0;
        let (inner, outer) = match capped {
            true => (scale / softcap, softcap * inv_temperature),
            false => (1.0, scale * inv_temperature),
        };
        Self {
            inner: inner as f32,
            outer: outer as f32,
            vocab: vocab as u32,
            capped,
        }
    }
}

/// Makes the columns of each row contiguous; there may be gaps between rows.
fn with_contiguous_columns(tensor: CubeTensor) -> CubeTensor {
    match tensor.meta.strides()[1] {
        1 => tensor,
        _ => into_contiguous_aligned(tensor),
    }
}

fn empty_like(tensor: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    empty_device_dtype(tensor.client.clone(), tensor.device.clone(), shape, dtype)
}

/// Numbers that a unit reads at a time: the device's preferred vector size that the rows' alignment allows. The last
/// vector of a row may reach past the row's end, but not past the end of the buffer.
fn vector_size(tensors: &[&CubeTensor]) -> usize {
    let fits = |tensor: &CubeTensor, lanes: usize| {
        let (shape, size) = (tensor.shape(), tensor.dtype.size());
        let stride = tensor.meta.strides()[0];
        let end = (shape[0].max(1) - 1) * stride + shape[1].next_multiple_of(lanes);
        let start = tensor.handle.offset_start.unwrap_or(0) as usize;
        stride.is_multiple_of(lanes)
            && start.is_multiple_of(lanes * size)
            && (end * size) as u64 <= tensor.handle.size_in_used()
    };
    let first = tensors[0];
    let sizes = first.client.io_optimized_vector_sizes(first.dtype.size());
    let mut sizes = sizes.filter(|&lanes| tensors.iter().all(|tensor| fits(tensor, lanes)));
    sizes.next().unwrap_or(1)
}

/// The rows of each launch: at most as many numbers as u32 can index, and at most as many rows as the device has cubes
/// along a dimension. Each launch starts at an offset at which the device can bind a buffer.
fn launches(tensors: &[&CubeTensor]) -> Vec<Range<usize>> {
    let properties = tensors[0].client.properties();
    let cubes = properties.hardware.max_cube_count.0 as usize;
    let strides = tensors.iter().map(|tensor| tensor.meta.strides()[0]);
    let stride = strides.max().unwrap_or(1).max(1);
    let max_rows = cubes.min(u32::MAX as usize / stride);
    split_rows(
        tensors[0].shape()[0],
        max_rows,
        properties.memory.alignment as usize,
    )
}

/// Divides 0..n into ranges of `max_rows` rows, rounded down to a multiple of `alignment` if there are several. The
/// byte offset of a range's first row is then a multiple of `alignment` too.
fn split_rows(n: usize, max_rows: usize, alignment: usize) -> Vec<Range<usize>> {
    let rows = match n <= max_rows {
        true => n.max(1),
        false => (max_rows / alignment).max(1) * alignment,
    };
    (0..n)
        .step_by(rows)
        .map(|start| start..n.min(start + rows))
        .collect()
}

/// Returns a view of some rows of a tensor.
fn slice_rows(tensor: &CubeTensor, rows: &Range<usize>) -> CubeTensor {
    let shape = tensor.shape();
    let mut slice = tensor.clone();
    if *rows != (0..shape[0]) {
        let bytes = |rows: usize| (rows * tensor.meta.strides()[0] * tensor.dtype.size()) as u64;
        slice.handle = slice
            .handle
            .offset_start(bytes(rows.start))
            .offset_end(bytes(shape[0] - rows.end));
        slice.meta.shape[0] = rows.len();
    }
    slice
}

/// Whether the device has operations over planes (subgroups, warps).
fn has_planes(tensor: &CubeTensor) -> bool {
    let properties = tensor.client.properties();
    properties.features.plane.contains(Plane::Ops)
}

#[cfg(test)]
mod tests {
    use super::split_rows;

    #[test]
    fn launches_cover_all_rows_and_start_at_multiples_of_the_alignment() {
        for (n, max_rows, alignment, bounds) in [
            (5, 5, 4, vec![0, 5]),
            (6, 5, 4, vec![0, 4, 6]),
            (9, 9, 4, vec![0, 9]),
            (17, 9, 4, vec![0, 8, 16, 17]),
            (0, 9, 4, vec![]),
            // Rows of Qwen's 151,936 columns have a stride of 152,064, of which u32 can index 28,244.
            (60_000, 28_244, 512, vec![0, 28_160, 56_320, 60_000]),
        ] {
            let want: Vec<_> = bounds.windows(2).map(|ends| ends[0]..ends[1]).collect();
            assert_eq!(split_rows(n, max_rows, alignment), want);
        }
    }
}
