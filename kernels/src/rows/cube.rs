//! The CubeCL form, for any GPU that CubeCL reaches; computed in f32, whatever the logits are.
//!
//! One cube of 256 units walks over one row, each unit over vectors of columns. What of the support lies
//! in a stretch of 65,536 columns stands in a bitmap of 8 KiB in shared memory, which is made once a
//! stretch; so the walk itself has no barrier, and costs one test of a word a vector.
//!
//! - `row_stats`: every unit keeps a running maximum and Σ exp of its own columns outside the support,
//!   in as many sums as a vector has lanes; planes and then the cube add them up. The support's logits are
//!   gathered by slot beside that, so nothing is ever subtracted from a sum.
//! - `row_gradient`: a vector without support is read and written by one unit. One that has support is
//!   left to the unit of its first support token, which takes log q from the statistics. So each number
//!   is read and written by the same unit, in one launch, in place, with no barrier over device memory,
//!   whose meaning differs between WGSL and CUDA.
//!
//! Rows may lie apart, as CUDA allocates them, and are not copied for that. Indices are u32: a launch
//! covers no more rows than u32 can index and the device can count, and the next one starts behind them.
//! No float is added up atomically: the same input gives the same bits. (The bitmap's words are set by an
//! atomic or, whose order does not matter.)
//!
//! Traffic a row, of v logits in b bytes: the statistics read v·b, and k sectors of 32 bytes again; the
//! gradient reads v·b and writes v·b. The k ids and statistics are small beside that. Instructions a bf16
//! logit, as NVRTC compiles it for sm_90: 8 and 18 (28 and 37 with a softcap, whose tanh is CUDA's).

// Launches without bound checks: `check` and `lanes` hold what they rest on.
#![allow(unsafe_code)]

mod gradient;
mod row;
mod stats;

use std::ops::Range;

use super::{Head, HeadNumbers, RowOps, Sum, columns, stats_dtype};
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
        head: Head,
        sum: Sum,
    ) -> FloatTensor<Self> {
        let (n, v, dtype) = (logits.shape()[0], logits.shape()[1], logits.dtype);
        check(&logits, &support, &[]);
        let numbers = Numbers::new(&head.numbers(v));
        let logits = with_rows(logits);
        let shape = Shape::new([n, support.shape()[1] + columns(sum)]);
        let out = like(&logits, shape, DType::F32);
        let lanes = lanes(&[&logits]);
        for rows in launches(&[&logits]) {
            let part = part(&logits, &rows);
            // SAFETY: `lanes` sees to it that the rows' last vectors lie within the buffer; every other
            // index is below what the tensor's shape says, and the loops end with their columns.
            unsafe {
                stats_kernel::launch_unchecked(
                    &out.client,
                    CubeCount::Static(rows.len() as u32, 1, 1),
                    CubeDim::new_1d(UNITS as u32),
                    lanes,
                    part.into_tensor_arg(),
                    support.clone().into_tensor_arg(),
                    out.clone().into_tensor_arg(),
                    rows.start as u32,
                    numbers.inner,
                    numbers.outer,
                    numbers.vocab,
                    numbers.capped,
                    sum == Sum::WithLogQ,
                    planes(&out),
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
        head: Head,
    ) -> FloatTensor<Self> {
        check(&logits, &support, &[&stats, &gradient]);
        let numbers = Numbers::new(&head.numbers(logits.shape()[1]));
        let logits = with_rows(logits);
        let in_place = logits.can_mut() && logits.is_nonoverlapping();
        let out = match in_place {
            true => logits.clone(),
            false => like(&logits, logits.shape(), logits.dtype),
        };
        let lanes = lanes(&[&logits, &out]);
        for rows in launches(&[&logits, &out]) {
            let (from, to) = (part(&logits, &rows), part(&out, &rows));
            let to = match in_place {
                true => to.as_tensor_alias(0),
                false => to.into_tensor_arg(),
            };
            // SAFETY: as above; rows of `out` are nobody else's, and its units write different columns.
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
                    numbers.inner,
                    numbers.outer,
                    numbers.vocab,
                    numbers.capped,
                    planes(&out),
                    [logits.dtype, support.dtype, stats.dtype].map(dtype_to_storage_type),
                );
            }
        }
        out
    }
}

