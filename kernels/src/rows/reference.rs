//! The row statistics in tensor operations, which the tests compare the other forms with: the form to read first.
//! This form allocates several tensors of the logits' size.

use super::{EMPTY_NATS, LogQSum, LogitTransform, MASKED, RowStats, TAIL_FLOOR_NATS};
use burn::tensor::{IndexingUpdateOp, Int, Tensor};

/// Logit of a column that is left out. Logits below it count as −∞; its exponential is 0 in every float type that
/// holds it.
pub(crate) const ABSENT: f64 = -3.0e38;

/// Computes [`row_stats`](super::row_stats) in tensor operations, on any backend.
///
/// The shapes are those of `row_stats`. f16 and bf16 logits must be cast to f32 first.
#[must_use]
pub fn row_stats_reference(
    logits_nv: Tensor<2>,
    support_nk: Tensor<2, Int>,
    transform: &LogitTransform,
    sum: LogQSum,
) -> RowStats {
    let [n, v] = logits_nv.dims();
    let [_, k] = support_nk.dims();
    let vocab = transform.vocab.map_or(v, |vocab| vocab.min(v));
    let masked_n1 = support_nk.clone().narrow(1, 0, 1).equal_elem(MASKED);
    let support_nk = support_nk.mask_fill(masked_n1.clone().expand([n, k]), -1);
    // The logits of a masked row are set to 0, so that the operations stay finite; its statistics are replaced below.
    let logits_nv = logits_nv.narrow(1, 0, vocab);
    let s_nv = transform.apply(logits_nv.mask_fill(masked_n1.clone().expand([n, vocab]), 0.0));

    let present_nk = (support_nk.clone().greater_equal_elem(0))
        .bool_and(support_nk.clone().lower_elem(vocab as i64));
    let ids_nk = support_nk.mask_fill(present_nk.clone().bool_not(), 0);
    let ones_nk = present_nk.clone().float().cast(s_nv.dtype());
    let in_support_nv = Tensor::zeros([n, vocab], (&s_nv.device(), s_nv.dtype()))
        .scatter(1, ids_nk.clone(), ones_nk, IndexingUpdateOp::Add)
        .greater_elem(0.5);

    let log_z_n1 = log_sum_exp(s_nv.clone());
    let empty_n1 = log_z_n1.clone().lower_elem(ABSENT);
    let log_z_n1 = log_z_n1.mask_fill(empty_n1.clone(), EMPTY_NATS);
    let log_q_nk = floored(s_nv.clone().gather(1, ids_nk) - log_z_n1.clone());
    let log_q_nk = log_q_nk.mask_fill(present_nk.bool_not(), EMPTY_NATS);
    let tail_n1 = log_sum_exp(s_nv.clone().mask_fill(in_support_nv, f64::NEG_INFINITY));
    let no_tail_n1 = tail_n1.clone().lower_elem(ABSENT);
    let log_tail_n1 = (tail_n1 - log_z_n1.clone()).mask_fill(no_tail_n1, TAIL_FLOOR_NATS);
    let log_tail_n1 = log_tail_n1.mask_fill(masked_n1.clone(), EMPTY_NATS);

    let mut all = vec![
        log_q_nk,
        log_tail_n1,
        log_z_n1.clone().mask_fill(masked_n1.clone(), 0.0),
    ];
    if sum == LogQSum::Included {
        let sum_n1 = s_nv.sum_dim(1) - log_z_n1 * vocab as f64;
        all.push(sum_n1.mask_fill(masked_n1, 0.0));
    }
    RowStats::new(Tensor::cat(all, 1), k)
}

/// Raises log q to at least [`EMPTY_NATS`]; no gradient passes where it was raised.
fn floored(log_q_nk: Tensor<2>) -> Tensor<2> {
    let below_nk = log_q_nk.clone().lower_elem(EMPTY_NATS);
    log_q_nk.mask_fill(below_nk, EMPTY_NATS)
}

/// Computes log Σ exp(s) of each row `[n, 1]`; −∞ for a row whose logits are all −∞.
fn log_sum_exp(s_nv: Tensor<2>) -> Tensor<2> {
    let max_n1 = s_nv.clone().detach().max_dim(1);
    let empty_n1 = max_n1.clone().lower_elem(ABSENT);
    let max_n1 = max_n1.mask_fill(empty_n1.clone(), 0.0);
    let exp_nv = (s_nv - max_n1.clone()).exp();
    // The sum of an empty row is set to 1, because the gradient of the logarithm at 0 is NaN.
    let sum_n1 = exp_nv.sum_dim(1).mask_fill(empty_n1.clone(), 1.0);
    (sum_n1.log() + max_n1).mask_fill(empty_n1, f64::NEG_INFINITY)
}
