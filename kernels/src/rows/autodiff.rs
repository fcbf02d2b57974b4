//! The autodiff form. It keeps the logits, the support and the statistics for the backward pass.

use super::{LogQSum, LogitTransform, RowOps};
use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind, unary},
};
use burn::backend::{
    Backend,
    tensor::{FloatTensor, IntTensor},
};

#[derive(Debug, Clone)]
struct RowStatsState<B: Backend> {
    logits: FloatTensor<B>,
    support: IntTensor<B>,
    stats: FloatTensor<B>,
    transform: LogitTransform,
}

#[derive(Debug)]
struct RowStatsBackward;

impl<B: Backend + RowOps> Backward<B, 1> for RowStatsBackward {
    type State = RowStatsState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        unary::<B, _>(ops.parents, ops.node, grads, |gradient| {
            let state = ops.state;
            B::row_gradient(
                state.logits,
                state.support,
                state.stats,
                gradient,
                state.transform,
            )
        });
    }
}

impl<B: Backend + RowOps, C: CheckpointStrategy> RowOps for Autodiff<B, C> {
    fn row_stats(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        transform: LogitTransform,
        sum: LogQSum,
    ) -> FloatTensor<Self> {
        let node = logits.node();
        let logits = logits.into_primitive();
        let stats = B::row_stats(logits.clone(), support.clone(), transform, sum);
        match RowStatsBackward
            .prepare::<C>([node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let state = RowStatsState {
                    logits,
                    support,
                    stats: stats.clone(),
                    transform,
                };
                prep.finish(state, stats)
            }
            OpsKind::UnTracked(prep) => prep.finish(stats),
        }
    }

    fn row_gradient(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        stats: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        transform: LogitTransform,
    ) -> FloatTensor<Self> {
        // The gradient is a constant to autodiff: there is no second derivative.
        FloatTensor::<Self>::new(B::row_gradient(
            logits.into_primitive(),
            support,
            stats.into_primitive(),
            gradient.into_primitive(),
            transform,
        ))
    }
}
