//! Gated activations (Shazeer 2020): y = act(gate) · up element by element.
//!
//! With σ the logistic function, and g and u the gate and up:
//!
//! ```text
//! silu            y = g σ(g) u
//! gelu_tanh       y = g σ(2z) u            z = √(2/π) (g + 0.044715 g³);  g σ(2z) = ½ g (1 + tanh z)
//! clamped_swish   y = g' σ(α g') (u' + 1)  g' = min(g, limit),  u' = min(max(u, −limit), limit)
//! ```
//!
//! With s the argument of σ, ∂(g σ(s))/∂g = σ(s) + g σ(s) (1 − σ(s)) ∂s/∂g. A clamped number has the derivative 0
//! outside its range, and 1 within the range and at its ends.

// Outputs are allocated without being zeroed, because every element is written once.
#![allow(unsafe_code)]

mod feed_forward;

use std::f64::consts::{FRAC_2_SQRT_PI, SQRT_2};
use std::mem::MaybeUninit;

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use burn::tensor::activation::{sigmoid, silu};

use crate::exp::exp;
use crate::flex::{elements, is_cpu_float, matrix, shape2, vec_written_by};
use crate::float::{StoredFloat, with_stored_type};
use crate::simd::vectorize_closure;
use crate::team::{DisjointChunks, for_each_chunk, run_tasks};

pub use feed_forward::gated_linear;

/// The function of [`gated`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GateActivation {
    /// g σ(g) · u, as in Llama (SwiGLU).
    Silu,
    /// The tanh form of GELU(g) · u, as in Gemma.
    GeluTanh,
    /// g σ(alpha · g) · (u + 1) with g at most `limit` and u between −`limit` and `limit`, as in gpt-oss.
    ClampedSwish {
        /// Factor in σ(alpha · g).
        alpha: f64,
        /// Largest gate and largest |up|.
        limit: f64,
    },
}

/// Computes act(gate) · up: two tensors `[n, w]` → `[n, w]`; differentiable in both.
///
/// # Panics
/// Panics on shapes that do not fit and on types that differ, as burn's own operations do.
#[must_use]
pub fn gated(gate_nw: Tensor<2>, up_nw: Tensor<2>, activation: GateActivation) -> Tensor<2> {
    assert_eq!(gate_nw.dims(), up_nw.dims(), "gated: gate and up");
    if is_cpu_float(&gate_nw) && up_nw.dtype() == gate_nw.dtype() {
        let (gate, up) = (gate_nw.into_dispatch(), up_nw.into_dispatch());
        Tensor::from_dispatch(<Dispatch as GatedOps>::gated(gate, up, activation))
    } else {
        gated_reference(gate_nw, up_nw, activation)
    }
}

/// Computes [`gated`] in tensor operations.
#[must_use]
pub fn gated_reference(
    gate_nw: Tensor<2>,
    up_nw: Tensor<2>,
    activation: GateActivation,
) -> Tensor<2> {
    match activation {
        GateActivation::Silu => silu(gate_nw) * up_nw,
        GateActivation::GeluTanh => {
            let cube_nw = gate_nw.clone() * gate_nw.clone() * gate_nw.clone();
            let argument_nw =
                (gate_nw.clone() + cube_nw * 0.044715) * (SQRT_2 * FRAC_2_SQRT_PI / 2.0);
            gate_nw * (argument_nw.tanh() + 1.0) * 0.5 * up_nw
        }
        GateActivation::ClampedSwish { alpha, limit } => {
            let gate_nw = gate_nw.clamp_max(limit);
            let up_nw = up_nw.clamp(-limit, limit) + 1.0;
            sigmoid(gate_nw.clone() * alpha) * gate_nw * up_nw
        }
    }
}

