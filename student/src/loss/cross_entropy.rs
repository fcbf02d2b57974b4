//! Cross-entropy on the realised token: −log q(token), the loss of supervised fine-tuning.
//!
//! Gradient: ∂/∂s_i = q_i − 1[i = token]. Reduction: none, nats by row.

use burn::tensor::Tensor;

/// Nats by row, `[n]`, from the student's log q of the realised token, [n, 1].
#[must_use]
pub fn cross_entropy(log_q_n1: Tensor<2>) -> Tensor<1> {
    log_q_n1.squeeze_dim::<1>(1).neg()
}
