//! The AdamW update of one parameter in one pass over its memory, and the sum of squares for gradient norms.
//!
//! AdamW (Loshchilov and Hutter 2019) as PyTorch computes it, where g is the gradient times `scale`:
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
//! θ ← θ (1 − η λ) − η/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! f16 and bf16 are computed in f32 and rounded once. Traffic: θ, m, v and g are read once; θ, m and v are written in place if their storage is not shared.

use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor, TensorData};
use rayon::prelude::*;

use crate::flex::{compact, elements, is_cpu_float};
use crate::float::{StoredFloat, with_stored_type};
use crate::simd::vectorize_closure;

/// Hyperparameters of one AdamW step, shared by all parameters with the same weight decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// Decay rates of the moments, β₁ and β₂.
    pub betas: (f64, f64),
    /// Constant ε in the denominator.
    pub epsilon: f64,
    /// Learning rate η.
    pub learning_rate: f64,
    /// Weight decay λ; 0 for parameters that do not decay.
    pub weight_decay: f64,
    /// Number of the step, t, counted from 1.
    pub step: u64,
    /// Factor on the gradients, from gradient clipping.
    pub scale: f64,
}

/// Computes θ and the moments `[m, v]` after one AdamW step.
///
/// All tensors have θ's shape and type, and none of the results is tracked by autodiff.
///
/// # Panics
/// Panics on shapes and types that differ, as burn's own operations do.
#[must_use]
pub fn adamw<const D: usize>(
    theta: Tensor<D>,
    gradient: Tensor<D>,
    moments: [Tensor<D>; 2],
    step: &AdamStep,
) -> (Tensor<D>, [Tensor<D>; 2]) {
    assert_eq!(theta.dims(), gradient.dims(), "adamw: θ and its gradient");
    let [m, v] = moments;
    let has_loops = |tensor: &Tensor<D>| is_cpu_float(tensor) && tensor.dtype() == theta.dtype();
    if ![&theta, &gradient, &m, &v].into_iter().all(has_loops) {
        return adamw_reference(theta, gradient, [m, v], step);
    }
    let (theta, m, v) = <Dispatch as AdamOps>::adamw(
        theta.into_dispatch(),
        gradient.into_dispatch(),
        m.into_dispatch(),
        v.into_dispatch(),
        *step,
    );
    let [theta, m, v] = [theta, m, v].map(Tensor::from_dispatch);
    (theta, [m, v])
}

/// Computes [`adamw`] in tensor operations.
#[must_use]
pub fn adamw_reference<const D: usize>(
    theta: Tensor<D>,
    gradient: Tensor<D>,
    moments: [Tensor<D>; 2],
    step: &AdamStep,
) -> (Tensor<D>, [Tensor<D>; 2]) {
    let ((b1, b2), factors, [m, v]) = (step.betas, step.factors(), moments);
    let gradient = gradient * step.scale;
    let m = m * b1 + gradient.clone() * (1.0 - b1);
    let v = v * b2 + gradient.square() * (1.0 - b2);
    let direction = m.clone() / (v.clone().sqrt() / factors.root + step.epsilon);
    let theta = theta * factors.decay - direction * factors.rate;
    (theta, [m, v])
}

/// Computes Σ x² in f64. The result does not depend on the number of threads.
#[must_use]
pub fn sum_of_squares<const D: usize>(tensor: Tensor<D>) -> f64 {
    let sum: Tensor<1> = if is_cpu_float(&tensor) {
        Tensor::from_dispatch(<Dispatch as AdamOps>::sum_of_squares(
            tensor.into_dispatch(),
        ))
    } else {
        // Rows are summed first and their sums added in f64, so that millions of f32 squares keep their digits.
        tensor.square().sum_dim(D - 1).cast(DType::F64).sum()
    };
    sum.into_data().iter::<f64>().sum()
}

/// Factors of the update that depend on the step alone.
struct StepFactors {
    /// 1 − η λ.
    decay: f64,
    /// η / (1 − β₁ᵗ).
    rate: f64,
    /// √(1 − β₂ᵗ).
    root: f64,
}

impl AdamStep {
    fn factors(&self) -> StepFactors {
        let t = self.step as f64;
        StepFactors {
            decay: 1.0 - self.learning_rate * self.weight_decay,
            rate: self.learning_rate / (1.0 - self.betas.0.powf(t)),
            root: (1.0 - self.betas.1.powf(t)).sqrt(),
        }
    }
}

/// The CPU forms of the update and of the sum of squares, for f32, f16 and bf16.
#[backend_extension(Flex)]
pub(crate) trait AdamOps: Backend {
    /// Returns the new θ, m and v.
    fn adamw(
        theta: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// Returns Σ x² as `[1]` in f64.
    fn sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Numbers per task.
const CHUNK: usize = 1 << 16;
/// Independent partial sums: a sum in order could not be vectorised.
const LANES: usize = 8;

impl AdamOps for Flex {
    fn adamw(
        theta: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let gradient = gradient.to_contiguous();
        let [mut theta, mut m, mut v] = [theta, m, v].map(compact);
        with_stored_type!(theta.dtype(), E => {
            let tasks = (theta.storage_mut::<E>().par_chunks_mut(CHUNK))
                .zip(m.storage_mut::<E>().par_chunks_mut(CHUNK))
                .zip(v.storage_mut::<E>().par_chunks_mut(CHUNK))
                .zip(elements::<E>(&gradient).par_chunks(CHUNK));
            tasks.for_each(|(((theta, m), v), gradient)| {
                vectorize_closure(
                    #[inline(always)]
                    || update_chunk(theta, m, v, gradient, &step),
                );
            });
        });
        (theta, m, v)
    }

    fn sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let x = x.to_contiguous();
        let sums: Vec<f64> = with_stored_type!(x.dtype(), E => elements::<E>(&x)
            .par_chunks(CHUNK)
            .map(chunk_sum_of_squares)
            .collect());
        FlexTensor::from_data(TensorData::new(vec![sums.iter().sum::<f64>()], [1]))
    }
}

#[inline(always)]
fn update_chunk<E: StoredFloat<f32>>(
    theta: &mut [E],
    m: &mut [E],
    v: &mut [E],
    gradient: &[E],
    step: &AdamStep,
) {
    let factors = step.factors();
    let (b1, b2) = (step.betas.0 as f32, step.betas.1 as f32);
    let (rest1, rest2) = ((1.0 - step.betas.0) as f32, (1.0 - step.betas.1) as f32);
    let (decay, rate) = (factors.decay as f32, factors.rate as f32);
    let (root, epsilon) = (factors.root as f32, step.epsilon as f32);
    let scale = step.scale as f32;
    for (((theta, m), v), gradient) in theta.iter_mut().zip(m).zip(v).zip(gradient) {
        let g = gradient.widen() * scale;
        let new_m = m.widen() * b1 + g * rest1;
        let new_v = v.widen() * b2 + g * g * rest2;
        let change = new_m / (new_v.sqrt() / root + epsilon) * rate;
        *theta = E::narrow(theta.widen() * decay - change);
        *m = E::narrow(new_m);
        *v = E::narrow(new_v);
    }
}

fn chunk_sum_of_squares<E: StoredFloat<f32>>(x: &[E]) -> f64 {
    vectorize_closure(
        #[inline(always)]
        || {
            let mut sums = [0.0f64; LANES];
            for x in x.chunks(LANES) {
                for (sum, x) in sums.iter_mut().zip(x) {
                    let x = f64::from(x.widen());
                    *sum += x * x;
                }
            }
            sums.iter().sum()
        },
    )
}
