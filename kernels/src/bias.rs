//! The bias of a linear layer: y + b for each row, with ∂L/∂y unchanged and ∂L/∂b = Σ_rows ∂L/∂y.

use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind, binary},
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;

use crate::flex::{compact, elements, is_cpu_float, rows_per_task, shape2, vector, widened};
use crate::float::{StoredFloat, with_stored_type};
use crate::linear::linear;
use crate::simd::vectorize_closure;
use crate::team::{for_each_chunk, map_tasks};

/// Computes x·Wᵀ + b: `[n, in]`, `[out, in]` and `[out]` → `[n, out]`; differentiable in all. Without a bias this is
/// [`linear`].
///
/// # Panics
/// Panics on shapes that do not fit and on types that differ, as burn's own operations do.
#[must_use]
pub fn linear_biased(
    x_ni: Tensor<2>,
    weight_oi: Tensor<2>,
    bias_o: Option<Tensor<1>>,
) -> Tensor<2> {
    let y_no = linear(x_ni, weight_oi);
    match bias_o {
        Some(bias_o) => add_bias(y_no, bias_o),
        None => y_no,
    }
}

/// Adds `bias_o` to each row: `[n, out]`, `[out]` → `[n, out]`; differentiable in both. On the CPU the memory of y is
/// reused if it is not shared.
///
/// # Panics
/// Panics on shapes that do not fit and on types that differ, as burn's own operations do.
#[must_use]
pub fn add_bias(y_no: Tensor<2>, bias_o: Tensor<1>) -> Tensor<2> {
    assert_eq!(
        y_no.dims()[1],
        bias_o.dims()[0],
        "add_bias: columns and biases"
    );
    if is_cpu_float(&y_no) && bias_o.dtype() == y_no.dtype() {
        let (y, bias) = (y_no.into_dispatch(), bias_o.into_dispatch());
        Tensor::from_dispatch(<Dispatch as BiasOps>::add_bias(y, bias))
    } else {
        y_no + bias_o.unsqueeze()
    }
}

/// The sum and the gradient of the bias, in f32, f16 or bf16; computed in f32.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait BiasOps: Backend {
    /// `[n, out]`, `[out]` → `[n, out]`.
    fn add_bias(y: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Sums the rows: `[n, out]` → `[out]`.
    fn sum_rows(dy: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl BiasOps for Flex {
    fn add_bias(y: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        let (mut y, bias) = (compact(y), bias.to_contiguous());
        let bias = widened(&bias);
        // The storage is copied first if it is shared.
        with_stored_type!(y.dtype(), E => add_to_rows(y.storage_mut::<E>(), &bias));
        y
    }

    fn sum_rows(dy: FloatTensor<Self>) -> FloatTensor<Self> {
        let dy = dy.to_contiguous();
        let [_, columns] = shape2(&dy);
        let sums = with_stored_type!(dy.dtype(), E => row_sums(elements::<E>(&dy), columns));
        vector(sums, dy.dtype())
    }
}

fn add_to_rows<E: StoredFloat<f32>>(y: &mut [E], bias: &[f32]) {
    let columns = bias.len().max(1);
    for_each_chunk(y, rows_per_task(columns) * columns, |_, y| {
        vectorize_closure(
            #[inline(always)]
            || {
                for y in y.chunks_mut(columns) {
                    for (y, bias) in y.iter_mut().zip(bias) {
                        *y = E::narrow(y.widen() + bias);
                    }
                }
            },
        );
    });
}

fn row_sums<E: StoredFloat<f32>>(dy: &[E], columns: usize) -> Vec<f32> {
    // The size of a chunk is fixed, so the sums do not depend on the number of threads.
    let chunk = rows_per_task(columns) * columns.max(1);
    let chunk_sums = map_tasks(dy.len().div_ceil(chunk), |task| {
        let dy = &dy[task * chunk..dy.len().min((task + 1) * chunk)];
        let mut sums = vec![0.0f32; columns];
        vectorize_closure(
            #[inline(always)]
            || {
                for dy in dy.chunks(columns) {
                    for (sum, dy) in sums.iter_mut().zip(dy) {
                        *sum += dy.widen();
                    }
                }
            },
        );
        sums
    });
    let mut sums = vec![0.0; columns];
    for chunk in chunk_sums {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x);
    }
    sums
}

#[derive(Debug)]
struct BiasBackward;

impl<B: Backend + BiasOps> Backward<B, 2> for BiasBackward {
    type State = ();

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        binary::<B, _, _>(ops.parents, ops.node, grads, |dy| dy, B::sum_rows);
    }
}

impl<B: Backend + BiasOps, C: CheckpointStrategy> BiasOps for Autodiff<B, C> {
    fn add_bias(y: FloatTensor<Self>, bias: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [y.node(), bias.node()];
        let sum = B::add_bias(y.into_primitive(), bias.into_primitive());
        match BiasBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((), sum),
            OpsKind::UnTracked(prep) => prep.finish(sum),
        }
    }

    fn sum_rows(dy: FloatTensor<Self>) -> FloatTensor<Self> {
        FloatTensor::<Self>::new(B::sum_rows(dy.into_primitive()))
    }
}
