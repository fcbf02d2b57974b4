//! Universal logit distillation: the two distributions compared by rank, whatever the tokens.
//!
//! ```text
//! dense    Σ_i |p_(i) − q_(i)|                                   x_(i) the i-th largest, 0 past the end
//! sparse   Σ_{i ≤ r} |p_(i) − q_(i)| + |Σ_{i > r} p_(i) − Σ_{i > r} q_(i)|
//! ```
//!
//! p is the teacher over its vocabulary, q the student over another; symmetric. Gradient:
//! ∂/∂log q_(i) = −q_(i)·sign(p_(i) − q_(i)), 0 at equality; it goes to the token that held the rank.
//! Reduction: none, in probability by row, between 0 and 2. Source: Boizard et al. 2024 ("Towards
//! Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs"): the closed form of a
//! Wasserstein distance whose cost is the same for all tokens, the shorter vocabulary padded with zeros.
//!
//! What the sparse form compares: of the ranks beyond r the teacher's sum alone is known, so the
//! student's sum is held against it. By the triangle inequality that is at most the dense value, equal
//! where all ranks beyond r differ in the same direction, and the shape of the tail is not learnt.
//!
//! Rows have to be positions with the same text before them. Align the two tokenisations
//! (`potstill_datasets::align`) and take, on either side, the logits at the last token of each span,
//! which predict what follows the common boundary, and those at the prompt's last token. Pairing
//! positions by number and cutting the longer sequence, as plain forms do (TRL's without
//! `use_extended_uld`), lets rows drift apart after the first word that is cut differently.
//!
//! It is blind to which token is likely, so it needs cross-entropy or KL over spans beside it. Time:
//! sorting n·v numbers of each side (dense), of the student's (sparse); memory some n·v.

use burn::tensor::Tensor;

use potstill_kernels::EMPTY_NATS;

/// Distance by rank, `[n]`, of log-softmaxes [n, v_t] of the teacher and [n, v_s] of the student.
#[must_use]
pub fn universal_logit(teacher_log_p_nv: Tensor<2>, student_log_q_nv: Tensor<2>) -> Tensor<1> {
    let p_nv = teacher_log_p_nv.exp().sort_descending(1);
    let q_nv = student_log_q_nv.exp().sort_descending(1);
    let ([_, p_ranks], [_, q_ranks]) = (p_nv.dims(), q_nv.dims());
    let both = p_ranks.min(q_ranks);
    let common_n1 = (p_nv.clone().narrow(1, 0, both) - q_nv.clone().narrow(1, 0, both))
        .abs()
        .sum_dim(1);
    // Against zeros, probabilities are their own distance.
    let longer_nv = if p_ranks > both { p_nv } else { q_nv };
    let left = p_ranks.max(q_ranks) - both;
    let distance_n1 = match left {
        0 => common_n1,
        _ => common_n1 + longer_nv.narrow(1, both, left).sum_dim(1),
    };
    distance_n1.squeeze_dim::<1>(1)
}

/// Distance by rank, `[n]`, from the teacher's log p over its support and tail, [n, k+1], and the
/// student's log-softmax, [n, v].
///
/// `ranks` is how many of the support's likeliest tokens are the likeliest of the teacher's whole
/// vocabulary: the k of its top-k, without the realised and control tokens that were added to it. The
/// others go to the tail. A row with fewer tokens than that is compared at as many ranks as it has.
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
    // An empty slot holds no rank: what the student has there is part of its tail.
    let q_nr = student_log_q_nv
        .exp()
        .topk(ranks, 1)
        .mask_fill(empty_nr, 0.0);
    // Both tails are what is left of 1; so is their difference.
    let tail_n1 = q_nr.clone().sum_dim(1) - p_nr.clone().sum_dim(1);
    let head_n1 = (p_nr - q_nr).abs().sum_dim(1);
    (head_n1 + tail_n1.abs()).reshape([n])
}
