//! α-divergence: D = Σ_b (α·p_b + (1 − α)·q_b − p_b^α · q_b^(1−α)) / (α (1 − α)).
//!
//! Direction: p is the teacher, q the student; α = 1 is forward KL, α = 0 reverse KL, ½ four times
//! the squared Hellinger distance. Gradient: h_b = (q_b − p_b^α q_b^(1−α)) / α. Reduction: none, a value for each
//! row. Source: Amari 1985; in this form, whose terms are all at least 0, Cichocki and Amari 2010,
//! §2. Special cases: the formula is 0/0 at α = 1 and α = 0; there it is *defined* as the limits.
//! Where the buckets' sums differ (`Tail::Ignore`) the form above includes the difference of the two
//! masses, and the limits do not.

use burn::tensor::Tensor;

use super::{forward_kl, reverse_kl};

/// Largest |log q − log p| at which a term is summed as a series.
const NEAR: f64 = 1.0 / 32.0;

/// Computes the divergence of each row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1]; `alpha` in 0..=1.
#[must_use]
pub fn alpha_divergence(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>, alpha: f64) -> Tensor<1> {
    if alpha == 1.0 {
        return forward_kl(log_p_nk, log_q_nk);
    }
    if alpha == 0.0 {
        return reverse_kl(log_p_nk, log_q_nk);
    }
    let rest = 1.0 - alpha;
    let difference_nk = log_q_nk.clone() - log_p_nk.clone();
    let far_nk = difference_nk.clone().abs().greater_elem(NEAR);
    // Relative to the larger of the two, exponents are small and lose little to rounding.
    let max_nk = log_p_nk.clone().max_pair(log_q_nk.clone().detach());
    let (p_nk, q_nk) = (log_p_nk.clone() - max_nk.clone(), log_q_nk - max_nk.clone());
    let geometric_nk = (p_nk.clone() * alpha + q_nk.clone() * rest).exp();
    let far_terms_nk = max_nk.exp() * (p_nk.exp() * alpha + q_nk.exp() * rest - geometric_nk);
    // At q ≈ p the three parts of a term nearly cancel. With d = log q − log p the term also equals
    // p·((1 − α)·r(d) − r((1 − α)·d)), without cancellation.
    let d_nk = difference_nk.mask_fill(far_nk.clone(), 0.0);
    let remainders_nk = exp_remainder(d_nk.clone()) * rest - exp_remainder(d_nk * rest);
    let terms_nk = log_p_nk.exp() * remainders_nk;
    // A product with the reciprocal, since burn differentiates a division by a number in f32.
    (terms_nk.mask_where(far_nk, far_terms_nk) * (alpha * rest).recip())
        .sum_dim(1)
        .squeeze_dim(1)
}

/// Computes r(x) = eˣ − 1 − x = x²/2 · (1 + x/3 · (1 + x/4 · …)), to 13 digits for |x| ≤ 1/32.
fn exp_remainder(x_nk: Tensor<2>) -> Tensor<2> {
    let mut series_nk = x_nk.ones_like();
    for i in (3..=7).rev() {
        series_nk = x_nk.clone() * series_nk * f64::from(i).recip() + 1.0;
    }
    x_nk.clone() * x_nk * series_nk * 0.5
}
