//! RMS norm of each row (Zhang and Sennrich 2019): y = (g + b) · x / √(mean(x²) + ε).
//!
//! The constant b is 0 in most families, and 1 in Gemma, whose stored gains are around 0. With r = 1 / √(mean(x²) + ε),
//! d columns, and g in place of g + b:
//!
//! ```text
//! ∂L/∂x_j = r · (g_j ∂L/∂y_j − x_j · r² · Σ_i g_i x_i ∂L/∂y_i / d)
//! ∂L/∂g_j = Σ_rows ∂L/∂y_j · x_j · r
//! ```

// Outputs are allocated without being zeroed, because every element is written once.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{
        base::Checkpointer,
        retro_forward::RetroForward,
        state::BackwardStates,
        strategy::{BalancedCheckpointing, CheckpointStrategy},
    },
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor};

use crate::flex::{
    elements, is_cpu_float, matrix, rows_per_task, shape2, to_f32, vec_written_by, vector, widened,
};
use crate::float::{StoredFloat, with_stored_type};
use crate::simd::vectorize_closure;
use crate::team::{DisjointChunks, for_each_chunk, map_tasks};

/// Computes (g + `gain_offset`) · x / √(mean(x²) + ε): `[n, d]`, `[d]` → `[n, d]` in the type of the rows; differentiable in both. Rows of f16
/// and bf16 are computed in f32 and rounded once. The gain may be in f32 whatever the type of the rows is.
///
/// The norm of each head of a row is the norm of the rows of `[n · heads, e]`.
///
/// # Panics
/// Panics on shapes that do not fit, as burn's own operations do.
#[must_use]
pub fn rms_norm(x_nd: Tensor<2>, gain_d: Tensor<1>, epsilon: f64, gain_offset: f64) -> Tensor<2> {
    let dtype = x_nd.dtype();
    rms_norm_as(x_nd, gain_d, epsilon, gain_offset, dtype)
}

/// Computes [`rms_norm`] in f32 and rounds it once to `dtype`, which may differ from the type of the rows.
///
/// # Panics
/// As there.
#[must_use]
pub fn rms_norm_as(
    x_nd: Tensor<2>,
    gain_d: Tensor<1>,
    epsilon: f64,
    gain_offset: f64,
    dtype: DType,
) -> Tensor<2> {
    assert_eq!(
        x_nd.dims()[1],
        gain_d.dims()[0],
        "rms_norm: columns and gains"
    );
    if is_cpu_float(&x_nd) && is_cpu_float(&gain_d) {
        let (x, gain) = (x_nd.into_dispatch(), gain_d.into_dispatch());
        let options = NormOptions {
            epsilon,
            gain_offset,
            dtype,
        };
        Tensor::from_dispatch(<Dispatch as NormOps>::rms_norm(x, gain, options))
    } else {
        rms_norm_reference(x_nd, gain_d, epsilon, gain_offset).cast(dtype)
    }
}

/// Computes [`rms_norm`] in tensor operations.
#[must_use]
pub fn rms_norm_reference(
    x_nd: Tensor<2>,
    gain_d: Tensor<1>,
    epsilon: f64,
    gain_offset: f64,
) -> Tensor<2> {
    let dtype = x_nd.dtype();
    if matches!(dtype, DType::F16 | DType::BF16) {
        return rms_norm_reference(to_f32(x_nd), to_f32(gain_d), epsilon, gain_offset).cast(dtype);
    }
    let gain_d = gain_d.cast(dtype);
    let mean_square_n1 = x_nd.clone().square().mean_dim(1);
    let normed_nd = x_nd / (mean_square_n1 + epsilon).sqrt();
    normed_nd * (gain_d + gain_offset).unsqueeze()
}

/// The constants of a norm.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NormOptions {
    epsilon: f64,
    gain_offset: f64,
    /// Type of the output.
    dtype: DType,
}

