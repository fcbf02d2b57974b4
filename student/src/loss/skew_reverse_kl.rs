//! Skew reverse KL: D(q ‖ m), m = (1 − α)·p + α·q.
//!
//! Direction: q is the student, p the teacher; reverse KL with a share α of the student mixed into
//! the teacher, so that a token with p = 0 costs at most −log α. Gradient:
//! h_b = q_b (log q_b − log m_b + (1 − α) p_b / m_b). Reduction: none, nats for each row. Source: Ko et
//! al. 2024 (DistiLLM), §3.1, where α = 0.1. Special case: α = 0 is reverse KL.

use burn::tensor::Tensor;

use super::mixture::log_ratios;
use super::reverse_kl;

/// Computes nats for each row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1]; `alpha` from 0 to below 1.
#[must_use]
pub fn skew_reverse_kl(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>, alpha: f64) -> Tensor<1> {
    if alpha == 0.0 {
        return reverse_kl(log_p_nk, log_q_nk);
    }
    let q_nk = log_q_nk.clone().exp();
    let (_, log_q_over_m_nk) = log_ratios(log_p_nk, log_q_nk, 1.0 - alpha);
    (q_nk * log_q_over_m_nk).sum_dim(1).squeeze_dim(1)
}
