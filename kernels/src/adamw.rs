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
//!
//! A model in bf16 has an f32 master of each parameter as θ, and [`adamw_master`] writes the rounded θ in the same pass.
//! The moments may be bf16 beside an f32 θ, or 8 bits wide ([`eight_bit`]).

// Threads write different chunks of the same tensors.
#![allow(unsafe_code)]

pub(crate) mod eight_bit;

use crate::flex::{compact, elements, is_cpu_f32, is_cpu_float};
use crate::float::{StoredFloat, with_stored_type};
use crate::simd::vectorize_closure;
use crate::team::{DisjointChunks, map_tasks, run_tasks};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor, TensorData, bf16};

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
/// All tensors have θ's shape and type, except that the moments may be bf16 beside an f32 θ. None of the results is tracked
/// by autodiff.
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
    let same = [&theta, &gradient, &m, &v].map(Tensor::dtype) == [theta.dtype(); 4];
    if !(same && is_cpu_float(&theta) || has_f32_loops([&theta, &gradient], [&m, &v])) {
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

/// Computes [`adamw`] for an f32 `master` of a parameter of another type, and the parameter: the new master, rounded.
///
/// `parameter` has the old value, whose memory the new one takes if it is not shared. Master and gradient are f32, the
/// moments f32 or bf16. Returns the new parameter, master and moments.
///
/// # Panics
/// As [`adamw`].
#[must_use]
pub fn adamw_master<const D: usize>(
    parameter: Tensor<D>,
    master: Tensor<D>,
    gradient: Tensor<D>,
    moments: [Tensor<D>; 2],
    step: &AdamStep,
) -> (Tensor<D>, Tensor<D>, [Tensor<D>; 2]) {
    assert_eq!(
        parameter.dims(),
        gradient.dims(),
        "adamw: a parameter and its gradient"
    );
    let [m, v] = moments;
    let dtype = parameter.dtype();
    let has_loops = has_f32_loops([&master, &gradient], [&m, &v]);
    if !(has_loops && dtype == DType::BF16 && is_cpu_float(&parameter)) {
        drop(parameter);
        let (master, moments) = adamw(master, gradient, [m, v], step);
        return (master.clone().cast(dtype), master, moments);
    }
    let (parameter, master, m, v) = <Dispatch as AdamOps>::adamw_master(
        parameter.into_dispatch(),
        master.into_dispatch(),
        gradient.into_dispatch(),
        m.into_dispatch(),
        v.into_dispatch(),
        *step,
    );
    let [parameter, master, m, v] = [parameter, master, m, v].map(Tensor::from_dispatch);
    (parameter, master, [m, v])
}

/// Whether θ and its gradient are f32 on the CPU, and both moments f32 or both bf16.
fn has_f32_loops<const D: usize>(f32s: [&Tensor<D>; 2], moments: [&Tensor<D>; 2]) -> bool {
    let [m, v] = moments;
    f32s.into_iter().all(is_cpu_f32)
        && moments.into_iter().all(is_cpu_float)
        && m.dtype() == v.dtype()
        && m.dtype() != DType::F16
}

/// Computes [`adamw`] in tensor operations.
#[must_use]
pub fn adamw_reference<const D: usize>(
    theta: Tensor<D>,
    gradient: Tensor<D>,
    moments: [Tensor<D>; 2],
    step: &AdamStep,
) -> (Tensor<D>, [Tensor<D>; 2]) {
    let (b1, b2) = step.betas;
    let factors = step.factors();
    let stored = moments[0].dtype();
    let [m, v] = moments.map(|moment| moment.cast(theta.dtype()));
    let gradient = gradient * step.scale;
    let m = m * b1 + gradient.clone() * (1.0 - b1);
    let v = v * b2 + gradient.square() * (1.0 - b2);
    let direction = m.clone() / (v.clone().sqrt() / factors.root + step.epsilon);
    let theta = theta * factors.decay - direction * factors.rate;
    (theta, [m, v].map(|moment| moment.cast(stored)))
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

    /// Returns the new parameter (bf16), master (f32), m and v (f32 or bf16).
    fn adamw_master(
        parameter: FloatTensor<Self>,
        master: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamStep,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    );

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
        if theta.dtype() == m.dtype() {
            with_stored_type!(theta.dtype(), E => update::<E, E>([&mut theta, &mut m, &mut v], &gradient, &step));
        } else {
            update::<f32, bf16>([&mut theta, &mut m, &mut v], &gradient, &step);
        }
        (theta, m, v)
    }

    fn adamw_master(
        parameter: FloatTensor<Self>,
        master: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        step: AdamStep,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    ) {
        let gradient = gradient.to_contiguous();
        let [mut parameter, mut master, mut m, mut v] = [parameter, master, m, v].map(compact);
        let state = [&mut master, &mut m, &mut v];
        match state[1].dtype() {
            DType::F32 => update_master::<f32>(&mut parameter, state, &gradient, &step),
            _ => update_master::<bf16>(&mut parameter, state, &gradient, &step),
        }
        (parameter, master, m, v)
    }

    fn sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self> {
        let x = x.to_contiguous();
        let sums = with_stored_type!(x.dtype(), E => chunk_sums(elements::<E>(&x)));
        FlexTensor::from_data(TensorData::new(vec![sums.iter().sum::<f64>()], [1]))
    }
}