/// The norm and its gradients of rows and outputs in f32, f16 or bf16; computed in f32.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait NormOps: Backend {
    /// `[n, d]`, `[d]` → `[n, d]`.
    fn rms_norm(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        options: NormOptions,
    ) -> FloatTensor<Self>;

    /// Returns ∂L/∂x `[n, d]` and ∂L/∂g `[d]` from ∂L/∂y `[n, d]`, x `[n, d]` and the gain `[d]`.
    fn rms_norm_gradient(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        options: NormOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

impl NormOps for Flex {
    fn rms_norm(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        options: NormOptions,
    ) -> FloatTensor<Self> {
        let (x, gain) = (x.to_contiguous(), gain.to_contiguous());
        let gain = factors(&gain, options);
        with_stored_type!(x.dtype(), X => with_stored_type!(
            options.dtype, Y => normed_rows::<X, Y>(&x, &gain, options.epsilon)
        ))
    }

    fn rms_norm_gradient(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        options: NormOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [dy, x, gain] = [dy, x, gain].map(|tensor| tensor.to_contiguous());
        let factors = factors(&gain, options);
        let (dx, dg) = with_stored_type!(x.dtype(), X => with_stored_type!(
            dy.dtype(), Y => row_gradients::<X, Y>(&dy, &x, &factors, options.epsilon)
        ));
        (dx, vector(dg, gain.dtype()))
    }
}

/// Returns the factors on the normed columns, g + b.
fn factors(gain: &FlexTensor, options: NormOptions) -> Vec<f32> {
    let offset = options.gain_offset as f32;
    widened(gain).iter().map(|gain| gain + offset).collect()
}

fn normed_rows<X: StoredFloat<f32>, Y: StoredFloat<f32>>(
    x: &FlexTensor,
    gain: &[f32],
    epsilon: f64,
) -> FlexTensor {
    let [n, d] = shape2(x);
    let values = elements::<X>(x);
    assert_eq!([values.len(), gain.len()], [n * d, d], "rms_norm");
    let chunk = rows_per_task(d) * d.max(1);
    let write = |y: &mut [MaybeUninit<Y>]| {
        for_each_chunk(y, chunk, |task, y| {
            let x = &values[task * chunk..];
            vectorize_closure(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_mut(d).zip(x.chunks(d)) {
                        let r = inverse_rms(x, epsilon);
                        for ((y, x), g) in y.iter_mut().zip(x).zip(gain) {
                            y.write(Y::narrow(x.widen() * r * g));
                        }
                    }
                },
            );
        });
    };
    // SAFETY: x has as many numbers as y, and the gain as many as a row, which was asserted. So `write` writes each number
    // of y.
    let y = unsafe { vec_written_by(n * d, write) };
    matrix(y, [n, d])
}

/// Computes ∂L/∂x and, in f32, ∂L/∂g.
fn row_gradients<X: StoredFloat<f32>, Y: StoredFloat<f32>>(
    dy: &FlexTensor,
    x: &FlexTensor,
    gain: &[f32],
    epsilon: f64,
) -> (FlexTensor, Vec<f32>) {
    let [n, d] = shape2(x);
    let (dy, x) = (elements::<Y>(dy), elements::<X>(x));
    assert_eq!(
        [dy.len(), x.len(), gain.len()],
        [n * d, n * d, d],
        "rms_norm: the gradient"
    );
    let chunk = rows_per_task(d) * d.max(1);
    // The size of a chunk is fixed, so the sums do not depend on the number of threads.
    let mut chunk_gradients: Vec<Vec<f32>> = Vec::new();
    let write = |dx: &mut [MaybeUninit<X>]| {
        let dx = DisjointChunks::new(dx, chunk);
        chunk_gradients = map_tasks(dx.count(), |task| {
            // SAFETY: each task runs once.
            let dx = unsafe { dx.get(task) };
            let (dy, x) = (&dy[task * chunk..], &x[task * chunk..]);
            let mut dg = vec![0.0; d];
            vectorize_closure(
                #[inline(always)]
                || {
                    let rows = dx.chunks_mut(d).zip(dy.chunks(d)).zip(x.chunks(d));
                    for ((dx, dy), x) in rows {
                        gradient_row(dx, dy, x, gain, epsilon, &mut dg);
                    }
                },
            );
            dg
        });
    };
    // SAFETY: dy and x have as many numbers as dx, and the gain as many as a row, which was asserted. So `write` writes each
    // number of dx.
    let dx = unsafe { vec_written_by(n * d, write) };
    let mut dg = vec![0.0; d];
    for chunk in chunk_gradients {
        dg.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x);
    }
    (matrix(dx, [n, d]), dg)
}

