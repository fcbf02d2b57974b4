//! What an optimizer step does to each parameter, in one pass over it.
//!
//! AdamW (Loshchilov and Hutter 2019) as PyTorch computes it, with g the gradient times `scale`:
//!
//! ```text
//! m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
//! θ ← θ (1 − η λ) − η/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! Traffic: θ, m, v and g are read once; θ, m and v are written in place where nobody else holds them.

use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor, TensorData};
use rayon::prelude::*;

use crate::flex::{numbers, plain_f32, whole};
use crate::simd::vectorize_closure;

/// The numbers of one AdamW step, the same for all parameters that decay alike.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// β₁ and β₂.
    pub betas: (f64, f64),
    /// ε.
    pub epsilon: f64,
    /// η.
    pub learning_rate: f64,
    /// λ, 0 for parameters that do not decay.
    pub weight_decay: f64,
    /// t, from 1.
    pub step: u64,
    /// What gradients are multiplied with: the factor of clipping.
    pub scale: f64,
}

/// θ, m and v after the step; all of θ's shape and type, and none tracked by autodiff.
///
/// # Panics
/// As burn's own operations do, on shapes and types that differ.
#[must_use]
pub fn adamw<const D: usize>(
    theta: Tensor<D>,
    gradient: Tensor<D>,
    moments: [Tensor<D>; 2],
    step: &AdamStep,
) -> (Tensor<D>, [Tensor<D>; 2]) {
    assert_eq!(theta.dims(), gradient.dims(), "adamw: θ and its gradient");
    let [m, v] = moments;
    if ![&theta, &gradient, &m, &v].into_iter().all(plain_f32) {
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

/// [`adamw`] in tensor operations.
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

/// Σ x² in f64, the same whatever the number of threads.
#[must_use]
pub fn sum_of_squares<const D: usize>(tensor: Tensor<D>) -> f64 {
    let sum: Tensor<1> = if plain_f32(&tensor) {
        Tensor::from_dispatch(<Dispatch as AdamOps>::sum_of_squares(
            tensor.into_dispatch(),
        ))
    } else {
        // By rows first and the rows in f64, so that millions of f32 squares keep their digits.
        tensor.square().sum_dim(D - 1).cast(DType::F64).sum()
    };
    sum.into_data().iter::<f64>().sum()
}

struct Factors {
    decay: f64,
    rate: f64,
    root: f64,
}

impl AdamStep {
    fn factors(&self) -> Factors {
        let t = self.step as f64;
        Factors {
            decay: 1.0 - self.learning_rate * self.weight_decay,
            rate: self.learning_rate / (1.0 - self.betas.0.powf(t)),
            root: (1.0 - self.betas.1.powf(t)).sqrt(),
        }
    }
}

/// Both in f32 on the CPU.
#[backend_extension(Flex)]
pub(crate) trait AdamOps: Backend {
    /// θ, m and v.
    fn adamw(
        theta: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// `[1]`, f64.
    fn sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Numbers that one task takes.
const SHARE: usize = 1 << 16;
/// Sums that are kept beside one another: a sum in order could not be vectorised.
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
        let [mut theta, mut m, mut v] = [theta, m, v].map(whole);
        let tasks = (theta.storage_mut::<f32>().par_chunks_mut(SHARE))
            .zip(m.storage_mut::<f32>().par_chunks_mut(SHARE))
            .zip(v.storage_mut::<f32>().par_chunks_mut(SHARE))
            .zip(numbers(&gradient).par_chunks(SHARE));
        tasks.for_each(|(((theta, m), v), gradient)| {
            vectorize_closure(
                #[inline(always)]
                || move_all(theta, m, v, gradient, &step),
            );
        });
        (theta, m, v)
    }

    fn sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let x = x.to_contiguous();
        let sums: Vec<f64> = numbers(&x).par_chunks(SHARE).map(squares).collect();
        FlexTensor::from_data(TensorData::new(vec![sums.iter().sum::<f64>()], [1]))
    }
}

#[inline(always)]
fn move_all(theta: &mut [f32], m: &mut [f32], v: &mut [f32], gradient: &[f32], step: &AdamStep) {
    let factors = step.factors();
    let (b1, b2) = (step.betas.0 as f32, step.betas.1 as f32);
    let (rest1, rest2) = ((1.0 - step.betas.0) as f32, (1.0 - step.betas.1) as f32);
    let (decay, rate) = (factors.decay as f32, factors.rate as f32);
    let (root, epsilon) = (factors.root as f32, step.epsilon as f32);
    let scale = step.scale as f32;
    for (((theta, m), v), gradient) in theta.iter_mut().zip(m).zip(v).zip(gradient) {
        let g = gradient * scale;
        *m = *m * b1 + g * rest1;
        *v = *v * b2 + g * g * rest2;
        *theta = *theta * decay - *m / (v.sqrt() / root + epsilon) * rate;
    }
}

fn squares(x: &[f32]) -> f64 {
    vectorize_closure(
        #[inline(always)]
        || {
            let mut sums = [0.0f64; LANES];
            for x in x.chunks(LANES) {
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum += f64::from(*x) * f64::from(*x);
                }
            }
            sums.iter().sum()
        },
    )
}
