//! The autodiff form: the gradient of the input. It keeps the weight, which is a constant, and no tensor.

use burn::backend::Backend;
use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind, unary},
};
use burn::backend::tensor::FloatTensor;

use super::{BlockMatrix, BlockOps};

#[derive(Debug)]
struct BlocksBackward;

impl<B: Backend + BlockOps> Backward<B, 1> for BlocksBackward {
    type State = BlockMatrix;

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let weight = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |dy| {
            B::blocks_input_gradient(dy, weight)
        });
    }
}

impl<B: Backend + BlockOps, C: CheckpointStrategy> BlockOps for Autodiff<B, C> {
    fn blocks_forward(x: FloatTensor<Self>, weight: BlockMatrix) -> FloatTensor<Self> {
        let node = x.node();
        let y = B::blocks_forward(x.into_primitive(), weight.clone());
        match BlocksBackward
            .prepare::<C>([node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish(weight, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn blocks_input_gradient(dy: FloatTensor<Self>, weight: BlockMatrix) -> FloatTensor<Self> {
        FloatTensor::<Self>::new(B::blocks_input_gradient(dy.into_primitive(), weight))
    }
}