/// Writes ∂L/∂x of one row and adds the row's part of ∂L/∂g to `dg`.
#[inline(always)]
fn gradient_row<X: StoredFloat<f32>, Y: StoredFloat<f32>>(
    dx: &mut [MaybeUninit<X>],
    dy: &[Y],
    x: &[X],
    gain: &[f32],
    epsilon: f64,
    dg: &mut [f32],
) {
    let r = inverse_rms(x, epsilon);
    let mut sums = [0.0f32; LANES];
    let columns = dy
        .chunks(LANES)
        .zip(x.chunks(LANES))
        .zip(gain.chunks(LANES));
    for ((dy, x), gain) in columns {
        for (((sum, dy), x), gain) in sums.iter_mut().zip(dy).zip(x).zip(gain) {
            *sum += gain * x.widen() * dy.widen();
        }
    }
    let slope = r * r * sums.iter().sum::<f32>() / x.len() as f32;
    let columns = dx.iter_mut().zip(dg).zip(dy).zip(x).zip(gain);
    for ((((dx, dg), dy), x), gain) in columns {
        let (dy, x) = (dy.widen(), x.widen());
        dx.write(X::narrow(r * (gain * dy - x * slope)));
        *dg += dy * x * r;
    }
}

/// Independent partial sums: a sum in order could not be vectorised.
const LANES: usize = 16;

/// Computes 1 / √(mean(x²) + ε) of one row.
#[inline(always)]
fn inverse_rms<E: StoredFloat<f32>>(x: &[E], epsilon: f64) -> f32 {
    let mut sums = [0.0f32; LANES];
    for x in x.chunks(LANES) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += x.widen() * x.widen();
        }
    }
    let mean = sums.iter().sum::<f32>() / x.len() as f32;
    1.0 / (mean + epsilon as f32).sqrt()
}

/// Recomputes the output in the backward pass.
#[derive(Debug)]
struct NormRecomputation<B> {
    x: NodeId,
    gain: NodeId,
    options: NormOptions,
    backend: PhantomData<B>,
}

impl<B: Backend + NormOps> RetroForward for NormRecomputation<B> {
    fn forward(&self, states: &mut BackwardStates, out_node: NodeId) {
        let x = states.get_state::<FloatTensor<B>>(&self.x);
        let gain = states.get_state::<FloatTensor<B>>(&self.gain);
        states.save(out_node, B::rms_norm(x, gain, self.options));
    }
}

#[derive(Debug)]
struct NormBackward;

impl<B: Backend + NormOps> Backward<B, 2> for NormBackward {
    type State = (NodeId, NodeId, NormOptions);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let (x, gain, options) = ops.state;
        let x = checkpointer.retrieve_node_output(x);
        let gain = checkpointer.retrieve_node_output(gain);
        let dy = grads.consume::<B>(&ops.node);
        let (dx, dg) = B::rms_norm_gradient(dy, x, gain, options);
        let [x_node, gain_node] = ops.parents;
        if let Some(node) = x_node {
            grads.register::<B>(node.id, dx);
        }
        if let Some(node) = gain_node {
            grads.register::<B>(node.id, dg);
        }
    }
}

impl<B: Backend + NormOps, C: CheckpointStrategy> NormOps for Autodiff<B, C> {
    fn rms_norm(
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        options: NormOptions,
    ) -> FloatTensor<Self> {
        let recomputation = NormRecomputation::<B> {
            x: x.node().id(),
            gain: gain.node().id(),
            options,
            backend: PhantomData,
        };
        // The output is recomputed whatever checkpointing strategy the rest of the graph has: the layer after
        // the norm needs y for its own gradient, x is kept anyway, and computing y again costs a hundredth of a
        // matrix product.
        let prepared = NormBackward
            .prepare::<BalancedCheckpointing>([x.node(), gain.node()])
            .memory_bound()
            .retro_forward(recomputation)
            .parents([&x, &gain])
            .stateful();
        match prepared {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&x), prep.checkpoint(&gain), options);
                let y = B::rms_norm(x.into_primitive(), gain.into_primitive(), options);
                prep.finish(state, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(
                x.into_primitive(),
                gain.into_primitive(),
                options,
            )),
        }
    }

    fn rms_norm_gradient(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        options: NormOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [dy, x, gain] = [dy, x, gain].map(FloatTensor::<Self>::into_primitive);
        let (dx, dg) = B::rms_norm_gradient(dy, x, gain, options);
        (FloatTensor::<Self>::new(dx), FloatTensor::<Self>::new(dg))
    }
}
