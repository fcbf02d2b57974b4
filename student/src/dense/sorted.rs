//! Universal logit distillation: compares the two distributions by rank, ignoring which tokens have the ranks.
//!
//! ```text
//! dense    Σ_i |p_(i) − q_(i)|                                   x_(i) the i-th largest, 0 past the end
//! sparse   Σ_{i ≤ r} |p_(i) − q_(i)| + |Σ_{i > r} p_(i) − Σ_{i > r} q_(i)|
//! ```
//!
//! p is the teacher over its vocabulary, q the student over another; symmetric. Gradient:
//! ∂/∂log q_(i) = −q_(i)·sign(p_(i) − q_(i)), 0 at equality; for the token that has the rank.
//! Reduction: none, in probability for each row, between 0 and 2. Source: Boizard et al. 2024 ("Towards
//! Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs"): the closed form of a
//! Wasserstein distance whose cost is the same for all tokens, the shorter vocabulary padded with zeros.
//!
//! The sparse form knows only the teacher's sum over the ranks beyond r, and compares it with the student's
//! sum. By the triangle inequality the sparse value is at most the dense value, and equal if all ranks beyond r
//! differ in the same direction. The shape of the tail is not learned.
//!
//! Rows must be positions with the same text before them. Align the two tokenisations
//! (`potstill_datasets::align`) and take, on either side, the logits at the last token of each span,
//! which predict the text after the common boundary, and the logits at the prompt's last token. Pairing
//! positions by number and truncating the longer sequence, as simple implementations do (TRL's without
//! `use_extended_uld`), misaligns the rows after the first word that is tokenised differently.
//!
//! The loss does not see which token is likely, so cross-entropy or KL over spans is needed beside it. Time:
//! sorting n·v numbers of both sides (dense) or of the student (sparse); memory: a few times n·v.

use burn::tensor::Tensor;

use potstill_kernels::EMPTY_NATS;

/// Computes the distance by rank, `[n]`, of log-softmaxes [n, v_t] of the teacher and [n, v_s] of the student.
#[must_use]
pub fn universal_logit(teacher_log_p_nv: Tensor<2>, student_log_q_nv: Tensor<2>) -> Tensor<1> {
    let p_nv = teacher_log_p_nv.exp().sort_descending(1);
    let q_nv = student_log_q_nv.exp().sort_descending(1);
    let ([_, p_ranks], [_, q_ranks]) = (p_nv.dims(), q_nv.dims());
    let both = p_ranks.min(q_ranks);
    let common_n1 = (p_nv.clone().narrow(1, 0, both) - q_nv.clone().narrow(1, 0, both))
        .abs()
        .sum_dim(1);
    // The distance of the remaining ranks to zeros is their probability.
    let longer_nv = if p_ranks > both { p_nv } else { q_nv };
    let remaining = p_ranks.max(q_ranks) - both;
    let distance_n1 = match remaining {
        0 => common_n1,
        _ => common_n1 + longer_nv.narrow(1, both, remaining).sum_dim(1),
    };
    distance_n1.squeeze_dim::<1>(1)
}

/// Computes the distance by rank, `[n]`, from the teacher's log p over its support and tail, [n, k+1], and the
/// student's log-softmax, [n, v].
///
/// `ranks` is the number of tokens of the support that are the likeliest of the teacher's whole vocabulary: the k
/// of top-k, without the target and control tokens that were added to the support. The other tokens count as tail.
/// A row with fewer tokens is compared at as many ranks as it has tokens.
#[must_use]
pub fn universal_logit_sparse(
    log_p_nk: Tensor<2>,
    student_log_q_nv: Tensor<2>,
    ranks: usize,
) -> Tensor<1> {
    let ([n, columns], [_, v]) = (log_p_nk.dims(), student_log_q_nv.dims());
    let ranks = ranks.min(columns - 1).min(v);
    let log_p_nr = log_p_nk.narrow(1, 0, columns - 1).topk(ranks, 1);
    let empty_nr = log_p_nr.clone().lower_equal_elem(EMPTY_NATS);
    let p_nr = log_p_nr.exp();
    // An empty slot has no rank, so the student's mass at this rank is part of the student's tail.
    let q_nr = student_log_q_nv
        .exp()
        .topk(ranks, 1)
        .mask_fill(empty_nr, 0.0);
    // Both sides sum to 1, so the tails' difference is the negative difference of the heads.
    let tail_n1 = q_nr.clone().sum_dim(1) - p_nr.clone().sum_dim(1);
    let head_n1 = (p_nr - q_nr).abs().sum_dim(1);
    (head_n1 + tail_n1.abs()).reshape([n])
}
