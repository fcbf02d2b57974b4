//! Cross-entropy with soft targets: −Σ_b p_b log q_b, b over the buckets.
//!
//! Direction: p is the teacher, q the student. Gradient: h_b = −p_b, the same as for forward KL; the
//! values differ by the teacher's entropy. Reduction: none, nats for each row. Source: Hinton, Vinyals
//! and Dean 2015, §2. Special case, weighted draws: exp(log p) are the weights p̂ of an unbiased
//! estimate. They need not sum to 1, and Σ p̂ log p̂ is not an estimate of the entropy. The value of forward
//! KL is then this cross-entropy minus the teacher's stored entropy, and its expectation is the full KL.

use burn::tensor::Tensor;

/// Computes nats for each row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1].
#[must_use]
pub fn soft_cross_entropy(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
    (log_p_nk.exp() * log_q_nk).sum_dim(1).squeeze_dim(1).neg()
}
