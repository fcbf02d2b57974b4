//! The CubeCL form, for every GPU that CubeCL supports. Sums and softmax are in f32.
//!
//! One cube processes a block of rows of one head and loops over the blocks of keys that its rows see. So the scores
//! of one block at a time exist, and memory is linear in n (Dao 2023, FlashAttention-2).
//!
//! - Forward: each row has a running maximum and Σ exp, and the output is rescaled when the maximum grows.
//! - Gradient: a first kernel computes D. A second kernel by blocks of keys computes ∂L/∂k and ∂L/∂v; it loops over the
//!   query heads of its key head and over the blocks of rows that see the keys. A third kernel by blocks of rows
//!   computes ∂L/∂q. The second and third kernels compute the scores again. A fourth kernel sums ∂L/∂sink over the rows.
//!
//! There are no atomic operations, so the same input gives the same bits.
//!
//! Traffic: for each pair of blocks, all operands are read once, through 26 KiB of shared memory whatever the width of
//! a head. With blocks of 64 rows, that is 43 products per number that is read.

mod block;
#[cfg(feature = "cuda-sources")]
mod cuda;
mod forward;
mod gradient;

#[cfg(feature = "cuda-sources")]
pub(crate) use cuda::cuda_kernels;

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

use super::{AttentionOps, AttentionOptions};
use block::{BLOCK, STAGED, TILE, UNITS};
use forward::forward_kernel;
use gradient::{
    key_gradient_kernel, query_gradient_kernel, row_constants_kernel, sink_gradient_kernel,
};

/// Largest width of a head of keys, and of values. A unit's sums, four rows of a sixteenth of the width, must fit into
/// registers, those of keys and of values in the gradient of both.
const MAX_HEAD_WIDTH: usize = 256;

/// Whether the kernels compute attention of these tensors: all f32, f16 or bf16, on a CubeCL device with enough units
/// and shared memory.
pub(super) fn supports(tensors: [&Tensor<2>; 3], options: &AttentionOptions) -> bool {
    let [n, columns] = tensors[0].dims();
    let dtype = tensors[0].dtype();
    let device = tensors[0].device().inner();
    let DispatchDevice::Cube(device) = device.as_dispatch() else {
        return false;
    };
    let shared = (STAGED + TILE) * size_of::<f32>();
    let client = device.client();
    let hardware = &client.properties().hardware;
    let value_columns = tensors[2].dims()[1];
    let widths = [columns / options.heads, value_columns / options.key_heads];
    n > 0
        && widths
            .iter()
            .all(|width| (1..=MAX_HEAD_WIDTH).contains(width))
        && matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
        && tensors.iter().all(|tensor| tensor.dtype() == dtype)
        && hardware.max_units_per_cube >= UNITS
        && hardware.max_shared_memory_size >= shared
}

impl AttentionOps for CubeBackend {
    fn attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        documents: Vec<usize>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [q, k, v, sinks] = [q, k, v, sinks].map(into_contiguous);
        let launch = LaunchSettings::new(&q, &v, options);
        let shape = Shape::new([launch.n, options.heads * launch.w]);
        let output = empty_like(&q, shape, q.dtype);
        let log_sums = empty_like(&q, Shape::new([launch.n, options.heads]), DType::F32);
        forward_kernel::launch(
            &output.client,
            launch.cubes(options.heads),
            CubeDim::new_1d(UNITS),
            q.clone().into_tensor_arg(),
            k.into_tensor_arg(),
            v.into_tensor_arg(),
            sinks.into_tensor_arg(),
            bounds(&documents, options.window, &q.device).into_tensor_arg(),
            output.clone().into_tensor_arg(),
            log_sums.clone().into_tensor_arg(),
            launch.scale,
            launch.softcap,
            launch.capped,
            launch.e,
            launch.w,
            dtype_to_storage_type(q.dtype),
        );
        (output, log_sums)
    }

    fn attention_gradient(
        gradient: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        output: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        documents: Vec<usize>,
        options: AttentionOptions,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    ) {
        let [gradient, q, k, v, sinks, output, log_sums] =
            [gradient, q, k, v, sinks, output, log_sums].map(into_contiguous);
        let launch = LaunchSettings::new(&q, &v, options);
        let inputs = GradientTensors {
            row_constants: launch.row_constants(&gradient, output, log_sums),
            bounds: bounds(&documents, options.window, &q.device),
            gradient,
            q,
            k,
            v,
        };
        let dsinks = launch.sink_gradients(&inputs, sinks);
        let (dk, dv) = launch.key_gradients(&inputs);
        (launch.query_gradient(inputs), dk, dv, dsinks)
    }
}

/// The tensors that the kernels of both gradients read.
struct GradientTensors {
    gradient: CubeTensor,
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
    row_constants: CubeTensor,
    bounds: CubeTensor,
}

/// Sizes and constants of a launch.
struct LaunchSettings {
    n: usize,
    /// Width of a head of queries and keys.
    e: usize,
    /// Width of a head of values.
    w: usize,
    options: AttentionOptions,
    scale: f32,
    softcap: f32,
    capped: bool,
}

