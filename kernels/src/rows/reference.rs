//! The same statistics in tensor operations: what the custom op is tested against, and the form to
//! read first. It holds several tensors of the logits' size.

use super::{Head, RowStats, TAIL_FLOOR_NATS};
use burn::tensor::{IndexingUpdateOp, Int, Tensor};

/// Stands for −∞ where a column must not count; exp() of it is 0 in every float type that it fits.
pub(crate) const ABSENT: f64 = -3.0e38;

/// [`row_stats`](super::row_stats) from tensor operations alone, on any backend.
///
/// Shapes as there. f16 and bf16 logits must be cast to f32 first.
pub fn row_stats_reference(
    logits_nv: Tensor<2>,
    support_nk: Tensor<2, Int>,
    head: &Head,
) -> RowStats {
    let [n, v] = logits_nv.dims();
    let vocab = head.vocab.map_or(v, |vocab| vocab.min(v));
    let s_nv = softmax_logits(logits_nv.narrow(1, 0, vocab), head);

    let present_nk = support_nk.clone().greater_equal_elem(0);
    let ids_nk = support_nk.clamp_min(0);
    let ones_nk = present_nk.clone().float().cast(s_nv.dtype());
    let in_support_nv = Tensor::zeros([n, vocab], (&s_nv.device(), s_nv.dtype()))
        .scatter(1, ids_nk.clone(), ones_nk, IndexingUpdateOp::Add)
        .greater_elem(0.5);

    let log_z_n1 = log_sum_exp(s_nv.clone());
    let log_q_nk =
        (s_nv.clone().gather(1, ids_nk) - log_z_n1.clone()).mask_fill(present_nk.bool_not(), 0.0);
    let tail_n1 = log_sum_exp(s_nv.mask_fill(in_support_nv.clone(), ABSENT));
    let no_tail_n1 = in_support_nv.all_dim(1);
    let log_tail_n1 = (tail_n1 - log_z_n1.clone()).mask_fill(no_tail_n1, TAIL_FLOOR_NATS);
    RowStats {
        log_q_nk: Tensor::cat(vec![log_q_nk, log_tail_n1], 1),
        log_z_n1,
    }
}

pub(crate) fn softmax_logits(logits_nv: Tensor<2>, head: &Head) -> Tensor<2> {
    let y_nv = logits_nv * head.scale;
    let y_nv = match head.softcap {
        Some(c) => (y_nv / c).tanh() * c,
        None => y_nv,
    };
    y_nv / head.temperature
}

fn log_sum_exp(s_nv: Tensor<2>) -> Tensor<2> {
    let max_n1 = s_nv.clone().detach().max_dim(1);
    (s_nv - max_n1.clone()).exp().sum_dim(1).log() + max_n1
}