/// The gated activation and its gradients, in f32, f16 or bf16; computed in f32.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait GatedOps: Backend {
    /// Two tensors `[n, w]` → `[n, w]`.
    fn gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: GateActivation,
    ) -> FloatTensor<Self>;

    /// Returns ∂L/∂gate and ∂L/∂up from ∂L/∂y, gate and up; all are `[n, w]`.
    fn gated_gradient(
        dy: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: GateActivation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// Numbers per task.
const CHUNK: usize = 32_768;

/// y, ∂y/∂gate and ∂y/∂up for one pair of numbers. Where only some of the three are used, the compiler leaves out the
/// computation of the others.
type GatedNumbers = [f32; 3];

#[inline(always)]
fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[inline(always)]
fn silu_numbers(gate: f32, up: f32) -> GatedNumbers {
    let s = logistic(gate);
    [gate * s * up, up * s * (1.0 + gate * (1.0 - s)), gate * s]
}

#[inline(always)]
fn gelu_tanh_numbers(gate: f32, up: f32) -> GatedNumbers {
    /// 2 √(2/π).
    const FACTOR: f32 = (SQRT_2 * FRAC_2_SQRT_PI) as f32;
    const CUBIC: f32 = 0.044_715;
    let square = CUBIC * gate * gate;
    let s = logistic(FACTOR * gate * (1.0 + square));
    let argument_slope = FACTOR * (1.0 + 3.0 * square);
    let slope = s * (1.0 + gate * (1.0 - s) * argument_slope);
    [gate * s * up, up * slope, gate * s]
}

#[inline(always)]
fn clamped_swish_numbers(gate: f32, up: f32, alpha: f32, limit: f32) -> GatedNumbers {
    // These are comparisons rather than `min` and `clamp`, so that NaN passes through.
    let is_large_gate = gate > limit;
    let gate = if is_large_gate { limit } else { gate };
    let is_large_up = up.abs() > limit;
    let factor = 1.0 + if is_large_up { limit.copysign(up) } else { up };
    let s = logistic(alpha * gate);
    let gate_slope = factor * s * (1.0 + gate * (1.0 - s) * alpha);
    [
        gate * s * factor,
        if is_large_gate { 0.0 } else { gate_slope },
        if is_large_up { 0.0 } else { gate * s },
    ]
}

impl GatedOps for Flex {
    fn gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: GateActivation,
    ) -> FloatTensor<Self> {
        let (gate, up) = (gate.to_contiguous(), up.to_contiguous());
        with_stored_type!(gate.dtype(), E => match activation {
            GateActivation::Silu => outputs::<E>(&gate, &up, silu_numbers),
            GateActivation::GeluTanh => outputs::<E>(&gate, &up, gelu_tanh_numbers),
            GateActivation::ClampedSwish { alpha, limit } => {
                let (alpha, limit) = (alpha as f32, limit as f32);
                outputs::<E>(&gate, &up, #[inline(always)] |gate, up| {
                    clamped_swish_numbers(gate, up, alpha, limit)
                })
            }
        })
    }

    fn gated_gradient(
        dy: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: GateActivation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let inputs = [dy, gate, up].map(|tensor| tensor.to_contiguous());
        with_stored_type!(inputs[1].dtype(), E => match activation {
            GateActivation::Silu => gradients::<E>(&inputs, silu_numbers),
            GateActivation::GeluTanh => gradients::<E>(&inputs, gelu_tanh_numbers),
            GateActivation::ClampedSwish { alpha, limit } => {
                let (alpha, limit) = (alpha as f32, limit as f32);
                gradients::<E>(&inputs, #[inline(always)] |gate, up| {
                    clamped_swish_numbers(gate, up, alpha, limit)
                })
            }
        })
    }
}

fn outputs<E: StoredFloat<f32>>(
    gate: &FlexTensor,
    up: &FlexTensor,
    numbers: impl Fn(f32, f32) -> GatedNumbers + Sync,
) -> FlexTensor {
    let shape = shape2(gate);
    let [gate, up] = [gate, up].map(elements::<E>);
    assert_eq!(gate.len(), up.len(), "gated: gate and up");
    let write = |y: &mut [MaybeUninit<E>]| {
        for_each_chunk(y, CHUNK, |task, y| {
            let [gate, up] = [gate, up].map(|numbers| &numbers[task * CHUNK..]);
            vectorize_closure(
                #[inline(always)]
                || {
                    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                        let [value, ..] = numbers(gate.widen(), up.widen());
                        y.write(E::narrow(value));
                    }
                },
            );
        });
    };
    // SAFETY: a contiguous gate has as many numbers as y, and up has as many as the gate, which was asserted. So the
    // chunks pair up and `write` writes each number of y.
    let y = unsafe { vec_written_by(shape[0] * shape[1], write) };
    matrix(y, shape)
}

