//! Reverse KL: D(q ‖ p) = Σ_b q_b (log q_b − log p_b), b over the buckets.
//!
//! Direction: q is the student, p the teacher; it asks the student to say only what the teacher may
//! say, and lets it leave modes out. Gradient: h_b = q_b (log q_b − log p_b + 1). Reduction: none,
//! nats by row. Source: Gu, Dong, Wei and Huang 2024 (MiniLLM), §2.1, there over sequences and
//! sampled; here token by token, the prefix fixed, and exact. Special cases: q_b = 0 adds 0; p_b = 0
//! with q_b > 0 would be infinite and costs 10⁴ nats times q_b, the floor of log p.

use burn::tensor::Tensor;

/// Nats by row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1].
#[must_use]
pub fn reverse_kl(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
    let q_nk = log_q_nk.clone().exp();
    (q_nk * (log_q_nk - log_p_nk)).sum_dim(1).squeeze_dim(1)
}
