//! Muon (Jordan et al. 2024): steps along the orthogonalised momentum of a matrix.

use burn::tensor::Tensor;
use potstill_kernels::{AdamStep, newton_schulz};
use potstill_model::Parameter;

/// Decay rate μ of the momentum.
const MOMENTUM: f64 = 0.95;

/// Computes a matrix, or a stack of matrices, and its momentum after one step; g is the gradient times the scale of `step`:
///
/// ```text
/// b ← b + (1 − μ)(g − b)          θ ← θ (1 − η λ) − 0.2 η √max(rows, columns) · orthogonal(g + μ (b − g))
/// ```
///
/// The factor makes the root mean square of an update that of AdamW's (Liu et al. 2025), so that AdamW's learning rate η and
/// decay λ fit. As `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`.
pub(super) fn muon<const D: usize>(
    theta: Tensor<D>,
    gradient: Tensor<D>,
    momentum: Option<Tensor<D>>,
    step: &AdamStep,
) -> (Tensor<D>, Tensor<D>) {
    let gradient = gradient * step.scale;
    let momentum = momentum.unwrap_or_else(|| gradient.zeros_like());
    let momentum = momentum * MOMENTUM + gradient.clone() * (1.0 - MOMENTUM);
    let mean = gradient * (1.0 - MOMENTUM) + momentum.clone() * MOMENTUM;
    let dims = mean.dims();
    let longer = dims[D.saturating_sub(2)..].iter().max().copied();
    let factor = 0.2 * (longer.unwrap_or(1) as f64).sqrt() * step.learning_rate;
    let direction = orthogonal(mean);
    let theta = theta * (1.0 - step.learning_rate * step.weight_decay);
    (theta - direction * factor, momentum)
}

/// Orthogonalises each matrix.
fn orthogonal<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    let shape = tensor.dims();
    let result: Tensor<D> = match Parameter::new(tensor.clone()) {
        // A vector has no directions to even out, and Muon is not used for it.
        Parameter::Vector(_) => tensor,
        Parameter::Matrix(matrix) => newton_schulz(matrix).reshape(shape),
        Parameter::Stack(stack) => {
            let matrices = stack
                .iter_dim(0)
                .map(|matrix| newton_schulz(matrix.squeeze_dim(0)));
            Tensor::stack::<3>(matrices.collect(), 0).reshape(shape)
        }
    };
    result
}
