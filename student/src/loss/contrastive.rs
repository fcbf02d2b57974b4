//! The contrastive pair: skew KL on the teacher's text, skew reverse KL on the student's own.
//!
//! Direction: on what the teacher wrote, the student's probability is pulled up where the teacher's
//! is high; on what the student wrote, it is pushed down where the teacher's is low. Reduction: none,
//! nats for each row; the caller weights the two kinds of rows. Source: Ko et al. 2025 (DistiLLM-2), §3.1,
//! without its schedules of α and of the weights. Special case: with rows of one kind only, the loss is that
//! kind's divergence. Cost: both divergences are computed for all rows.

use burn::tensor::{Bool, Tensor};

use super::{skew_kl, skew_reverse_kl};

/// Computes nats for each row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1]; `own_n` is true on rows of the
/// student's own text, `alpha` as in [`skew_kl`].
#[must_use]
pub fn contrastive(
    log_p_nk: Tensor<2>,
    log_q_nk: Tensor<2>,
    own_n: Tensor<1, Bool>,
    alpha: f64,
) -> Tensor<1> {
    let taught_n = skew_kl(log_p_nk.clone(), log_q_nk.clone(), alpha);
    taught_n.mask_where(own_n, skew_reverse_kl(log_p_nk, log_q_nk, alpha))
}
