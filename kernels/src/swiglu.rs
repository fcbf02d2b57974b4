//! SwiGLU (Shazeer 2020): y = silu(gate) · up element by element, with silu(a) = a σ(a).
//!
//! ```text
//! ∂y/∂gate = up · σ(gate) · (1 + gate · (1 − σ(gate)))          ∂y/∂up = silu(gate)
//! ```

// Outputs are allocated without being zeroed, because every element is written once.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use burn::tensor::activation::silu;
use rayon::prelude::*;

use crate::exp::exp;
use crate::flex::{elements, is_cpu_f32, is_cpu_half, matrix, shape2, to_f32, vec_written_by};
use crate::linear::{LinearOps, linear};
use crate::simd::vectorize_closure;

/// Computes silu(gate) · up: two tensors `[n, w]` → `[n, w]`; differentiable in both.
///
/// # Panics
/// Panics on shapes that do not fit, as burn's own operations do.
#[must_use]
pub fn swiglu(gate_nw: Tensor<2>, up_nw: Tensor<2>) -> Tensor<2> {
    assert_eq!(gate_nw.dims(), up_nw.dims(), "swiglu: gate and up");
    if is_cpu_f32(&gate_nw) && is_cpu_f32(&up_nw) {
        let (gate, up) = (gate_nw.into_dispatch(), up_nw.into_dispatch());
        Tensor::from_dispatch(<Dispatch as SwigluOps>::swiglu(gate, up))
    } else if is_cpu_half(&gate_nw) {
        let dtype = gate_nw.dtype();
        swiglu(to_f32(gate_nw), to_f32(up_nw)).cast(dtype)
    } else {
        swiglu_reference(gate_nw, up_nw)
    }
}

/// Computes [`swiglu`] in tensor operations.
#[must_use]
pub fn swiglu_reference(gate_nw: Tensor<2>, up_nw: Tensor<2>) -> Tensor<2> {
    silu(gate_nw) * up_nw
}

/// Computes (silu(gate) · up)·Wᵀ: two tensors `[n, w]` and `[out, w]` → `[n, out]`; differentiable in all three.
///
/// The values are those of [`linear`] after [`swiglu`]. The intermediate `[n, w]` is not kept for the gradient
/// but computed again: it is a third of what a feed-forward layer keeps, and the cheapest to recompute.
///
/// # Panics
/// Panics on shapes that do not fit, as burn's own operations do.
#[must_use]
pub fn swiglu_linear(gate_nw: Tensor<2>, up_nw: Tensor<2>, weight_ow: Tensor<2>) -> Tensor<2> {
    assert_eq!(gate_nw.dims(), up_nw.dims(), "swiglu: gate and up");
    assert_eq!(
        gate_nw.dims()[1],
        weight_ow.dims()[1],
        "swiglu: columns of the weight"
    );
    if [&gate_nw, &up_nw, &weight_ow].into_iter().all(is_cpu_f32) {
        let (gate, up) = (gate_nw.into_dispatch(), up_nw.into_dispatch());
        let weight = weight_ow.into_dispatch();
        Tensor::from_dispatch(<Dispatch as FeedForwardOps>::swiglu_linear(
            gate, up, weight,
        ))
    } else {
        linear(swiglu(gate_nw, up_nw), weight_ow)
    }
}

/// The SwiGLU product followed by a linear layer, in f32.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait FeedForwardOps: Backend + SwigluOps + LinearOps {
    /// Two tensors `[n, w]` and `[out, w]` → `[n, out]`.
    fn swiglu_linear(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

impl FeedForwardOps for Flex {
    fn swiglu_linear(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        Self::linear_forward(<Self as SwigluOps>::swiglu(gate, up), weight)
    }
}

#[derive(Debug)]
struct FeedForwardBackward;

impl<B: Backend + FeedForwardOps> Backward<B, 3> for FeedForwardBackward {
    type State = [NodeId; 3];

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let [gate, up, weight]: [FloatTensor<B>; 3] =
            ops.state.map(|id| checkpointer.retrieve_node_output(id));
        let dy = grads.consume::<B>(&ops.node);
        let [gate_node, up_node, weight_node] = ops.parents;
        if let Some(node) = weight_node {
            let x = B::swiglu(gate.clone(), up.clone());
            grads.register::<B>(node.id, B::linear_weight_gradient(dy.clone(), x));
        }
        if gate_node.is_some() || up_node.is_some() {
            let dx = B::linear_input_gradient(dy, weight);
            let (d_gate, d_up) = B::swiglu_gradient(dx, gate, up);
            for (node, gradient) in [gate_node, up_node].into_iter().zip([d_gate, d_up]) {
                if let Some(node) = node {
                    grads.register::<B>(node.id, gradient);
                }
            }
        }
    }
}

