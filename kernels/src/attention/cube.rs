//! The CubeCL form, for any GPU that CubeCL reaches; sums and softmax in f32.
//!
//! One cube takes a block of rows of one head and walks over the blocks of keys that its rows see, so
//! scores exist for one block at a time, and memory grows with n (Dao 2023, FlashAttention-2). Forward: a
//! running maximum and Σ exp a row, after which the output is rescaled as it grows. Gradient: D first;
//! then a kernel by blocks of keys for ∂L/∂k and ∂L/∂v, which walks over the query heads of its key head
//! and the blocks of rows that see it, and a kernel by blocks of rows for ∂L/∂q. Both compute the scores
//! again. No atomics: the same input gives the same bits.
//!
//! Traffic: all operands are read once a pair of blocks, through shared memory of 26 KiB whatever the
//! width of a head; with blocks of 64 those are 43 products for each number that is read.

mod block;
mod forward;
mod gradient;

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::IntTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{DispatchDevice, TensorMetadata};
use burn::tensor::{DType, Shape, Tensor, TensorData};
use burn_cubecl::{
    CubeBackend, CubeDevice,
    kernel::{into_contiguous, slice},
    ops::numeric::empty_device_contiguous_dtype,
    tensor::CubeTensor,
};
use cubecl::prelude::*;

use super::{Attention, AttentionOps};
use block::{BLOCK, GRID, STAGED, TILE, UNITS};
use forward::forward_kernel;
use gradient::{key_gradient_kernel, query_gradient_kernel, row_numbers_kernel};

/// The widest head. A unit's sums over four rows of a sixteenth of it have to fit into registers, twice
/// over in the gradient of keys and values.
const WIDEST: usize = 256;

/// Whether the kernels compute these: f32, f16 or bf16 on a CubeCL device with room for a cube.
pub(super) fn takes(tensors: [&Tensor<2>; 3], how: &Attention) -> bool {
    let [n, columns] = tensors[0].dims();
    let dtype = tensors[0].dtype();
    let device = tensors[0].device().inner();
    let DispatchDevice::Cube(device) = device.as_dispatch() else {
        return false;
    };
    let shared = (STAGED + TILE) * size_of::<f32>();
    let client = device.client();
    let hardware = &client.properties().hardware;
    n > 0
        && (1..=WIDEST).contains(&(columns / how.heads))
        && matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
        && tensors.iter().all(|tensor| tensor.dtype() == dtype)
        && hardware.max_units_per_cube >= UNITS
        && hardware.max_shared_memory_size >= shared
}

impl AttentionOps for CubeBackend {
    fn attention_rows(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        documents: Vec<usize>,
        how: Attention,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [q, k, v] = [q, k, v].map(into_contiguous);
        let shape = Sizes::new(&q, &how);
        let output = like(&q, q.shape(), q.dtype);
        let log_sums = like(&q, Shape::new([shape.n, how.heads]), DType::F32);
        forward_kernel::launch(
            &output.client,
            shape.cubes(how.heads),
            CubeDim::new_1d(UNITS),
            q.clone().into_tensor_arg(),
            k.into_tensor_arg(),
            v.into_tensor_arg(),
            bounds(&documents, how.window, &q.device).into_tensor_arg(),
            output.clone().into_tensor_arg(),
            log_sums.clone().into_tensor_arg(),
            how.scale as f32,
            how.softcap.unwrap_or(1.0) as f32,
            how.softcap.is_some(),
            shape.e,
            shape.staged_rows(),
            dtype_to_storage_type(q.dtype),
        );
        (output, log_sums)
    }

