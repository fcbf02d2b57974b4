//! The autodiff form. It keeps q, k, v, the output and one number per row and head for the backward pass.

use super::{AttentionOps, AttentionOptions};
use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Backend, tensor::FloatTensor};

#[derive(Debug, Clone)]
struct AttentionState<B: Backend> {
    inputs: [NodeId; 4],
    output: FloatTensor<B>,
    log_sums: FloatTensor<B>,
    documents: Vec<usize>,
    options: AttentionOptions,
}

#[derive(Debug)]
struct AttentionBackward;

impl<B: Backend + AttentionOps> Backward<B, 4> for AttentionBackward {
    type State = AttentionState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 4>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let state = ops.state;
        let [q, k, v, sinks] = state.inputs.map(|id| checkpointer.retrieve_node_output(id));
        let gradient = grads.consume::<B>(&ops.node);
        let (dq, dk, dv, dsinks) = B::attention_gradient(
            gradient,
            q,
            k,
            v,
            sinks,
            state.output,
            state.log_sums,
            state.documents,
            state.options,
        );
        for (node, gradient) in ops.parents.into_iter().zip([dq, dk, dv, dsinks]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: Backend + AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        documents: Vec<usize>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let nodes = [q.node(), k.node(), v.node(), sinks.node()];
        match AttentionBackward
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let inputs = [&q, &k, &v, &sinks].map(|tensor| prep.checkpoint(tensor));
                let [q, k, v, sinks] = [q, k, v, sinks].map(FloatTensor::<Self>::into_primitive);
                let (output, log_sums) =
                    B::attention_forward(q, k, v, sinks, documents.clone(), options);
                let state = AttentionState {
                    inputs,
                    output: output.clone(),
                    log_sums: log_sums.clone(),
                    documents,
                    options,
                };
                (
                    prep.finish(state, output),
                    FloatTensor::<Self>::new(log_sums),
                )
            }
            OpsKind::UnTracked(prep) => {
                let [q, k, v, sinks] = [q, k, v, sinks].map(FloatTensor::<Self>::into_primitive);
                let (output, log_sums) = B::attention_forward(q, k, v, sinks, documents, options);
                (prep.finish(output), FloatTensor::<Self>::new(log_sums))
            }
        }
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
        // The gradient is a constant to autodiff: there is no second derivative.
        let [gradient, q, k, v, sinks, output, log_sums] =
            [gradient, q, k, v, sinks, output, log_sums].map(FloatTensor::<Self>::into_primitive);
        let (dq, dk, dv, dsinks) = B::attention_gradient(
            gradient, q, k, v, sinks, output, log_sums, documents, options,
        );
        let constant = FloatTensor::<Self>::new;
        (constant(dq), constant(dk), constant(dv), constant(dsinks))
    }
}
