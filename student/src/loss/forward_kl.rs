//! Forward KL: D(p ‖ q) = Σ_b p_b (log p_b − log q_b), b over the buckets.
//!
//! Direction: p is the teacher, q the student; it makes the student cover all that the teacher may
//! say. Gradient: h_b = −p_b, hence ∂D/∂s_i = q_i − p_i on the support. Reduction: none, nats for each
//! row. Source: Hinton, Vinyals and Dean 2015, §2 (there as cross-entropy with soft targets); on the
//! coarse vocabulary it is at most the full KL, by the log-sum inequality. Special cases: p_b = 0
//! adds 0, whatever q_b; no τ² factor. On weighted draws the gradient is correct and the value is not:
//! see [`soft_cross_entropy`](super::soft_cross_entropy()).

use burn::tensor::Tensor;

/// Computes nats for each row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1].
#[must_use]
pub fn forward_kl(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
    let p_nk = log_p_nk.clone().exp();
    (p_nk * (log_p_nk - log_q_nk)).sum_dim(1).squeeze_dim(1)
}
