//! Linear layers: y = x·Wᵀ, with W as checkpoints have it, `[out, in]`.
//!
//! ```text
//! y = x·Wᵀ          ∂L/∂x = ∂L/∂y·W          ∂L/∂W = (∂L/∂y)ᵀ·x
//! ```
//!
//! On the CPU these are our own products, in f32 (see `gemm`) and in bf16 (see `gemm::half`: sums in f32,
//! rounded once): W is read as it lies, for one row as for thousands, so nothing is packed for later and
//! no second copy of a weight exists; and a row of y does not depend on the rows beside it, bit for bit.
//! Elsewhere they are burn's.

// Products write to memory that nothing was written to before.
#![allow(unsafe_code)]

mod half;

use std::mem::MaybeUninit;

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind, binary},
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor};

use crate::flex::{matrix, numbers, plain_f32, plain_half, shape2, whole, wide, written};
use crate::gemm::{Matrix, Output, Threads, gemm, gemm_at, rows_by_rows};

/// x·Wᵀ: `[n, in]`, `[out, in]` → `[n, out]`; differentiable in both.
///
/// # Panics
/// As burn's own operations do, on shapes that do not fit and on types that differ.
#[must_use]
pub fn linear(x_ni: Tensor<2>, weight_oi: Tensor<2>) -> Tensor<2> {
    let ([n, width], [_, columns]) = (x_ni.dims(), weight_oi.dims());
    assert_eq!(
        width, columns,
        "linear: {n} rows of {width} for a weight of {columns} columns"
    );
    if ours(&x_ni, &weight_oi) {
        let (x, weight) = (x_ni.into_dispatch(), weight_oi.into_dispatch());
        Tensor::from_dispatch(<Dispatch as LinearOps>::linear_forward(x, weight))
    } else if plain_half(&x_ni) {
        let dtype = x_ni.dtype();
        linear(wide(x_ni), wide(weight_oi)).cast(dtype)
    } else {
        x_ni.matmul(weight_oi.transpose())
    }
}

/// [`linear`], not differentiable itself, over the memory of `buffer` where that has the result's shape and
/// nobody else holds it: a walk over chunks then touches the same pages again instead of new ones.
#[must_use]
pub fn linear_into(buffer: Option<Tensor<2>>, x_ni: Tensor<2>, weight_oi: Tensor<2>) -> Tensor<2> {
    match buffer {
        Some(buffer) if ours(&x_ni, &weight_oi) && x_ni.dims()[1] == weight_oi.dims()[1] => {
            let (x, weight) = (x_ni.into_dispatch(), weight_oi.into_dispatch());
            let y = <Dispatch as LinearOps>::linear_into(buffer.into_dispatch(), x, weight);
            Tensor::from_dispatch(y)
        }
        buffer => {
            // Before the result is allocated.
            drop(buffer);
            linear(x_ni, weight_oi)
        }
    }
}

/// [`linear`] with two weights, as one product: x is read once.
///
/// # Panics
/// As [`linear`].
#[must_use]
pub fn linear_pair(x_ni: Tensor<2>, weights: [Tensor<2>; 2]) -> [Tensor<2>; 2] {
    let together = |weight: &Tensor<2>| ours(&x_ni, weight) && x_ni.dims()[1] == weight.dims()[1];
    if !weights.iter().all(together) {
        return weights.map(|weight| linear(x_ni.clone(), weight));
    }
    let x = x_ni.into_dispatch();
    let [first, second] = weights.map(Tensor::into_dispatch);
    let (first, second) = <Dispatch as LinearOps>::linear_pair(x, first, second);
    [first, second].map(Tensor::from_dispatch)
}

/// ∂L/∂x of [`linear`] from ∂L/∂y: `[n, out]`, `[out, in]` → `[n, in]`; not differentiable itself.
#[must_use]
pub fn linear_input_gradient(dy_no: Tensor<2>, weight_oi: Tensor<2>) -> Tensor<2> {
    if ours(&dy_no, &weight_oi) {
        let (dy, weight) = (dy_no.into_dispatch(), weight_oi.into_dispatch());
        Tensor::from_dispatch(<Dispatch as LinearOps>::linear_input_gradient(dy, weight))
    } else if plain_half(&dy_no) {
        let dtype = dy_no.dtype();
        linear_input_gradient(wide(dy_no), wide(weight_oi)).cast(dtype)
    } else {
        dy_no.matmul(weight_oi)
    }
}

