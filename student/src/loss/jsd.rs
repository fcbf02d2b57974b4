//! Generalised Jensen–Shannon divergence: β·D(p ‖ m) + (1 − β)·D(q ‖ m), m = β·p + (1 − β)·q.
//!
//! Direction: p is the teacher, q the student. β is the teacher's share of the mixture, as in TRL's
//! `GKDTrainer` and Liger's `LigerFusedLinearJSDLoss`: towards 0 it behaves as forward KL, towards 1
//! as reverse KL, ½ is the symmetric divergence. Gradient: h_b = (1 − β)·q_b (log q_b − log m_b).
//! Reduction: none, nats for each row; at most ln 2. Source: Agarwal et al. 2024 (GKD), §2, Eq. 1.
//! Special cases: the formula is 0 at β = 0 and β = 1; there it is *defined* as forward KL and as
//! reverse KL, as in TRL and Liger. Near the ends the value shrinks with β(1 − β), and so does the
//! gradient.

use burn::tensor::Tensor;

use super::mixture::log_ratios;
use super::{forward_kl, reverse_kl};

/// Computes nats for each row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1]; `beta` in 0..=1.
#[must_use]
pub fn jsd(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>, beta: f64) -> Tensor<1> {
    if beta == 0.0 {
        return forward_kl(log_p_nk, log_q_nk);
    }
    if beta == 1.0 {
        return reverse_kl(log_p_nk, log_q_nk);
    }
    let p_nk = log_p_nk.clone().exp();
    let q_nk = log_q_nk.clone().exp();
    let (log_p_over_m_nk, log_q_over_m_nk) = log_ratios(log_p_nk, log_q_nk, beta);
    (p_nk * log_p_over_m_nk * beta + q_nk * log_q_over_m_nk * (1.0 - beta))
        .sum_dim(1)
        .squeeze_dim(1)
}