fn gradients<E: StoredFloat<f32>>(
    inputs: &[FlexTensor; 3],
    numbers: impl Fn(f32, f32) -> GatedNumbers + Sync,
) -> (FlexTensor, FlexTensor) {
    let shape = shape2(&inputs[1]);
    let len = shape[0] * shape[1];
    let inputs = inputs.each_ref().map(|tensor| elements::<E>(tensor));
    assert!(
        inputs.iter().all(|numbers| numbers.len() == len),
        "gated: the gradient, gate and up"
    );
    let write = |d_gate: &mut [MaybeUninit<E>], d_up: &mut [MaybeUninit<E>]| {
        let outputs = [d_gate, d_up].map(|output| DisjointChunks::new(output, CHUNK));
        let threads = rayon::current_num_threads();
        run_tasks(len.div_ceil(CHUNK), threads, |task| {
            // SAFETY: each task runs once.
            let [d_gate, d_up] = outputs.each_ref().map(|output| unsafe { output.get(task) });
            let [dy, gate, up] = inputs.map(|numbers| &numbers[task * CHUNK..]);
            vectorize_closure(
                #[inline(always)]
                || {
                    let (outputs, inputs) =
                        (d_gate.iter_mut().zip(d_up.iter_mut()), gate.iter().zip(up));
                    for ((outputs, dy), (gate, up)) in outputs.zip(dy).zip(inputs) {
                        let [_, gate_slope, up_slope] = numbers(gate.widen(), up.widen());
                        outputs.0.write(E::narrow(dy.widen() * gate_slope));
                        outputs.1.write(E::narrow(dy.widen() * up_slope));
                    }
                },
            );
        });
    };
    let mut d_up = Vec::new();
    // SAFETY: dy, gate and up have as many numbers as each output, which was asserted. So the chunks pair up and `write`
    // writes each number of both outputs.
    let d_gate = unsafe {
        vec_written_by(len, |d_gate| {
            d_up = vec_written_by(len, |d_up| write(d_gate, d_up))
        })
    };
    (matrix(d_gate, shape), matrix(d_up, shape))
}

#[derive(Debug)]
struct GatedBackward;

impl<B: Backend + GatedOps> Backward<B, 2> for GatedBackward {
    type State = (NodeId, NodeId, GateActivation);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let (gate, up, activation) = ops.state;
        let gate = checkpointer.retrieve_node_output(gate);
        let up = checkpointer.retrieve_node_output(up);
        let dy = grads.consume::<B>(&ops.node);
        let (d_gate, d_up) = B::gated_gradient(dy, gate, up, activation);
        for (node, gradient) in ops.parents.into_iter().zip([d_gate, d_up]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: Backend + GatedOps, C: CheckpointStrategy> GatedOps for Autodiff<B, C> {
    fn gated(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: GateActivation,
    ) -> FloatTensor<Self> {
        let prepared = GatedBackward
            .prepare::<C>([gate.node(), up.node()])
            .compute_bound()
            .stateful();
        match prepared {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&gate), prep.checkpoint(&up), activation);
                let [gate, up] = [gate, up].map(FloatTensor::<Self>::into_primitive);
                prep.finish(state, B::gated(gate, up, activation))
            }
            OpsKind::UnTracked(prep) => {
                let [gate, up] = [gate, up].map(FloatTensor::<Self>::into_primitive);
                prep.finish(B::gated(gate, up, activation))
            }
        }
    }

    fn gated_gradient(
        dy: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: GateActivation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [dy, gate, up] = [dy, gate, up].map(FloatTensor::<Self>::into_primitive);
        let (d_gate, d_up) = B::gated_gradient(dy, gate, up, activation);
        (
            FloatTensor::<Self>::new(d_gate),
            FloatTensor::<Self>::new(d_up),
        )
    }
}