impl LaunchSettings {
    fn new(q: &CubeTensor, v: &CubeTensor, options: AttentionOptions) -> Self {
        let (shape, value_shape) = (q.shape(), v.shape());
        Self {
            n: shape[0],
            e: shape[1] / options.heads,
            w: value_shape[1] / options.key_heads,
            options,
            scale: options.scale as f32,
            softcap: options.softcap.unwrap_or(1.0) as f32,
            capped: options.softcap.is_some(),
        }
    }

    /// One cube for each head and block of rows. The heads of a block are adjacent, because they read the same keys.
    fn cubes(&self, heads: usize) -> CubeCount {
        CubeCount::Static(heads as u32, self.n.div_ceil(BLOCK) as u32, 1)
    }

    /// Computes log Z and D of each row and head, `[n, 2 · heads]` in f32.
    fn row_constants(
        &self,
        gradient: &CubeTensor,
        output: CubeTensor,
        log_sums: CubeTensor,
    ) -> CubeTensor {
        let heads = self.options.heads;
        let row_constants = empty_like(gradient, Shape::new([self.n, 2 * heads]), DType::F32);
        row_constants_kernel::launch(
            &gradient.client,
            CubeCount::Static((self.n * heads).div_ceil(UNITS as usize) as u32, 1, 1),
            CubeDim::new_1d(UNITS),
            gradient.clone().into_tensor_arg(),
            output.into_tensor_arg(),
            log_sums.into_tensor_arg(),
            row_constants.clone().into_tensor_arg(),
            self.w,
            dtype_to_storage_type(gradient.dtype),
        );
        row_constants
    }

    /// Computes ∂L/∂sinks.
    fn sink_gradients(&self, inputs: &GradientTensors, sinks: CubeTensor) -> CubeTensor {
        let heads = self.options.heads;
        let gradients = empty_like(&sinks, Shape::new([heads]), DType::F32);
        sink_gradient_kernel::launch(
            &gradients.client,
            CubeCount::Static(heads as u32, 1, 1),
            CubeDim::new_1d(UNITS),
            inputs.row_constants.clone().into_tensor_arg(),
            sinks.into_tensor_arg(),
            gradients.clone().into_tensor_arg(),
        );
        gradients
    }

    /// Computes ∂L/∂k and ∂L/∂v.
    fn key_gradients(&self, inputs: &GradientTensors) -> (CubeTensor, CubeTensor) {
        let (n, k) = (self.n, &inputs.k);
        let [key_columns, value_columns] =
            [self.e, self.w].map(|width| self.options.key_heads * width);
        // Both gradients are in one tensor, because some devices bind at most eight buffers.
        let columns = key_columns + value_columns;
        let gradients = empty_like(k, Shape::new([n, columns]), k.dtype);
        key_gradient_kernel::launch(
            &gradients.client,
            self.cubes(self.options.key_heads),
            CubeDim::new_1d(UNITS),
            inputs.q.clone().into_tensor_arg(),
            k.clone().into_tensor_arg(),
            inputs.v.clone().into_tensor_arg(),
            inputs.gradient.clone().into_tensor_arg(),
            inputs.row_constants.clone().into_tensor_arg(),
            inputs.bounds.clone().into_tensor_arg(),
            gradients.clone().into_tensor_arg(),
            self.scale,
            self.softcap,
            self.capped,
            self.e,
            self.w,
            dtype_to_storage_type(k.dtype),
        );
        let part = |part| slice(gradients.clone(), &[0..n, part]);
        (part(0..key_columns), part(key_columns..columns))
    }

    /// Computes ∂L/∂q.
    fn query_gradient(&self, inputs: GradientTensors) -> CubeTensor {
        let q = inputs.q;
        let query_gradient = empty_like(&q, q.shape(), q.dtype);
        let dtype = dtype_to_storage_type(q.dtype);
        query_gradient_kernel::launch(
            &query_gradient.client,
            self.cubes(self.options.heads),
            CubeDim::new_1d(UNITS),
            q.into_tensor_arg(),
            inputs.k.into_tensor_arg(),
            inputs.v.into_tensor_arg(),
            inputs.gradient.into_tensor_arg(),
            inputs.row_constants.into_tensor_arg(),
            inputs.bounds.into_tensor_arg(),
            query_gradient.clone().into_tensor_arg(),
            self.scale,
            self.softcap,
            self.capped,
            self.e,
            self.w,
            dtype,
        );
        query_gradient
    }
}

/// Allocates a tensor without gaps between rows, as the kernels expect; the usual allocation may pad rows.
fn empty_like(tensor: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(tensor.client.clone(), tensor.device.clone(), shape, dtype)
}

/// Returns `[2, n]`: the first key that each row sees, and for each key the row after the last that sees the key. Both
/// are non-decreasing.
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
    // On CUDA an upload may have gaps between its rows.
    into_contiguous(CubeBackend::int_from_data(
        TensorData::new(first, [2, n]),
        device,
    ))
}
