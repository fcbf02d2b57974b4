//! Adaptive KL: w·D(p ‖ q) + (1 − w)·D(q ‖ p), with w from where the student is wrong.
//!
//! The head is the smallest set of the teacher's largest buckets with mass ≥ μ (ties at its edge all
//! belong to it); w = g_head / (g_head + g_rest), where g is Σ|p_b − q_b| over the head and over the
//! rest. So forward KL counts while the head is off and reverse KL while the rest is.
//!
//! Direction: p is the teacher, q the student. Gradient: w is a constant, so h is the two KLs' with
//! the same weights. Reduction: none, nats by row. Source: Wu et al. 2025 (arXiv 2404.02657), the
//! section on AKL, where μ = 0.5. Special cases: head and gaps are those of the coarse buckets, the
//! tail one of them, so that coarse ≤ full does not hold; q = p has w = 0 and value 0. The authors'
//! published code leaves the bucket that crosses μ out of the head; here it is in. Cost: it sorts the
//! teacher's buckets, on some devices through the host.

use burn::tensor::Tensor;

use super::{forward_kl, reverse_kl};

/// Nats by row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1]; `head_mass` is μ, in 0..=1.
#[must_use]
pub fn adaptive_kl(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>, head_mass: f64) -> Tensor<1> {
    let p_nk = log_p_nk.clone().exp();
    let gap_nk = (p_nk.clone() - log_q_nk.clone().detach().exp()).abs();
    let rest_nk = p_nk.clone().lower(head_threshold(p_nk, head_mass));
    let rest_n1 = gap_nk
        .clone()
        .mask_fill(rest_nk.clone().bool_not(), 0.0)
        .sum_dim(1);
    let head_n1 = gap_nk.mask_fill(rest_nk, 0.0).sum_dim(1);
    // Where both gaps are 0, both divergences are.
    let gaps_n1 = (head_n1.clone() + rest_n1).clamp_min(f64::from(f32::MIN_POSITIVE));
    let weight_n: Tensor<1> = (head_n1 / gaps_n1).squeeze_dim(1);
    let forward_n = forward_kl(log_p_nk.clone(), log_q_nk.clone());
    let reverse_n = reverse_kl(log_p_nk, log_q_nk);
    weight_n.clone() * forward_n + (-weight_n + 1.0) * reverse_n
}

/// The head's smallest probability, [n, 1]: a bucket is in the head while the buckets before it, in
/// falling order, have mass below `head_mass`.
fn head_threshold(p_nk: Tensor<2>, head_mass: f64) -> Tensor<2> {
    let sorted_nk = p_nk.sort_descending(1);
    let before_nk = sorted_nk.clone().cumsum(1) - sorted_nk.clone();
    let rest_nk = before_nk.greater_equal_elem(head_mass);
    sorted_nk.mask_fill(rest_nk, 2.0).min_dim(1)
}