    fn attention_gradient(
        gradient: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        output: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        documents: Vec<usize>,
        how: Attention,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [gradient, q, k, v, output, log_sums] =
            [gradient, q, k, v, output, log_sums].map(into_contiguous);
        let shape = Sizes::new(&q, &how);
        let n = shape.n;
        let bounds = bounds(&documents, how.window, &q.device);
        let (client, dtype) = (q.client.clone(), dtype_to_storage_type(q.dtype));
        let row_numbers = like(&q, Shape::new([n, 2 * how.heads]), DType::F32);
        row_numbers_kernel::launch(
            &client,
            CubeCount::Static((n * how.heads).div_ceil(UNITS as usize) as u32, 1, 1),
            CubeDim::new_1d(UNITS),
            gradient.clone().into_tensor_arg(),
            output.into_tensor_arg(),
            log_sums.into_tensor_arg(),
            row_numbers.clone().into_tensor_arg(),
            shape.e,
            dtype,
        );
        let key_columns = k.shape()[1];
        // Both in one tensor: some devices bind no more than eight buffers.
        let key_gradients = like(&k, Shape::new([2 * n, key_columns]), k.dtype);
        key_gradient_kernel::launch(
            &client,
            shape.cubes(how.key_heads),
            CubeDim::new_1d(UNITS),
            q.clone().into_tensor_arg(),
            k.clone().into_tensor_arg(),
            v.clone().into_tensor_arg(),
            gradient.clone().into_tensor_arg(),
            row_numbers.clone().into_tensor_arg(),
            bounds.clone().into_tensor_arg(),
            key_gradients.clone().into_tensor_arg(),
            how.scale as f32,
            how.softcap.unwrap_or(1.0) as f32,
            how.softcap.is_some(),
            shape.e,
            shape.staged_rows(),
            dtype,
        );
        let query_gradient = like(&q, q.shape(), q.dtype);
        query_gradient_kernel::launch(
            &client,
            shape.cubes(how.heads),
            CubeDim::new_1d(UNITS),
            q.into_tensor_arg(),
            k.into_tensor_arg(),
            v.into_tensor_arg(),
            gradient.into_tensor_arg(),
            row_numbers.into_tensor_arg(),
            bounds.into_tensor_arg(),
            query_gradient.clone().into_tensor_arg(),
            how.scale as f32,
            how.softcap.unwrap_or(1.0) as f32,
            how.softcap.is_some(),
            shape.e,
            shape.staged_rows(),
            dtype,
        );
        let part = |rows| slice(key_gradients.clone(), &[rows, 0..key_columns]);
        (query_gradient, part(0..n), part(n..2 * n))
    }
}

struct Sizes {
    n: usize,
    /// Width of a head.
    e: usize,
}

impl Sizes {
    fn new(q: &CubeTensor, how: &Attention) -> Self {
        let shape = q.shape();
        Self {
            n: shape[0],
            e: shape[1] / how.heads,
        }
    }

    /// A cube for each head and block of rows; the heads of a block beside one another, since they read
    /// the same keys.
    fn cubes(&self, heads: usize) -> CubeCount {
        CubeCount::Static(heads as u32, self.n.div_ceil(BLOCK) as u32, 1)
    }

    /// Rows of a head that are staged at a time: a power of two, hence a divisor of a block.
    fn staged_rows(&self) -> usize {
        let fit = (STAGED / self.e.next_multiple_of(GRID)).min(BLOCK);
        1 << fit.ilog2()
    }
}

/// Rows behind one another, as the kernels count: the usual allocation may set them apart.
fn like(tensor: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(tensor.client.clone(), tensor.device.clone(), shape, dtype)
}

/// `[2, n]`: the first key that each row sees, then the row behind the last one that sees each key.
/// Neither ever falls.
fn bounds(documents: &[usize], window: Option<usize>, device: &CubeDevice) -> CubeTensor {
    let n = documents.iter().sum();
    let window = window.unwrap_or(n);
    let (mut first, mut last) = (Vec::with_capacity(2 * n), Vec::with_capacity(n));
    let mut start = 0;
    for length in documents {
        let end = start + length;
        for row in start..end {
            first.push((row + 1).saturating_sub(window).max(start) as i32);
            last.push(row.saturating_add(window).min(end) as i32);
        }
        start = end;
    }
    first.append(&mut last);
    // CUDA gives the rows of an upload a pitch of their own.
    into_contiguous(CubeBackend::int_from_data(
        TensorData::new(first, [2, n]),
        device,
    ))
}
