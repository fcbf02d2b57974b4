//! Forward KL: D(p ‖ q) = Σ_b p_b (log p_b − log q_b), b over the support and the tail bucket.
//!
//! Direction: p is the teacher, q the student; it asks the student to cover what the teacher may
//! say. Gradient: ∂D/∂log q_b = −p_b, hence ∂D/∂s_i = q_i − p_i on the support. Reduction: none,
//! nats by row. Source: Hinton, Vinyals and Dean 2015, §2 (there as cross-entropy with soft
//! targets); on the coarse vocabulary it is at most the full KL, by the log-sum inequality.
//! Special cases: p_b = 0 adds 0, whatever log q_b; no τ² factor.

use burn::tensor::Tensor;

/// Nats by row, `[n]`, from the teacher's `p_nk`, its logarithm (0 where p is 0) and the student's
/// `log_q_nk`, all [n, k+1].
#[must_use]
pub fn forward_kl(p_nk: Tensor<2>, log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
    (p_nk * (log_p_nk - log_q_nk)).sum_dim(1).squeeze_dim(1)
}
