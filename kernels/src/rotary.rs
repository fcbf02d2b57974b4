//! Rotary position embeddings (Su et al. 2021), in the layout of Hugging Face checkpoints: in each head, the pair
//! (x_i, x_{i + f}) is rotated by an angle that depends on the row and on i, for i < f. If the head is wider than 2f,
//! its other columns stay as they are.
//!
//! ```text
//! y_i     = x_i cos − x_{i+f} sin
//! y_{i+f} = x_{i+f} cos + x_i sin
//! ```
//!
//! The gradient is the rotation by the opposite angle: the same formula with −sin.

use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind, unary},
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;

use crate::flex::{compact, is_cpu_float, rows_per_task, shape2, widened};
use crate::float::{StoredFloat, with_stored_type};
use crate::simd::vectorize_closure;
use crate::team::for_each_chunk;

/// Rotates every head of every row: `x_nc` `[n, heads · head_width]`, `cos_nf` and `sin_nf` `[n, f]` with
/// 2f ≤ `head_width` → `[n, heads · head_width]`; differentiable in x.
///
/// The first 2f columns of each head are rotated. On the CPU the memory of x is reused if it is not shared.
///
/// # Panics
/// Panics on shapes that do not fit, as burn's own operations do.
#[must_use]
pub fn rotary(
    x_nc: Tensor<2>,
    cos_nf: Tensor<2>,
    sin_nf: Tensor<2>,
    head_width: usize,
) -> Tensor<2> {
    let ([n, columns], [rows, f]) = (x_nc.dims(), cos_nf.dims());
    assert!(
        rows == n
            && sin_nf.dims() == [rows, f]
            && 2 * f <= head_width
            && columns.is_multiple_of(head_width.max(1)),
        "rotary: {n} rows of {columns} in heads of {head_width}, and angles [{rows}, {f}]"
    );
    if [&x_nc, &cos_nf, &sin_nf].into_iter().all(is_cpu_float) {
        let (x, cos, sin) = (
            x_nc.into_dispatch(),
            cos_nf.into_dispatch(),
            sin_nf.into_dispatch(),
        );
        Tensor::from_dispatch(<Dispatch as RotaryOps>::rotary(
            x, cos, sin, head_width, false,
        ))
    } else {
        rotary_reference(x_nc, cos_nf, sin_nf, head_width)
    }
}

/// Computes [`rotary`] in tensor operations.
#[must_use]
pub fn rotary_reference(
    x_nc: Tensor<2>,
    cos_nf: Tensor<2>,
    sin_nf: Tensor<2>,
    head_width: usize,
) -> Tensor<2> {
    let ([n, columns], [_, f]) = (x_nc.dims(), cos_nf.dims());
    let x_nhe = x_nc.reshape([n, columns / head_width.max(1), head_width]);
    let (cos, sin): (Tensor<3>, Tensor<3>) = (cos_nf.unsqueeze_dim(1), sin_nf.unsqueeze_dim(1));
    let first = x_nhe.clone().narrow(2, 0, f);
    let second = x_nhe.clone().narrow(2, f, f);
    let mut parts = vec![
        first.clone() * cos.clone() - second.clone() * sin.clone(),
        second * cos + first * sin,
    ];
    if head_width > 2 * f {
        parts.push(x_nhe.narrow(2, 2 * f, head_width - 2 * f));
    }
    Tensor::cat(parts, 2).reshape([n, columns])
}

/// The rotation in f32, f16 or bf16; computed in f32. With `inverse` it is by the opposite angle, which is the gradient.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait RotaryOps: Backend {
    /// `[n, heads · head_width]`, `[n, f]` twice → `[n, heads · head_width]`.
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        head_width: usize,
        inverse: bool,
    ) -> FloatTensor<Self>;
}

impl RotaryOps for Flex {
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        head_width: usize,
        inverse: bool,
    ) -> FloatTensor<Self> {
        let [cos, sin] = [cos, sin].map(|tensor| tensor.to_contiguous());
        let (mut x, [_, f]) = (compact(x), shape2(&cos));
        let (cos, sin) = (widened(&cos), widened(&sin));
        if f > 0 {
            let sign = if inverse { -1.0 } else { 1.0 };
            // The storage is copied first if it is shared.
            with_stored_type!(x.dtype(), E => {
                rotate_rows(x.storage_mut::<E>(), &cos, &sin, [f, head_width], sign);
            });
        }
        x
    }
}

/// Rotates every head of every row in place.
fn rotate_rows<E: StoredFloat<f32>>(
    x: &mut [E],
    cos: &[f32],
    sin: &[f32],
    [f, head_width]: [usize; 2],
    sign: f32,
) {
    let columns = x.len() / (cos.len() / f).max(1);
    let task_rows = rows_per_task(columns);
    for_each_chunk(x, task_rows * columns, |task, x| {
        let angles = task * task_rows * f..;
        let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
        vectorize_closure(
            #[inline(always)]
            || {
                let angles = cos.chunks_exact(f).zip(sin.chunks_exact(f));
                for (x, (cos, sin)) in x.chunks_exact_mut(columns).zip(angles) {
                    for x in x.chunks_exact_mut(head_width) {
                        rotate_head(x, cos, sin, sign);
                    }
                }
            },
        );
    });
}

/// Rotates one head of one row.
#[inline(always)]
fn rotate_head<E: StoredFloat<f32>>(x: &mut [E], cos: &[f32], sin: &[f32], sign: f32) {
    let f = cos.len();
    let (first, rest) = x.split_at_mut(f);
    let (second, sin) = (&mut rest[..f], &sin[..f]);
    for i in 0..f {
        let (a, b, sin) = (first[i].widen(), second[i].widen(), sign * sin[i]);
        first[i] = E::narrow(a * cos[i] - b * sin);
        second[i] = E::narrow(b * cos[i] + a * sin);
    }
}

#[derive(Debug)]
struct RotaryBackward;

impl<B: Backend + RotaryOps> Backward<B, 1> for RotaryBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, usize, bool);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let (cos, sin, head_width, inverse) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |dy| {
            B::rotary(dy, cos, sin, head_width, !inverse)
        });
    }
}

impl<B: Backend + RotaryOps, C: CheckpointStrategy> RotaryOps for Autodiff<B, C> {
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        head_width: usize,
        inverse: bool,
    ) -> FloatTensor<Self> {
        let node = x.node();
        let [x, cos, sin] = [x, cos, sin].map(FloatTensor::<Self>::into_primitive);
        let y = B::rotary(x, cos.clone(), sin.clone(), head_width, inverse);
        match RotaryBackward
            .prepare::<C>([node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish((cos, sin, head_width, inverse), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}
