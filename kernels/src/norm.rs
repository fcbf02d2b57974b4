//! RMS norm of each row (Zhang and Sennrich 2019): y = g · x / √(mean(x²) + ε).
//!
//! With r = 1 / √(mean(x²) + ε) and d columns:
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
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor};
use rayon::prelude::*;

use crate::flex::{
    elements, is_cpu_f32, is_cpu_half, matrix, rows_per_task, shape2, to_f32, vec_written_by,
    vector,
};
use crate::simd::vectorize_closure;

/// Computes g · x / √(mean(x²) + ε): `[n, d]`, `[d]` → `[n, d]`; differentiable in both. The statistics of f16
/// and bf16 rows are computed in f32.
///
/// # Panics
/// Panics on shapes that do not fit, as burn's own operations do.
#[must_use]
pub fn rms_norm(x_nd: Tensor<2>, gain_d: Tensor<1>, epsilon: f64) -> Tensor<2> {
    assert_eq!(
        x_nd.dims()[1],
        gain_d.dims()[0],
        "rms_norm: columns and gains"
    );
    if is_cpu_f32(&x_nd) && is_cpu_f32(&gain_d) {
        let (x, gain) = (x_nd.into_dispatch(), gain_d.into_dispatch());
        Tensor::from_dispatch(<Dispatch as NormOps>::rms_norm(x, gain, epsilon))
    } else if is_cpu_half(&x_nd) {
        let dtype = x_nd.dtype();
        rms_norm(to_f32(x_nd), to_f32(gain_d), epsilon).cast(dtype)
    } else {
        rms_norm_reference(x_nd, gain_d, epsilon)
    }
}

/// Computes [`rms_norm`] in tensor operations.
#[must_use]
pub fn rms_norm_reference(x_nd: Tensor<2>, gain_d: Tensor<1>, epsilon: f64) -> Tensor<2> {
    let dtype = x_nd.dtype();
    let half = matches!(dtype, DType::F16 | DType::BF16);
    let wide_nd = if half { x_nd.cast(DType::F32) } else { x_nd };
    let mean_square_n1 = wide_nd.clone().square().mean_dim(1);
    let normed_nd = wide_nd / (mean_square_n1 + epsilon).sqrt();
    let normed_nd = if half {
        normed_nd.cast(dtype)
    } else {
        normed_nd
    };
    normed_nd * gain_d.unsqueeze()
}

