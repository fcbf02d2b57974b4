//! A gated activation followed by a linear layer, which recomputes the activation in the backward pass.

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;

use super::{GateActivation, GatedOps, gated};
use crate::linear::{LinearOps, has_own_product, linear};

/// Computes (act(gate) · up)·Wᵀ: two tensors `[n, w]` and `[out, w]` → `[n, out]`; differentiable in all three.
///
/// The values are those of [`linear`] after [`gated`]. The intermediate `[n, w]` is not kept for the gradient
/// but computed again: it is a third of what a feed-forward layer keeps, and the cheapest to recompute.
///
/// # Panics
/// Panics on shapes that do not fit, as burn's own operations do.
#[must_use]
pub fn gated_linear(
    gate_nw: Tensor<2>,
    up_nw: Tensor<2>,
    weight_ow: Tensor<2>,
    activation: GateActivation,
) -> Tensor<2> {
    assert_eq!(gate_nw.dims(), up_nw.dims(), "gated: gate and up");
    assert_eq!(
        gate_nw.dims()[1],
        weight_ow.dims()[1],
        "gated: columns of the weight"
    );
    if has_own_product(&gate_nw, &weight_ow) && up_nw.dtype() == gate_nw.dtype() {
        let (gate, up) = (gate_nw.into_dispatch(), up_nw.into_dispatch());
        let weight = weight_ow.into_dispatch();
        Tensor::from_dispatch(<Dispatch as FeedForwardOps>::gated_linear(
            gate, up, weight, activation,
        ))
    } else {
        linear(gated(gate_nw, up_nw, activation), weight_ow)
    }
}

/// The gated activation followed by a linear layer, in f32 or bf16.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait FeedForwardOps: Backend + GatedOps + LinearOps {
    /// Two tensors `[n, w]` and `[out, w]` → `[n, out]`.
    fn gated_linear(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        activation: GateActivation,
    ) -> FloatTensor<Self>;
}

impl FeedForwardOps for Flex {
    fn gated_linear(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        activation: GateActivation,
    ) -> FloatTensor<Self> {
        Self::linear_forward(<Self as GatedOps>::gated(gate, up, activation), weight)
    }
}

#[derive(Debug)]
struct FeedForwardBackward;

impl<B: Backend + FeedForwardOps> Backward<B, 3> for FeedForwardBackward {
    type State = ([NodeId; 3], GateActivation);

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let (nodes, activation) = ops.state;
        let [gate, up, weight]: [FloatTensor<B>; 3] =
            nodes.map(|id| checkpointer.retrieve_node_output(id));
        let dy = grads.consume::<B>(&ops.node);
        let [gate_node, up_node, weight_node] = ops.parents;
        if let Some(node) = weight_node {
            let x = B::gated(gate.clone(), up.clone(), activation);
            grads.register::<B>(node.id, B::linear_weight_gradient(dy.clone(), x));
        }
        if gate_node.is_some() || up_node.is_some() {
            let dx = B::linear_input_gradient(dy, weight);
            let (d_gate, d_up) = B::gated_gradient(dx, gate, up, activation);
            for (node, gradient) in [gate_node, up_node].into_iter().zip([d_gate, d_up]) {
                if let Some(node) = node {
                    grads.register::<B>(node.id, gradient);
                }
            }
        }
    }
}

impl<B: Backend + FeedForwardOps, C: CheckpointStrategy> FeedForwardOps for Autodiff<B, C> {
    fn gated_linear(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        activation: GateActivation,
    ) -> FloatTensor<Self> {
        let prepared = FeedForwardBackward
            .prepare::<C>([gate.node(), up.node(), weight.node()])
            .compute_bound()
            .stateful();
        let primitives = |tensors: [FloatTensor<Self>; 3]| {
            let [gate, up, weight] = tensors.map(FloatTensor::<Self>::into_primitive);
            B::gated_linear(gate, up, weight, activation)
        };
        match prepared {
            OpsKind::Tracked(mut prep) => {
                let nodes = [&gate, &up, &weight].map(|tensor| prep.checkpoint(tensor));
                prep.finish((nodes, activation), primitives([gate, up, weight]))
            }
            OpsKind::UnTracked(prep) => prep.finish(primitives([gate, up, weight])),
        }
    }
}