/// What the kernels rest on: they index without bound checks.
fn check(logits: &CubeTensor, support: &CubeTensor, of_rows: &[&CubeTensor]) {
    let (n, k) = (logits.shape()[0], support.shape()[1]);
    let rows_alike = |tensor: &&CubeTensor| tensor.shape()[0] == n && tensor.shape()[1] >= k + 2;
    assert!(
        k > 0 && support.shape()[0] == n && of_rows.iter().all(rows_alike),
        "row kernels: logits of {n} rows, support {:?}, statistics and gradient {:?}",
        support.shape(),
        of_rows
            .iter()
            .map(|tensor| tensor.shape())
            .collect::<Vec<_>>()
    );
}

/// The head as the kernels take it: s = outer · z, or outer · tanh(inner · z).
struct Numbers {
    inner: f32,
    outer: f32,
    vocab: u32,
    capped: bool,
}

impl Numbers {
    fn new(head: &HeadNumbers) -> Self {
        let capped = head.softcap != 0.0;
        let (inner, outer) = match capped {
            true => (
                head.scale / head.softcap,
                head.softcap * head.inv_temperature,
            ),
            false => (1.0, head.scale * head.inv_temperature),
        };
        Self {
            inner: inner as f32,
            outer: outer as f32,
            vocab: head.vocab as u32,
            capped,
        }
    }
}

/// A tensor whose rows are numbers that lie behind one another; the rows themselves may lie apart.
fn with_rows(tensor: CubeTensor) -> CubeTensor {
    match tensor.meta.strides()[1] {
        1 => tensor,
        _ => into_contiguous_aligned(tensor),
    }
}

fn like(tensor: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    empty_device_dtype(tensor.client.clone(), tensor.device.clone(), shape, dtype)
}

/// Numbers that a unit reads at a time: as many as the device likes and the rows' alignment allows.
/// The last vector of a row may reach past its end, but not past the buffer's.
fn lanes(tensors: &[&CubeTensor]) -> usize {
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

/// The rows of each launch: no more numbers than u32 can index, and no more rows than the device has
/// cubes along a dimension. A part starts where the device can bind a buffer.
fn launches(tensors: &[&CubeTensor]) -> Vec<Range<usize>> {
    let properties = tensors[0].client.properties();
    let cubes = properties.hardware.max_cube_count.0 as usize;
    let strides = tensors.iter().map(|tensor| tensor.meta.strides()[0]);
    let stride = strides.max().unwrap_or(1).max(1);
    let most = cubes.min(u32::MAX as usize / stride);
    split(
        tensors[0].shape()[0],
        most,
        properties.memory.alignment as usize,
    )
}

/// 0..n in parts of `most` rows or the next smaller multiple of `alignment`, which makes any row's first
/// byte a multiple of it too.
fn split(n: usize, most: usize, alignment: usize) -> Vec<Range<usize>> {
    let rows = match n <= most {
        true => n.max(1),
        false => (most / alignment).max(1) * alignment,
    };
    (0..n)
        .step_by(rows)
        .map(|start| start..n.min(start + rows))
        .collect()
}

/// Some rows of a tensor, as a tensor.
fn part(tensor: &CubeTensor, rows: &Range<usize>) -> CubeTensor {
    let shape = tensor.shape();
    let mut part = tensor.clone();
    if *rows != (0..shape[0]) {
        let bytes = |rows: usize| (rows * tensor.meta.strides()[0] * tensor.dtype.size()) as u64;
        part.handle = part
            .handle
            .offset_start(bytes(rows.start))
            .offset_end(bytes(shape[0] - rows.end));
        part.meta.shape[0] = rows.len();
    }
    part
}

fn planes(tensor: &CubeTensor) -> bool {
    let properties = tensor.client.properties();
    properties.features.plane.contains(Plane::Ops)
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn parts_cover_all_rows_and_start_at_multiples() {
        for (n, most, alignment, bounds) in [
            (5, 5, 4, vec![0, 5]),
            (6, 5, 4, vec![0, 4, 6]),
            (9, 9, 4, vec![0, 9]),
            (17, 9, 4, vec![0, 8, 16, 17]),
            (0, 9, 4, vec![]),
            // 4,294,967,295 / 152,064 rows of bf16, of which Qwen has 151,936 columns.
            (60_000, 28_244, 512, vec![0, 28_160, 56_320, 60_000]),
        ] {
            let want: Vec<_> = bounds.windows(2).map(|ends| ends[0]..ends[1]).collect();
            assert_eq!(split(n, most, alignment), want);
        }
    }
}