/// The norm and its gradients in f32.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait NormOps: Backend {
    /// `[n, d]`, `[d]` → `[n, d]`.
    fn rms_norm(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self>;

    /// Returns ∂L/∂x `[n, d]` and ∂L/∂g `[d]` from ∂L/∂y `[n, d]`, x `[n, d]` and the gain `[d]`.
    fn rms_norm_gradient(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

impl NormOps for Flex {
    fn rms_norm(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self> {
        let (x, gain) = (x.to_contiguous(), gain.to_contiguous());
        let [n, d] = shape2(&x);
        let (values, gain) = (elements::<f32>(&x), elements::<f32>(&gain));
        let chunk = rows_per_task(d) * d.max(1);
        let write = |y: &mut [MaybeUninit<f32>]| {
            (y.par_chunks_mut(chunk).zip(values.par_chunks(chunk))).for_each(|(y, x)| {
                vectorize_closure(
                    #[inline(always)]
                    || {
                        for (y, x) in y.chunks_mut(d).zip(x.chunks(d)) {
                            let r = inverse_rms(x, epsilon);
                            for ((y, x), g) in y.iter_mut().zip(x).zip(gain) {
                                y.write(x * r * g);
                            }
                        }
                    },
                );
            });
        };
        // SAFETY: x has as many numbers as y, so `write` covers all of y.
        let y = unsafe { vec_written_by(n * d, write) };
        matrix(y, [n, d])
    }

    fn rms_norm_gradient(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [dy, x, gain] = [dy, x, gain].map(|tensor| tensor.to_contiguous());
        let [n, d] = shape2(&x);
        let (dy, x, gain) = (
            elements::<f32>(&dy),
            elements::<f32>(&x),
            elements::<f32>(&gain),
        );
        let chunk = rows_per_task(d) * d.max(1);
        // The size of a chunk is fixed, so the sums do not depend on the number of threads.
        let mut chunk_gradients: Vec<Vec<f32>> = Vec::new();
        let write = |dx: &mut [MaybeUninit<f32>]| {
            (dx.par_chunks_mut(chunk))
                .zip(dy.par_chunks(chunk).zip(x.par_chunks(chunk)))
                .map(|(dx, (dy, x))| {
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
                })
                .collect_into_vec(&mut chunk_gradients);
        };
        // SAFETY: dy and x have as many numbers as dx, so `write` covers all of dx.
        let dx = unsafe { vec_written_by(n * d, write) };
        let mut dg = vec![0.0; d];
        for chunk in chunk_gradients {
            dg.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x);
        }
        (matrix(dx, [n, d]), vector(dg))
    }
}

/// Writes ∂L/∂x of one row and adds the row's part of ∂L/∂g to `dg`.
#[inline(always)]
fn gradient_row(
    dx: &mut [MaybeUninit<f32>],
    dy: &[f32],
    x: &[f32],
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
            *sum += gain * x * dy;
        }
    }
    let slope = r * r * sums.iter().sum::<f32>() / x.len() as f32;
    let columns = dx.iter_mut().zip(dg).zip(dy).zip(x).zip(gain);
    for ((((dx, dg), dy), x), gain) in columns {
        dx.write(r * (gain * dy - x * slope));
        *dg += dy * x * r;
    }
}

/// Independent partial sums: a sum in order could not be vectorised.
const LANES: usize = 16;

/// Computes 1 / √(mean(x²) + ε) of one row.
#[inline(always)]
fn inverse_rms(x: &[f32], epsilon: f64) -> f32 {
    let mut sums = [0.0f32; LANES];
    for x in x.chunks(LANES) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += x * x;
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
    epsilon: f64,
    backend: PhantomData<B>,
}

impl<B: Backend + NormOps> RetroForward for NormRecomputation<B> {
    fn forward(&self, states: &mut BackwardStates, out_node: NodeId) {
        let x = states.get_state::<FloatTensor<B>>(&self.x);
        let gain = states.get_state::<FloatTensor<B>>(&self.gain);
        states.save(out_node, B::rms_norm(x, gain, self.epsilon));
    }
}

#[derive(Debug)]
struct NormBackward;

impl<B: Backend + NormOps> Backward<B, 2> for NormBackward {
    type State = (NodeId, NodeId, f64);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let (x, gain, epsilon) = ops.state;
        let x = checkpointer.retrieve_node_output(x);
        let gain = checkpointer.retrieve_node_output(gain);
        let dy = grads.consume::<B>(&ops.node);
        let (dx, dg) = B::rms_norm_gradient(dy, x, gain, epsilon);
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
    fn rms_norm(x: FloatTensor<Self>, gain: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self> {
        let recomputation = NormRecomputation::<B> {
            x: x.node().id(),
            gain: gain.node().id(),
            epsilon,
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
                let state = (prep.checkpoint(&x), prep.checkpoint(&gain), epsilon);
                let y = B::rms_norm(x.into_primitive(), gain.into_primitive(), epsilon);
                prep.finish(state, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(
                x.into_primitive(),
                gain.into_primitive(),
                epsilon,
            )),
        }
    }

    fn rms_norm_gradient(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        gain: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [dy, x, gain] = [dy, x, gain].map(FloatTensor::<Self>::into_primitive);
        let (dx, dg) = B::rms_norm_gradient(dy, x, gain, epsilon);
        (FloatTensor::<Self>::new(dx), FloatTensor::<Self>::new(dg))
    }
}
