//! Cross-entropy on the target token: −log q(token), the loss of supervised fine-tuning; and with
//! label smoothing ε: −(1 − ε)·log q(token) − (ε/v)·Σ_i log q_i over the v tokens of the vocabulary.
//!
//! Gradient: ∂/∂s_i = q_i − 1[i = token]; smoothed: q_i − (1 − ε)·1[i = token] − ε/v. Reduction:
//! none, nats for each row. Source: Szegedy et al. 2016, §7; PyTorch's `CrossEntropyLoss(label_smoothing)`
//! has the same definition. Special case: ε = 0 is the cross-entropy without smoothing.

use burn::tensor::Tensor;

/// Computes nats for each row, `[n]`, from the student's log q of the target token, [n, 1].
#[must_use]
pub fn cross_entropy(log_q_n1: Tensor<2>) -> Tensor<1> {
    log_q_n1.squeeze_dim::<1>(1).neg()
}

/// Computes nats for each row, `[n]`, from log q of the target token, [n, 1], and Σ log q over the `vocab` tokens,
/// [n, 1]; `smoothing` is ε, in 0..=1.
#[must_use]
pub fn smoothed_cross_entropy(
    log_q_n1: Tensor<2>,
    sum_log_q_n1: Tensor<2>,
    vocab: usize,
    smoothing: f64,
) -> Tensor<1> {
    let uniform_n1 = sum_log_q_n1 * (smoothing / vocab as f64);
    cross_entropy(log_q_n1 * (1.0 - smoothing) + uniform_n1)
}
