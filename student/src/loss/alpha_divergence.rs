//! α-divergence: D = Σ_b (α·p_b + (1 − α)·q_b − p_b^α · q_b^(1−α)) / (α (1 − α)).
//!
//! Direction: p is the teacher, q the student; α = 1 is forward KL, α = 0 reverse KL, ½ four times
//! the squared Hellinger distance. Gradient: h_b = (q_b − p_b^α q_b^(1−α)) / α. Reduction: none, by
//! row. Source: Amari 1985; in this form, where every term is at least 0, Cichocki and Amari 2010,
//! Eq. 33. Special cases: the formula is 0/0 at α = 1 and α = 0; there it is *defined* as the limits.
//! Where the buckets' sums differ (`Tail::Ignore`) the form above keeps the difference of the two
//! masses, which the limits leave out. Within 0.01 of a limit f32 loses digits: take the limit.

use burn::tensor::Tensor;

use super::{forward_kl, reverse_kl};

/// Divergence by row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1]; `alpha` in 0..=1.
#[must_use]
pub fn alpha_divergence(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>, alpha: f64) -> Tensor<1> {
    if alpha == 1.0 {
        return forward_kl(log_p_nk, log_q_nk);
    }
    if alpha == 0.0 {
        return reverse_kl(log_p_nk, log_q_nk);
    }
    let p_nk = log_p_nk.clone().exp();
    let q_nk = log_q_nk.clone().exp();
    let geometric_nk = (log_p_nk * alpha + log_q_nk * (1.0 - alpha)).exp();
    // Differences first: at q ≈ p all three are nearly equal.
    let terms_nk = (q_nk - p_nk.clone()) * (1.0 - alpha) - (geometric_nk - p_nk);
    (terms_nk / (alpha * (1.0 - alpha)))
        .sum_dim(1)
        .squeeze_dim(1)
}
