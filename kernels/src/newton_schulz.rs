//! The orthogonalisation of Muon (Jordan et al. 2024), in the matrix products of [`linear`](fn@crate::linear).

use burn::tensor::Tensor;

use crate::adamw::sum_of_squares;
use crate::linear::{linear, linear_input_gradient};

/// Coefficients of the quintic a·x + b·x³ + c·x⁵, whose iteration drives singular values between 0 and 1 towards 1.
const COEFFICIENTS: [f64; 3] = [3.4445, -4.775, 2.0315];
/// Number of iterations.
const ITERATIONS: usize = 5;
/// Smallest norm that a matrix is divided by.
const SMALLEST_NORM: f64 = 1e-7;

/// Computes a matrix with the singular vectors of `matrix` and singular values near 1, as PyTorch's `torch.optim.Muon`, but
/// without its rounding to bf16:
///
/// ```text
/// X ← X / ‖X‖        five times: G = X·Xᵀ,  X ← a·X + (b·G + c·G²)·X
/// ```
///
/// The result is not tracked by autodiff. A matrix of zeros stays one.
#[must_use]
pub fn newton_schulz(matrix: Tensor<2>) -> Tensor<2> {
    let [rows, columns] = matrix.dims();
    let [a, b, c] = COEFFICIENTS;
    // The smaller side is the one whose products are formed.
    let is_tall = rows > columns;
    let x = if is_tall { matrix.transpose() } else { matrix };
    let norm = sum_of_squares(x.clone()).sqrt().max(SMALLEST_NORM);
    let mut x = x / norm;
    for _ in 0..ITERATIONS {
        let gram = linear(x.clone(), x.clone());
        let update = gram.clone() * b + linear(gram.clone(), gram) * c;
        x = linear_input_gradient(update, x.clone()) + x * a;
    }
    if is_tall { x.transpose() } else { x }
}
