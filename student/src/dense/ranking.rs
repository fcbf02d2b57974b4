//! Pairwise ranking over the teacher's likeliest tokens: the student should prefer the tokens that the teacher
//! prefers.
//!
//! ```text
//! pairs     (i, j) of the k tokens with p_i > p_j
//! hinge     mean over the pairs of max(0, m − (q_i − q_j)),  m a constant or p_i − p_j
//! logistic  mean over the pairs of ln(1 + exp(−(log q_i − log q_j)))
//! ```
//!
//! Direction: p is the teacher, q the student; log q_i − log q_j is the difference of the logits. The
//! probabilities are over the whole vocabulary, not renormalised. Gradient: hinge, over the pairs with a loss
//! above 0, ∂/∂q_i = −1 and ∂/∂q_j = 1; logistic, ∂/∂log q_i = −σ(log q_j − log q_i). Reduction: the
//! mean over a row's pairs, no mean over rows; hinge in probability, logistic in nats.
//!
//! Source: the hinge loss is from ranking SVMs (Joachims 2002), the logistic loss is RankNet's (Burges et
//! al. 2005, §3) with certain preferences. DistillKit has both for a sparse teacher as `hinge` and
//! `logistic_ranking`, and divides by the pairs of the whole batch instead (which is the same if all rows have
//! the same number of pairs).
//!
//! Special cases: tied tokens and empty slots are in no pair; a row without a pair gives 0. A student equal
//! to the teacher has a hinge loss of 0 with [`Margin::Teacher`] only. The logistic loss has no minimum and
//! keeps pulling pairs apart, so it should have a small weight beside a divergence. Time and
//! memory: n·k².

use burn::tensor::Tensor;
use burn::tensor::activation::{log_sigmoid, log_softmax, relu};
use potstill_kernels::EMPTY_NATS;

use super::wide;

/// Lead that the student's probability of the preferred token must have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Margin {
    /// The same lead for all pairs, a probability.
    Constant(f64),
    /// The lead that the teacher's probability has.
    Teacher,
}

/// Computes the mean hinge loss of each row, `[n]`, in probability, from log p and log q of k tokens, [n, k] (the tail is
/// not a token: leave its column out).
#[must_use]
pub fn hinge_ranking(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>, margin: Margin) -> Tensor<1> {
    let lead_nkk = differences(log_q_nk.exp());
    let slack_nkk = match margin {
        Margin::Constant(margin) => lead_nkk.neg() + margin,
        Margin::Teacher => differences(log_p_nk.clone().exp()) - lead_nkk,
    };
    mean_over_pairs(relu(slack_nkk), log_p_nk)
}

/// Computes the mean logistic loss of each row, `[n]`, in nats, from log p and log q of k tokens, [n, k] (the tail is
/// not a token: leave its column out).
#[must_use]
pub fn logistic_ranking(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
    mean_over_pairs(log_sigmoid(differences(log_q_nk)).neg(), log_p_nk)
}

/// Computes log p and log q, [n, k], of the teacher's k likeliest tokens, from dense logits [n, v] of both
/// models as `Decoder::logits` computes them. Half precision is converted to f32; logits of −∞ give −1e4; a k above v is
/// v. The ids must be the same in both models. If one of them has more columns, these are padding, and both distributions
/// are over the columns that both have.
#[must_use]
pub fn at_teacher_top(
    teacher_logits_nv: Tensor<2>,
    student_logits_nv: Tensor<2>,
    k: usize,
) -> [Tensor<2>; 2] {
    let v = teacher_logits_nv.dims()[1].min(student_logits_nv.dims()[1]);
    let [teacher_logits_nv, student_logits_nv] =
        [teacher_logits_nv, student_logits_nv].map(|logits_nv| logits_nv.narrow(1, 0, v));
    let (_, ids_nk) = teacher_logits_nv.clone().topk_with_indices(k.min(v), 1);
    let [student_logits_nv, teacher_logits_nv] = wide([student_logits_nv, teacher_logits_nv]);
    [teacher_logits_nv, student_logits_nv].map(|logits_nv| {
        log_softmax(logits_nv, 1)
            .gather(1, ids_nk.clone())
            .clamp_min(EMPTY_NATS)
    })
}

/// Computes x_i − x_j at [n, i, j].
fn differences(x_nk: Tensor<2>) -> Tensor<3> {
    x_nk.clone().unsqueeze_dim::<3>(2) - x_nk.unsqueeze_dim::<3>(1)
}

fn mean_over_pairs(loss_nkk: Tensor<3>, log_p_nk: Tensor<2>) -> Tensor<1> {
    let [n, _, _] = loss_nkk.dims();
    // As the second token of a pair, an empty slot gets a log probability above 0, so that no token is preferred
    // to it.
    let empty_nk = log_p_nk.clone().lower_equal_elem(EMPTY_NATS);
    let second_nk = log_p_nk.clone().mask_fill(empty_nk, 1.0);
    let prefers_nkk = (log_p_nk.unsqueeze_dim::<3>(2) - second_nk.unsqueeze_dim::<3>(1))
        .detach()
        .greater_elem(0.0);
    let by_row = |x_nkk: Tensor<3>| x_nkk.sum_dim(2).sum_dim(1).reshape([n]);
    let pairs_n = by_row(prefers_nkk.clone().float().cast(loss_nkk.dtype()));
    by_row(loss_nkk.mask_fill(prefers_nkk.bool_not(), 0.0)) / pairs_n.clamp_min(1.0)
}