/// ∂L/∂W of [`linear`] from ∂L/∂y, added to `sum`: `[n, out]`, `[n, in]` and `[out, in]` → `[out, in]`;
/// not differentiable itself. The sum is added to in place where nobody else holds it.
#[must_use]
pub fn linear_weight_gradient(
    dy_no: Tensor<2>,
    x_ni: Tensor<2>,
    sum: Option<Tensor<2>>,
) -> Tensor<2> {
    let all_ours = ours(&dy_no, &x_ni) && sum.as_ref().is_none_or(|sum| ours(sum, &dy_no));
    if !all_ours && plain_half(&dy_no) {
        let (dtype, sum) = (dy_no.dtype(), sum.map(wide));
        return linear_weight_gradient(wide(dy_no), wide(x_ni), sum).cast(dtype);
    }
    if !all_ours {
        let gradient = dy_no.transpose().matmul(x_ni);
        return match sum {
            Some(sum) => sum + gradient,
            None => gradient,
        };
    }
    let (dy, x) = (dy_no.into_dispatch(), x_ni.into_dispatch());
    Tensor::from_dispatch(match sum {
        Some(sum) => {
            <Dispatch as LinearOps>::linear_weight_gradient_onto(sum.into_dispatch(), dy, x)
        }
        None => <Dispatch as LinearOps>::linear_weight_gradient(dy, x),
    })
}

/// As [`linear_weight_gradient`], but summed and given in f32 where the operands are of half precision:
/// what many chunks leave on one weight does not vanish in the rounding of the sum.
#[must_use]
pub fn linear_weight_gradient_wide(
    dy_no: Tensor<2>,
    x_ni: Tensor<2>,
    sum: Option<Tensor<2>>,
) -> Tensor<2> {
    if !matches!(dy_no.dtype(), DType::BF16 | DType::F16) {
        return linear_weight_gradient(dy_no, x_ni, sum);
    }
    if plain_half(&dy_no) {
        return linear_weight_gradient(wide(dy_no), wide(x_ni), sum);
    }
    // Elsewhere halves are multiplied with sums in f32, and only a chunk's result is rounded.
    let gradient = wide(dy_no.transpose().matmul(x_ni));
    match sum {
        Some(sum) => sum + gradient,
        None => gradient,
    }
}

/// Whether our own products take both as they lie: f32 or bf16, on the CPU.
fn ours(a: &Tensor<2>, b: &Tensor<2>) -> bool {
    a.dtype() == b.dtype()
        && a.dtype() != DType::F16
        && [a, b].into_iter().all(|x| plain_f32(x) || plain_half(x))
}

