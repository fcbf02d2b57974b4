//! Total variation distance: ½ Σ_b |p_b − q_b|, b over the buckets.
//!
//! Direction: symmetric. Gradient: h_b = ½ q_b sign(q_b − p_b), 0 where they are equal. Reduction:
//! none, a value for each row, in 0..=1 (a probability, not nats). Source: Wen, Li, Du and Mou 2023 (f-distill),
//! §2. Special case: the distance is bounded, so a student far from the teacher learns slowly: the
//! gradient has the factor q.

use burn::tensor::Tensor;

/// Computes the distance of each row, `[n]`, from `log_p_nk` and `log_q_nk`, both [n, k+1].
#[must_use]
pub fn total_variation(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
    let difference_nk = log_q_nk.exp() - log_p_nk.exp();
    (difference_nk.abs() * 0.5).sum_dim(1).squeeze_dim(1)
}
