//! The autodiff form. It keeps an operand only if the other one is tracked.

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind, binary},
};
use burn::backend::{Backend, tensor::FloatTensor};

use super::LinearOps;

#[derive(Debug)]
struct LinearBackward;

impl<B: Backend + LinearOps> Backward<B, 2> for LinearBackward {
    /// The nodes of x, kept if the weight is tracked, and of the weight, kept if x is tracked.
    type State = (Option<NodeId>, Option<NodeId>);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let (x, weight) = ops.state;
        let x = x.map(|id| checkpointer.retrieve_node_output(id));
        let weight = weight.map(|id| checkpointer.retrieve_node_output(id));
        binary::<B, _, _>(
            ops.parents,
            ops.node,
            grads,
            |dy| match weight {
                Some(weight) => B::linear_input_gradient(dy, weight),
                None => unreachable!("the weight is kept if x is tracked"),
            },
            |dy| match x {
                Some(x) => B::linear_weight_gradient(dy, x),
                None => unreachable!("x is kept if the weight is tracked"),
            },
        );
    }
}

/// Adds a computed product y = x·Wᵀ to the autodiff graph.
fn track<B: Backend + LinearOps, C: CheckpointStrategy>(
    x: &FloatTensor<Autodiff<B, C>>,
    weight: &FloatTensor<Autodiff<B, C>>,
    y: FloatTensor<B>,
) -> FloatTensor<Autodiff<B, C>> {
    let prepared = LinearBackward
        .prepare::<C>([x.node(), weight.node()])
        .compute_bound()
        .stateful();
    match prepared {
        OpsKind::Tracked(mut prep) => {
            let kept_x = weight.is_tracked().then(|| prep.checkpoint(x));
            let kept_weight = x.is_tracked().then(|| prep.checkpoint(weight));
            prep.finish((kept_x, kept_weight), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

impl<B: Backend + LinearOps, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn linear_forward(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let [values, weights] = [&x, &weight].map(|tensor| tensor.clone().into_primitive());
        track::<B, C>(&x, &weight, B::linear_forward(values, weights))
    }

    fn linear_into(
        buffer: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [buffer, x, weight] = [buffer, x, weight].map(FloatTensor::<Self>::into_primitive);
        FloatTensor::<Self>::new(B::linear_into(buffer, x, weight))
    }

    fn linear_pair(
        x: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [values, a, b] = [&x, &first, &second].map(|tensor| tensor.clone().into_primitive());
        let (y, other) = B::linear_pair(values, a, b);
        (
            track::<B, C>(&x, &first, y),
            track::<B, C>(&x, &second, other),
        )
    }

    fn linear_input_gradient(
        dy: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        // The gradient is a constant to autodiff: there is no second derivative.
        FloatTensor::<Self>::new(B::linear_input_gradient(
            dy.into_primitive(),
            weight.into_primitive(),
        ))
    }

    fn linear_weight_gradient(dy: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self> {
        FloatTensor::<Self>::new(B::linear_weight_gradient(
            dy.into_primitive(),
            x.into_primitive(),
        ))
    }

    fn linear_weight_gradient_f32(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        FloatTensor::<Self>::new(B::linear_weight_gradient_f32(
            dy.into_primitive(),
            x.into_primitive(),
        ))
    }

    fn add_linear_weight_gradient(
        sum: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [sum, dy, x] = [sum, dy, x].map(FloatTensor::<Self>::into_primitive);
        FloatTensor::<Self>::new(B::add_linear_weight_gradient(sum, dy, x))
    }
}
