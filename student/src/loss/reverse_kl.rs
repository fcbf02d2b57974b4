//! Reverse KL: D(q ‖ p) = Σ_b q_b (log q_b − log p_b), b over the buckets.
//!
//! Direction: q is the student, p the teacher; it makes the student say only what the teacher may
//! say, and lets the student leave modes out. Gradient: h_b = q_b (log q_b − log p_b + 1). Reduction: none,
//! nats for each row. Source: Gu, Dong, Wei and Huang 2024 (MiniLLM), §2.1, there over sampled
//! sequences; here exact, for each token with a fixed prefix. Special cases: q_b = 0 adds 0; p_b = 0
//! with q_b > 0 would be infinite and costs 10⁴ nats times q_b, the floor of log p.

use burn::tensor::Tensor;

/// Computes nats for each row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1].
#[must_use]
pub fn reverse_kl(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
    let q_nk = log_q_nk.clone().exp();
    (q_nk * (log_q_nk - log_p_nk)).sum_dim(1).squeeze_dim(1)
}