/// Updates θ, m and v in place. All are compact, the gradient is contiguous.
fn update<E: StoredFloat<f32>, M: StoredFloat<f32>>(
    [theta, m, v]: [&mut FlexTensor; 3],
    gradient: &FlexTensor,
    step: &AdamStep,
) {
    let factors = LoopFactors::new(step);
    let theta = DisjointChunks::new(theta.storage_mut::<E>(), CHUNK);
    let m = DisjointChunks::new(m.storage_mut::<M>(), CHUNK);
    let v = DisjointChunks::new(v.storage_mut::<M>(), CHUNK);
    let gradient = elements::<E>(gradient);
    run_tasks(theta.count(), rayon::current_num_threads(), |task| {
        // SAFETY: each task runs once.
        let (theta, m, v) = unsafe { (theta.get(task), m.get(task), v.get(task)) };
        let gradient = &gradient[task * CHUNK..];
        vectorize_closure(
            #[inline(always)]
            || {
                for (((theta, m), v), gradient) in
                    theta.iter_mut().zip(&mut *m).zip(&mut *v).zip(gradient)
                {
                    *theta = E::narrow(factors.update(theta.widen(), m, v, gradient.widen()));
                }
            },
        );
    });
}

/// Updates a master, m and v in place, and writes the rounded master to the parameter.
fn update_master<M: StoredFloat<f32>>(
    parameter: &mut FlexTensor,
    [theta, m, v]: [&mut FlexTensor; 3],
    gradient: &FlexTensor,
    step: &AdamStep,
) {
    let factors = LoopFactors::new(step);
    let theta = DisjointChunks::new(theta.storage_mut::<f32>(), CHUNK);
    let parameter = DisjointChunks::new(parameter.storage_mut::<bf16>(), CHUNK);
    let m = DisjointChunks::new(m.storage_mut::<M>(), CHUNK);
    let v = DisjointChunks::new(v.storage_mut::<M>(), CHUNK);
    let gradient = elements::<f32>(gradient);
    run_tasks(theta.count(), rayon::current_num_threads(), |task| {
        // SAFETY: each task runs once.
        let (theta, parameter) = unsafe { (theta.get(task), parameter.get(task)) };
        // SAFETY: as above.
        let (m, v) = unsafe { (m.get(task), v.get(task)) };
        let gradient = &gradient[task * CHUNK..];
        vectorize_closure(
            #[inline(always)]
            || {
                let numbers = theta.iter_mut().zip(&mut *parameter);
                let numbers = numbers.zip(&mut *m).zip(&mut *v).zip(gradient);
                for ((((theta, parameter), m), v), gradient) in numbers {
                    *theta = factors.update(*theta, m, v, *gradient);
                    *parameter = bf16::narrow(*theta);
                }
            },
        );
    });
}

/// The numbers of an update in f32.
#[derive(Clone, Copy)]
pub(crate) struct LoopFactors {
    betas: (f32, f32),
    /// 1 − β₁ and 1 − β₂.
    rests: (f32, f32),
    decay: f32,
    rate: f32,
    root: f32,
    epsilon: f32,
    scale: f32,
}

impl LoopFactors {
    pub(crate) fn new(step: &AdamStep) -> Self {
        let factors = step.factors();
        let (b1, b2) = step.betas;
        Self {
            betas: (b1 as f32, b2 as f32),
            rests: ((1.0 - b1) as f32, (1.0 - b2) as f32),
            decay: factors.decay as f32,
            rate: factors.rate as f32,
            root: factors.root as f32,
            epsilon: step.epsilon as f32,
            scale: step.scale as f32,
        }
    }

    /// Updates the moments of one number and returns its new θ.
    #[inline(always)]
    pub(crate) fn update<M: StoredFloat<f32>>(
        &self,
        theta: f32,
        m: &mut M,
        v: &mut M,
        gradient: f32,
    ) -> f32 {
        let g = gradient * self.scale;
        let new_m = m.widen() * self.betas.0 + g * self.rests.0;
        let new_v = v.widen() * self.betas.1 + g * g * self.rests.1;
        *m = M::narrow(new_m);
        *v = M::narrow(new_v);
        let change = new_m / (new_v.sqrt() / self.root + self.epsilon) * self.rate;
        theta * self.decay - change
    }
}

/// Returns Σ x² of each chunk, in order.
fn chunk_sums<E: StoredFloat<f32>>(x: &[E]) -> Vec<f64> {
    let chunk = |task: usize| &x[task * CHUNK..x.len().min((task + 1) * CHUNK)];
    map_tasks(x.len().div_ceil(CHUNK), |task| {
        chunk_sum_of_squares(chunk(task))
    })
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
