//! Adaptive KL: w·D(p ‖ q) + (1 − w)·D(q ‖ p), where w is the head's share of the student's error.
//!
//! The head is the smallest set of the teacher's largest buckets with mass ≥ μ (with all ties at its
//! edge); w = g_head / (g_head + g_rest), where g is Σ|p_b − q_b| over the head and over the
//! rest. So forward KL has more weight if the student is wrong in the head, and reverse KL if in the rest.
//!
//! Direction: p is the teacher, q the student. Gradient: w is a constant, so h is the sum of the h
//! of the two KLs with these weights. Reduction: none, nats for each row. Source: Wu et al. 2025 (arXiv 2404.02657), the
//! section on AKL, where μ = 0.5. Special cases: head and gaps are over the coarse buckets, including the
//! tail, so coarse ≤ full does not hold; q = p has w = 0 and value 0. The authors'
//! published code leaves the bucket that crosses μ out of the head; here that bucket is in
//! the head. Cost: sorts the teacher's buckets, on some devices on the host.

use burn::tensor::Tensor;

use super::{forward_kl, reverse_kl};

/// Computes nats for each row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1]; `head_mass` is μ, in 0..=1.
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
    // If both gaps are 0, both divergences are 0.
    let gaps_n1 = (head_n1.clone() + rest_n1).clamp_min(f64::from(f32::MIN_POSITIVE));
    let weight_n: Tensor<1> = (head_n1 / gaps_n1).squeeze_dim(1);
    let forward_n = forward_kl(log_p_nk.clone(), log_q_nk.clone());
    let reverse_n = reverse_kl(log_p_nk, log_q_nk);
    weight_n.clone() * forward_n + (-weight_n + 1.0) * reverse_n
}

/// Returns the head's smallest probability, [n, 1]: a bucket is in the head while the buckets before it, in
/// falling order, have mass below `head_mass`.
fn head_threshold(p_nk: Tensor<2>, head_mass: f64) -> Tensor<2> {
    let sorted_nk = p_nk.sort_descending(1);
    let before_nk = sorted_nk.clone().cumsum(1) - sorted_nk.clone();
    let rest_nk = before_nk.greater_equal_elem(head_mass);
    sorted_nk.mask_fill(rest_nk, 2.0).min_dim(1)
}
