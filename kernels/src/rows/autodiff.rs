//! The gradient: the logits, the support and the statistics are kept, nothing else of size v.

use super::{Head, RowOps, Sum};
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
struct Saved<B: Backend> {
    logits: FloatTensor<B>,
    support: IntTensor<B>,
    stats: FloatTensor<B>,
    head: Head,
}

#[derive(Debug)]
struct RowStatsBackward;

impl<B: Backend + RowOps> Backward<B, 1> for RowStatsBackward {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        unary::<B, _>(ops.parents, ops.node, grads, |gradient| {
            let saved = ops.state;
            B::row_gradient(
                saved.logits,
                saved.support,
                saved.stats,
                gradient,
                saved.head,
            )
        });
    }
}

impl<B: Backend + RowOps, C: CheckpointStrategy> RowOps for Autodiff<B, C> {
    fn row_stats(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        head: Head,
        sum: Sum,
    ) -> FloatTensor<Self> {
        let node = logits.node();
        let logits = logits.into_primitive();
        let stats = B::row_stats(logits.clone(), support.clone(), head, sum);
        match RowStatsBackward
            .prepare::<C>([node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let saved = Saved {
                    logits,
                    support,
                    stats: stats.clone(),
                    head,
                };
                prep.finish(saved, stats)
            }
            OpsKind::UnTracked(prep) => prep.finish(stats),
        }
    }

    fn row_gradient(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        stats: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        head: Head,
    ) -> FloatTensor<Self> {
        // A gradient is a constant here: no second derivative is offered.
        FloatTensor::<Self>::new(B::row_gradient(
            logits.into_primitive(),
            support,
            stats.into_primitive(),
            gradient.into_primitive(),
            head,
        ))
    }
}