impl<B: Backend + FeedForwardOps, C: CheckpointStrategy> FeedForwardOps for Autodiff<B, C> {
    fn swiglu_linear(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let prepared = FeedForwardBackward
            .prepare::<C>([gate.node(), up.node(), weight.node()])
            .compute_bound()
            .stateful();
        let primitives = |tensors: [FloatTensor<Self>; 3]| {
            let [gate, up, weight] = tensors.map(FloatTensor::<Self>::into_primitive);
            B::swiglu_linear(gate, up, weight)
        };
        match prepared {
            OpsKind::Tracked(mut prep) => {
                let state = [&gate, &up, &weight].map(|tensor| prep.checkpoint(tensor));
                prep.finish(state, primitives([gate, up, weight]))
            }
            OpsKind::UnTracked(prep) => prep.finish(primitives([gate, up, weight])),
        }
    }
}

/// The SwiGLU product and its gradients, in f32.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait SwigluOps: Backend {
    /// Two tensors `[n, w]` → `[n, w]`.
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Returns ∂L/∂gate and ∂L/∂up from ∂L/∂y, gate and up; all are `[n, w]`.
    fn swiglu_gradient(
        dy: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// Numbers per task.
const CHUNK: usize = 32_768;

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

impl SwigluOps for Flex {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let (gate, up) = (gate.to_contiguous(), up.to_contiguous());
        let shape = shape2(&gate);
        let operands = elements::<f32>(&gate)
            .par_chunks(CHUNK)
            .zip(elements::<f32>(&up).par_chunks(CHUNK));
        let write = |y: &mut [MaybeUninit<f32>]| {
            (y.par_chunks_mut(CHUNK).zip(operands)).for_each(|(y, (gate, up))| {
                vectorize_closure(
                    #[inline(always)]
                    || {
                        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                            y.write(gate * sigmoid(*gate) * up);
                        }
                    },
                );
            });
        };
        // SAFETY: gate and up have as many numbers as y, so `write` covers all of y.
        let y = unsafe { vec_written_by(shape[0] * shape[1], write) };
        matrix(y, shape)
    }

    fn swiglu_gradient(
        dy: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [dy, gate, up] = [dy, gate, up].map(|tensor| tensor.to_contiguous());
        let shape = shape2(&gate);
        let len = shape[0] * shape[1];
        let [dy, gate, up] =
            [&dy, &gate, &up].map(|tensor| elements::<f32>(tensor).par_chunks(CHUNK));
        let write = |d_gate: &mut [MaybeUninit<f32>], d_up: &mut [MaybeUninit<f32>]| {
            let outputs = d_gate.par_chunks_mut(CHUNK).zip(d_up.par_chunks_mut(CHUNK));
            (outputs.zip(dy.zip(gate.zip(up)))).for_each(|((d_gate, d_up), (dy, (gate, up)))| {
                vectorize_closure(
                    #[inline(always)]
                    || {
                        let (outputs, inputs) =
                            (d_gate.iter_mut().zip(d_up.iter_mut()), gate.iter().zip(up));
                        for ((outputs, dy), (gate, up)) in outputs.zip(dy).zip(inputs) {
                            let s = sigmoid(*gate);
                            outputs.0.write(dy * up * s * (1.0 + gate * (1.0 - s)));
                            outputs.1.write(dy * gate * s);
                        }
                    },
                );
            });
        };
        let mut d_up = Vec::new();
        // SAFETY: dy, gate and up have as many numbers as each output, so `write` covers both.
        let d_gate = unsafe {
            vec_written_by(len, |d_gate| {
                d_up = vec_written_by(len, |d_up| write(d_gate, d_up))
            })
        };
        (matrix(d_gate, shape), matrix(d_up, shape))
    }
}

#[derive(Debug)]
struct SwigluBackward;

impl<B: Backend + SwigluOps> Backward<B, 2> for SwigluBackward {
    type State = (NodeId, NodeId);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let gate = checkpointer.retrieve_node_output(ops.state.0);
        let up = checkpointer.retrieve_node_output(ops.state.1);
        let dy = grads.consume::<B>(&ops.node);
        let (d_gate, d_up) = B::swiglu_gradient(dy, gate, up);
        for (node, gradient) in ops.parents.into_iter().zip([d_gate, d_up]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: Backend + SwigluOps, C: CheckpointStrategy> SwigluOps for Autodiff<B, C> {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let prepared = SwigluBackward
            .prepare::<C>([gate.node(), up.node()])
            .compute_bound()
            .stateful();
        match prepared {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&gate), prep.checkpoint(&up));
                prep.finish(state, B::swiglu(gate.into_primitive(), up.into_primitive()))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::swiglu(gate.into_primitive(), up.into_primitive()))
            }
        }
    }

    fn swiglu_gradient(
        dy: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [dy, gate, up] = [dy, gate, up].map(FloatTensor::<Self>::into_primitive);
        let (d_gate, d_up) = B::swiglu_gradient(dy, gate, up);
        (
            FloatTensor::<Self>::new(d_gate),
            FloatTensor::<Self>::new(d_up),
        )
    }
}
