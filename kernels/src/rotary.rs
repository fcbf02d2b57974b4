//! Rotary position embeddings (Su et al. 2021), in the layout of Hugging Face checkpoints: in each head of width
//! e, the pair (x_i, x_{i + e/2}) is rotated by an angle that depends on the row and on i.
//!
//! ```text
//! y_i       = x_i cos − x_{i+e/2} sin
//! y_{i+e/2} = x_{i+e/2} cos + x_i sin
//! ```
//!
//! The gradient is the rotation by the opposite angle: the same formula with −sin.

// The output is allocated without being zeroed, because every element is written once.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind, unary},
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::flex::{
    elements, is_cpu_f32, is_cpu_half, matrix, rows_per_task, shape2, to_f32, vec_written_by,
};
use crate::simd::vectorize_closure;

/// Rotates every head of every row: `x_nc` `[n, heads · e]`, `cos_nf` and `sin_nf` `[n, e/2]` →
/// `[n, heads · e]`; differentiable in x.
///
/// # Panics
/// Panics on shapes that do not fit, as burn's own operations do.
#[must_use]
pub fn rotary(x_nc: Tensor<2>, cos_nf: Tensor<2>, sin_nf: Tensor<2>) -> Tensor<2> {
    let ([n, columns], [rows, half]) = (x_nc.dims(), cos_nf.dims());
    assert!(
        rows == n && sin_nf.dims() == [rows, half] && columns.is_multiple_of(2 * half.max(1)),
        "rotary: {n} rows of {columns} and angles [{rows}, {half}]"
    );
    if is_cpu_f32(&x_nc) && is_cpu_f32(&cos_nf) {
        let (x, cos, sin) = (
            x_nc.into_dispatch(),
            cos_nf.into_dispatch(),
            sin_nf.into_dispatch(),
        );
        Tensor::from_dispatch(<Dispatch as RotaryOps>::rotary(x, cos, sin, false))
    } else if is_cpu_half(&x_nc) {
        let dtype = x_nc.dtype();
        rotary(to_f32(x_nc), to_f32(cos_nf), to_f32(sin_nf)).cast(dtype)
    } else {
        rotary_reference(x_nc, cos_nf, sin_nf)
    }
}

/// Computes [`rotary`] in tensor operations.
#[must_use]
pub fn rotary_reference(x_nc: Tensor<2>, cos_nf: Tensor<2>, sin_nf: Tensor<2>) -> Tensor<2> {
    let ([n, columns], [_, half]) = (x_nc.dims(), cos_nf.dims());
    let x_nhe = x_nc.reshape([n, columns / (2 * half), 2 * half]);
    let (cos, sin): (Tensor<3>, Tensor<3>) = (cos_nf.unsqueeze_dim(1), sin_nf.unsqueeze_dim(1));
    let first = x_nhe.clone().narrow(2, 0, half);
    let second = x_nhe.narrow(2, half, half);
    let rotated = vec![
        first.clone() * cos.clone() - second.clone() * sin.clone(),
        second * cos + first * sin,
    ];
    Tensor::cat(rotated, 2).reshape([n, columns])
}

/// The rotation in f32. With `inverse` it is by the opposite angle, which is the gradient.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait RotaryOps: Backend {
    /// `[n, heads · e]`, `[n, e/2]` twice → `[n, heads · e]`.
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self>;
}

impl RotaryOps for Flex {
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self> {
        let [x, cos, sin] = [x, cos, sin].map(|tensor| tensor.to_contiguous());
        let ([n, columns], [_, half]) = (shape2(&x), shape2(&cos));
        let sign = if inverse { -1.0 } else { 1.0 };
        let task_rows = rows_per_task(columns);
        let angles = elements::<f32>(&cos)
            .par_chunks(task_rows * half.max(1))
            .zip(elements::<f32>(&sin).par_chunks(task_rows * half.max(1)));
        let rows = elements::<f32>(&x)
            .par_chunks(task_rows * columns.max(1))
            .zip(angles);
        let write = |y: &mut [MaybeUninit<f32>]| {
            (y.par_chunks_mut(task_rows * columns.max(1)).zip(rows)).for_each(
                |(y, (x, (cos, sin)))| {
                    vectorize_closure(
                        #[inline(always)]
                        || {
                            let angles = cos.chunks(half).zip(sin.chunks(half));
                            let rows = y.chunks_mut(columns).zip(x.chunks(columns));
                            for ((y, x), (cos, sin)) in rows.zip(angles) {
                                for (y, x) in y.chunks_mut(2 * half).zip(x.chunks(2 * half)) {
                                    rotate_head(y, x, cos, sin, sign);
                                }
                            }
                        },
                    );
                },
            );
        };
        // SAFETY: `write` covers every row: the public function checks that each row has its angles and that
        // the columns are whole heads.
        let y = unsafe { vec_written_by(n * columns, write) };
        matrix(y, [n, columns])
    }
}

/// Rotates one head of one row.
#[inline(always)]
fn rotate_head(y: &mut [MaybeUninit<f32>], x: &[f32], cos: &[f32], sin: &[f32], sign: f32) {
    let half = x.len() / 2;
    let ((y_first, y_second), (first, second)) = (y.split_at_mut(half), x.split_at(half));
    let (cos, sin) = (&cos[..half], &sin[..half]);
    for i in 0..half {
        let sin = sign * sin[i];
        y_first[i].write(first[i] * cos[i] - second[i] * sin);
        y_second[i].write(second[i] * cos[i] + first[i] * sin);
    }
}

#[derive(Debug)]
struct RotaryBackward;

impl<B: Backend + RotaryOps> Backward<B, 1> for RotaryBackward {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let (cos, sin) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |dy| {
            B::rotary(dy, cos, sin, true)
        });
    }
}

impl<B: Backend + RotaryOps, C: CheckpointStrategy> RotaryOps for Autodiff<B, C> {
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self> {
        let node = x.node();
        let [x, cos, sin] = [x, cos, sin].map(FloatTensor::<Self>::into_primitive);
        let y = B::rotary(x, cos.clone(), sin.clone(), inverse);
        match RotaryBackward
            .prepare::<C>([node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish((cos, sin), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}
