//! Skew KL: D(p ‖ m), m = α·p + (1 − α)·q.
//!
//! Direction: p is the teacher, q the student; forward KL with a share α of the teacher mixed into
//! the student, so that a token with q = 0 costs at most −log α and its gradient stays
//! bounded. Gradient: h_b = −p_b (1 − α) q_b / m_b. Reduction: none, nats for each row. Source: Ko et al.
//! 2024 (DistiLLM), §3.1, where α = 0.1. Special case: α = 0 is forward KL.

use burn::tensor::Tensor;

use super::forward_kl;
use super::mixture::log_ratios;

/// Computes nats for each row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1]; `alpha` from 0 to below 1.
#[must_use]
pub fn skew_kl(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>, alpha: f64) -> Tensor<1> {
    if alpha == 0.0 {
        return forward_kl(log_p_nk, log_q_nk);
    }
    let p_nk = log_p_nk.clone().exp();
    let (log_p_over_m_nk, _) = log_ratios(log_p_nk, log_q_nk, alpha);
    (p_nk * log_p_over_m_nk).sum_dim(1).squeeze_dim(1)
}
