//! What is kept between the passes: q, k, v, the output and a number a row and head.

use super::{Attention, AttentionOps};
use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Backend, tensor::FloatTensor};

#[derive(Debug, Clone)]
struct Kept<B: Backend> {
    inputs: [NodeId; 3],
    output: FloatTensor<B>,
    log_sums: FloatTensor<B>,
    documents: Vec<usize>,
    how: Attention,
}

#[derive(Debug)]
struct AttentionBackward;

impl<B: Backend + AttentionOps> Backward<B, 3> for AttentionBackward {
    type State = Kept<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let kept = ops.state;
        let [q, k, v] = kept.inputs.map(|id| checkpointer.retrieve_node_output(id));
        let gradient = grads.consume::<B>(&ops.node);
        let (dq, dk, dv) = B::attention_gradient(
            gradient,
            q,
            k,
            v,
            kept.output,
            kept.log_sums,
            kept.documents,
            kept.how,
        );
        for (node, gradient) in ops.parents.into_iter().zip([dq, dk, dv]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: Backend + AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn attention_rows(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        documents: Vec<usize>,
        how: Attention,
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
                let (output, log_sums) = B::attention_rows(q, k, v, documents.clone(), how);
                let kept = Kept {
                    inputs,
                    output: output.clone(),
                    log_sums: log_sums.clone(),
                    documents,
                    how,
                };
                (
                    prep.finish(kept, output),
                    FloatTensor::<Self>::new(log_sums),
                )
            }
            OpsKind::UnTracked(prep) => {
                let [q, k, v] = [q, k, v].map(FloatTensor::<Self>::into_primitive);
                let (output, log_sums) = B::attention_rows(q, k, v, documents, how);
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
        how: Attention,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        // A gradient is a constant here: no second derivative is offered.
        let [gradient, q, k, v, output, log_sums] =
            [gradient, q, k, v, output, log_sums].map(FloatTensor::<Self>::into_primitive);
        let (dq, dk, dv) =
            B::attention_gradient(gradient, q, k, v, output, log_sums, documents, how);
        let constant = FloatTensor::<Self>::new;
        (constant(dq), constant(dk), constant(dv))
    }
}