/// The three products, in f32 or bf16.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait LinearOps: Backend {
    /// `[n, in]`, `[out, in]` → `[n, out]`.
    fn linear_forward(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// As the forward product, over the buffer if it serves.
    fn linear_into(
        buffer: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `[n, in]` and two weights → `[n, out]` of each.
    fn linear_pair(
        x: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `[n, out]`, `[out, in]` → `[n, in]`.
    fn linear_input_gradient(dy: FloatTensor<Self>, weight: FloatTensor<Self>)
    -> FloatTensor<Self>;

    /// `[n, out]`, `[n, in]` → `[out, in]`.
    fn linear_weight_gradient(dy: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `[out, in]`, `[n, out]`, `[n, in]` → `[out, in]`.
    fn linear_weight_gradient_onto(
        sum: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

impl LinearOps for Flex {
    fn linear_forward(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let (x, weight) = (x.to_contiguous(), weight.to_contiguous());
        if x.dtype() == DType::BF16 {
            return half::forward(&x, &weight);
        }
        let ([n, _], [columns, _]) = (shape2(&x), shape2(&weight));
        let write = |y: &mut _| rows_by_rows(view(&x), [output(&weight, y)]);
        // SAFETY: a product writes all of its output.
        matrix(unsafe { written(n * columns, write) }, [n, columns])
    }

    fn linear_into(
        buffer: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let shape = [shape2(&x)[0], shape2(&weight)[0]];
        let mut y = buffer;
        let serves = x.dtype() == DType::F32
            && y.dtype() == DType::F32
            && shape2(&y) == shape
            && y.is_unique()
            && y.is_contiguous()
            && y.storage::<f32>().len() == shape[0] * shape[1];
        if !serves {
            drop(y);
            return Self::linear_forward(x, weight);
        }
        let (x, weight) = (x.to_contiguous(), weight.to_contiguous());
        let numbers: *mut [f32] = y.storage_mut::<f32>();
        // SAFETY: the product writes numbers to all of it and reads none; nobody else holds it.
        let out = unsafe { &mut *(numbers as *mut [MaybeUninit<f32>]) };
        rows_by_rows(view(&x), [output(&weight, out)]);
        y
    }

    fn linear_pair(
        x: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if x.dtype() != DType::F32 {
            let y = Self::linear_forward(x.clone(), first);
            return (y, Self::linear_forward(x, second));
        }
        let [x, first, second] = [x, first, second].map(|tensor| tensor.to_contiguous());
        let [n, a, b] = [&x, &first, &second].map(|tensor| shape2(tensor)[0]);
        let mut other = Vec::new();
        // SAFETY: a product writes all of its outputs.
        let y = unsafe {
            written(n * a, |y| {
                other = written(n * b, |other| {
                    let outputs = [output(&first, y), output(&second, other)];
                    rows_by_rows(view(&x), outputs);
                });
            })
        };
        (matrix(y, [n, a]), matrix(other, [n, b]))
    }

    fn linear_input_gradient(
        dy: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        product(dy.to_contiguous(), weight.to_contiguous(), false)
    }

    fn linear_weight_gradient(dy: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self> {
        product(dy.to_contiguous(), x.to_contiguous(), true)
    }

    fn linear_weight_gradient_onto(
        sum: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let (dy, x) = (dy.to_contiguous(), x.to_contiguous());
        if x.dtype() == DType::BF16 {
            return half::onto(sum, &dy, &x);
        }
        let mut sum = whole(sum);
        let [_, columns] = shape2(&sum);
        let (left, right) = (view(&dy).transposed(), view(&x));
        gemm(
            sum.storage_mut::<f32>(),
            columns,
            left,
            right,
            true,
            Threads::All,
        );
        sum
    }
}

fn output<'a>(weight: &'a FloatTensor<Flex>, out: &'a mut [MaybeUninit<f32>]) -> Output<'a> {
    let weight = view(weight);
    Output { weight, out }
}

fn view(tensor: &FloatTensor<Flex>) -> Matrix<'_> {
    let [rows, columns] = shape2(tensor);
    Matrix::new(numbers(tensor), rows, columns)
}

/// A·B or Aᵀ·B.
fn product(a: FloatTensor<Flex>, b: FloatTensor<Flex>, transposed: bool) -> FloatTensor<Flex> {
    if a.dtype() == DType::BF16 {
        return half::product(&a, &b, transposed);
    }
    let (mut left, right) = (view(&a), view(&b));
    if transposed {
        left = left.transposed();
    }
    let (rows, columns) = (left.rows, right.columns);
    // SAFETY: the output is as large as the product, which writes all of it.
    let out = unsafe {
        written(rows * columns, |out| {
            let out = out.as_mut_ptr().cast();
            gemm_at(out, columns, left, right, false, Threads::All);
        })
    };
    matrix(out, [rows, columns])
}

#[derive(Debug)]
struct LinearBackward;

impl<B: Backend + LinearOps> Backward<B, 2> for LinearBackward {
    /// x where the weight is trained, the weight where x is tracked.
    type State = (Option<NodeId>, Option<NodeId>);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let (x, weight) = ops.state;
        let x = x.map(|id| checkpointer.retrieve_node_output(id));
        let weight = weight.map(|id| checkpointer.retrieve_node_output(id));
        binary::<B, _, _>(
            ops.parents,
            ops.node,
            grads,
            |dy| match weight {
                Some(weight) => B::linear_input_gradient(dy, weight),
                None => unreachable!("the weight is kept for an x that is tracked"),
            },
            |dy| match x {
                Some(x) => B::linear_weight_gradient(dy, x),
                None => unreachable!("x is kept for a weight that is tracked"),
            },
        );
    }
}

/// The node of a product that was computed.
fn node<B: Backend + LinearOps, C: CheckpointStrategy>(
    x: &FloatTensor<Autodiff<B, C>>,
    weight: &FloatTensor<Autodiff<B, C>>,
    y: FloatTensor<B>,
) -> FloatTensor<Autodiff<B, C>> {
    let prepared = LinearBackward
        .prepare::<C>([x.node(), weight.node()])
        .compute_bound()
        .stateful();
    match prepared {
        OpsKind::Tracked(mut prep) => {
            let kept_x = weight.is_tracked().then(|| prep.checkpoint(x));
            let kept_weight = x.is_tracked().then(|| prep.checkpoint(weight));
            prep.finish((kept_x, kept_weight), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

impl<B: Backend + LinearOps, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn linear_forward(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let [values, weights] = [&x, &weight].map(|tensor| tensor.clone().into_primitive());
        node::<B, C>(&x, &weight, B::linear_forward(values, weights))
    }

    fn linear_into(
        buffer: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [buffer, x, weight] = [buffer, x, weight].map(FloatTensor::<Self>::into_primitive);
        FloatTensor::<Self>::new(B::linear_into(buffer, x, weight))
    }

    fn linear_pair(
        x: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [values, a, b] = [&x, &first, &second].map(|tensor| tensor.clone().into_primitive());
        let (y, other) = B::linear_pair(values, a, b);
        (
            node::<B, C>(&x, &first, y),
            node::<B, C>(&x, &second, other),
        )
    }

    fn linear_input_gradient(
        dy: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        // A gradient is a constant here: no second derivative is offered.
        FloatTensor::<Self>::new(B::linear_input_gradient(
            dy.into_primitive(),
            weight.into_primitive(),
        ))
    }

    fn linear_weight_gradient(dy: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self> {
        FloatTensor::<Self>::new(B::linear_weight_gradient(
            dy.into_primitive(),
            x.into_primitive(),
        ))
    }

    fn linear_weight_gradient_onto(
        sum: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [sum, dy, x] = [sum, dy, x].map(FloatTensor::<Self>::into_primitive);
        FloatTensor::<Self>::new(B::linear_weight_gradient_onto(sum, dy, x))
    }
}
