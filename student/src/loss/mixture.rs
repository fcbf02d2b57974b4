//! The mixture m = w·p + (1 − w)·q of the Jensen–Shannon and skew divergences, in log space.

use burn::tensor::Tensor;

/// Computes log p − log m and log q − log m, [n, k+1], for 0 < `weight` < 1; differentiable in log q.
///
/// Both are computed relative to the larger of log p and log q, so that nothing overflows and q ≈ p
/// loses no digits. The maximum is a constant for autodiff: it cancels, and its slope is undefined at ties.
pub(super) fn log_ratios(
    log_p_nk: Tensor<2>,
    log_q_nk: Tensor<2>,
    weight: f64,
) -> (Tensor<2>, Tensor<2>) {
    let max_nk = log_p_nk.clone().max_pair(log_q_nk.clone().detach());
    let p_nk = log_p_nk - max_nk.clone();
    let q_nk = log_q_nk - max_nk;
    let log_m_nk = (p_nk.clone().exp() * weight + q_nk.clone().exp() * (1.0 - weight)).log();
    (p_nk - log_m_nk.clone(), q_nk - log_m_nk)
}
