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
    inputs: [NodeId; 3],
    output: FloatTensor<B>,
    log_sums: FloatTensor<B>,
    documents: Vec<usize>,
    options: AttentionOptions,
}

#[derive(Debug)]
struct AttentionBackward;

impl<B: Backend + AttentionOps> Backward<B, 3> for AttentionBackward {
    type State = AttentionState<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let state = ops.state;
        let [q, k, v] = state.inputs.map(|id| checkpointer.retrieve_node_output(id));
        let gradient = grads.consume::<B>(&ops.node);
        let (dq, dk, dv) = B::attention_gradient(
            gradient,
            q,
            k,
            v,
            state.output,
            state.log_sums,
            state.documents,
            state.options,
        );
        for (node, gradient) in ops.parents.into_iter().zip([dq, dk, dv]) {
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
        documents: Vec<usize>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let nodes = [q.node(), k.node(), v.node()];
        match AttentionBackward
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let inputs = [&q, &k, &v].map(|tensor| prep.checkpoint(tensor));
                let [q, k, v] = [q, k, v].map(FloatTensor::<Self>::into_primitive);
                let (output, log_sums) = B::attention_forward(q, k, v, documents.clone(), options);
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
                let [q, k, v] = [q, k, v].map(FloatTensor::<Self>::into_primitive);
                let (output, log_sums) = B::attention_forward(q, k, v, documents, options);
                (prep.finish(output), FloatTensor::<Self>::new(log_sums))
            }
        }
    }

    fn attention_gradient(
        gradient: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        output: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        documents: Vec<usize>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        // The gradient is a constant to autodiff: there is no second derivative.
        let [gradient, q, k, v, output, log_sums] =
            [gradient, q, k, v, output, log_sums].map(FloatTensor::<Self>::into_primitive);
        let (dq, dk, dv) =
            B::attention_gradient(gradient, q, k, v, output, log_sums, documents, options);
        let constant = FloatTensor::<Self>::new;
        (constant(dq), constant(dk), constant(dv))
    }
}
