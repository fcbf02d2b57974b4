//! Linear layers: y = x·Wᵀ, with W `[out, in]` as in checkpoints.
//!
//! ```text
//! y = x·Wᵀ          ∂L/∂x = ∂L/∂y·W          ∂L/∂W = (∂L/∂y)ᵀ·x
//! ```
//!
//! On the CPU the products are those of `gemm` in f32, and of `gemm::half` in bf16 with sums in f32 that are
//! rounded once. They read W in its stored layout, whether x has one row or thousands, so no second, packed copy
//! of a weight is kept. A row of y does not depend on the other rows, bit for bit. On other devices the products
//! are burn's.

// Products write to uninitialised memory.
#![allow(unsafe_code)]

mod autodiff;
mod half;

use std::mem::MaybeUninit;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Element, Tensor};

use crate::flex::{
    compact, elements, is_cpu_f32, is_cpu_half, matrix, shape2, to_f32, vec_written_by,
};
use crate::gemm::{Matrix, Threads, WeightOutput, gemm, gemm_at, multiply_by_weights};

/// Computes x·Wᵀ: `[n, in]`, `[out, in]` → `[n, out]`; differentiable in both.
///
/// # Panics
/// Panics on shapes that do not fit and on types that differ, as burn's own operations do.
#[must_use]
pub fn linear(x_ni: Tensor<2>, weight_oi: Tensor<2>) -> Tensor<2> {
    let ([n, width], [_, columns]) = (x_ni.dims(), weight_oi.dims());
    assert_eq!(
        width, columns,
        "linear: {n} rows of {width} for a weight of {columns} columns"
    );
    if has_own_product(&x_ni, &weight_oi) {
        let (x, weight) = (x_ni.into_dispatch(), weight_oi.into_dispatch());
        Tensor::from_dispatch(<Dispatch as LinearOps>::linear_forward(x, weight))
    } else if is_cpu_half(&x_ni) {
        let dtype = x_ni.dtype();
        linear(to_f32(x_ni), to_f32(weight_oi)).cast(dtype)
    } else {
        x_ni.matmul(weight_oi.transpose())
    }
}

/// Computes [`linear`] into the memory of `buffer`, if that has the result's shape and is not shared. Not
/// differentiable.
///
/// A loop over chunks that passes each result on as the next buffer reuses the same pages of memory.
///
/// # Panics
/// Panics as [`linear`] does.
#[must_use]
pub fn linear_into(buffer: Option<Tensor<2>>, x_ni: Tensor<2>, weight_oi: Tensor<2>) -> Tensor<2> {
    match buffer {
        Some(buffer)
            if has_own_product(&x_ni, &weight_oi) && x_ni.dims()[1] == weight_oi.dims()[1] =>
        {
            let (x, weight) = (x_ni.into_dispatch(), weight_oi.into_dispatch());
            let y = <Dispatch as LinearOps>::linear_into(buffer.into_dispatch(), x, weight);
            Tensor::from_dispatch(y)
        }
        buffer => {
            // The buffer is freed before the result is allocated.
            drop(buffer);
            linear(x_ni, weight_oi)
        }
    }
}

/// Computes [`linear`] with two weights as one product that reads x once.
///
/// # Panics
/// Panics as [`linear`] does.
#[must_use]
pub fn linear_pair(x_ni: Tensor<2>, weights: [Tensor<2>; 2]) -> [Tensor<2>; 2] {
    let fits =
        |weight: &Tensor<2>| has_own_product(&x_ni, weight) && x_ni.dims()[1] == weight.dims()[1];
    if !weights.iter().all(fits) {
        return weights.map(|weight| linear(x_ni.clone(), weight));
    }
    let x = x_ni.into_dispatch();
    let [first, second] = weights.map(Tensor::into_dispatch);
    let (first, second) = <Dispatch as LinearOps>::linear_pair(x, first, second);
    [first, second].map(Tensor::from_dispatch)
}

/// Computes ∂L/∂x of [`linear`] from ∂L/∂y: `[n, out]`, `[out, in]` → `[n, in]`. Not differentiable.
#[must_use]
pub fn linear_input_gradient(dy_no: Tensor<2>, weight_oi: Tensor<2>) -> Tensor<2> {
    if has_own_product(&dy_no, &weight_oi) {
        let (dy, weight) = (dy_no.into_dispatch(), weight_oi.into_dispatch());
        Tensor::from_dispatch(<Dispatch as LinearOps>::linear_input_gradient(dy, weight))
    } else if is_cpu_half(&dy_no) {
        let dtype = dy_no.dtype();
        linear_input_gradient(to_f32(dy_no), to_f32(weight_oi)).cast(dtype)
    } else {
        dy_no.matmul(weight_oi)
    }
}

/// Computes ∂L/∂W of [`linear`] from ∂L/∂y and adds it to `sum`: `[n, out]`, `[n, in]` and `[out, in]` →
/// `[out, in]`. Not differentiable. `sum` is updated in place if its storage is not shared.
#[must_use]
pub fn linear_weight_gradient(
    dy_no: Tensor<2>,
    x_ni: Tensor<2>,
    sum: Option<Tensor<2>>,
) -> Tensor<2> {
    let sum_fits = sum.as_ref().is_none_or(|sum| has_own_product(sum, &dy_no));
    let own = has_own_product(&dy_no, &x_ni) && sum_fits;
    if !own && is_cpu_half(&dy_no) {
        let (dtype, sum) = (dy_no.dtype(), sum.map(to_f32));
        return linear_weight_gradient(to_f32(dy_no), to_f32(x_ni), sum).cast(dtype);
    }
    if !own {
        let gradient = dy_no.transpose().matmul(x_ni);
        return match sum {
            Some(sum) => sum + gradient,
            None => gradient,
        };
    }
    let (dy, x) = (dy_no.into_dispatch(), x_ni.into_dispatch());
    Tensor::from_dispatch(match sum {
        Some(sum) => {
            <Dispatch as LinearOps>::add_linear_weight_gradient(sum.into_dispatch(), dy, x)
        }
        None => <Dispatch as LinearOps>::linear_weight_gradient(dy, x),
    })
}

/// Computes [`linear_weight_gradient`] with the sum and the result in f32 if the operands are f16 or bf16, so that
/// the contributions of many chunks to one weight are not lost in the rounding of the sum.
#[must_use]
pub fn linear_weight_gradient_f32(
    dy_no: Tensor<2>,
    x_ni: Tensor<2>,
    sum: Option<Tensor<2>>,
) -> Tensor<2> {
    if !matches!(dy_no.dtype(), DType::BF16 | DType::F16) {
        return linear_weight_gradient(dy_no, x_ni, sum);
    }
    let sum_fits = sum.as_ref().is_none_or(is_cpu_f32);
    if has_own_product(&dy_no, &x_ni) && sum_fits {
        let (dy, x) = (dy_no.into_dispatch(), x_ni.into_dispatch());
        return Tensor::from_dispatch(match sum {
            Some(sum) => {
                <Dispatch as LinearOps>::add_linear_weight_gradient(sum.into_dispatch(), dy, x)
            }
            None => <Dispatch as LinearOps>::linear_weight_gradient_f32(dy, x),
        });
    }
    if is_cpu_half(&dy_no) {
        return linear_weight_gradient(to_f32(dy_no), to_f32(x_ni), sum);
    }
    // On other devices, products of half precisions are summed in f32, and only a chunk's result is rounded.
    let gradient = to_f32(dy_no.transpose().matmul(x_ni));
    match sum {
        Some(sum) => sum + gradient,
        None => gradient,
    }
}

/// Whether the products of `gemm` take both tensors without conversion: both f32 or both bf16, on the CPU.
pub(crate) fn has_own_product(a: &Tensor<2>, b: &Tensor<2>) -> bool {
    a.dtype() == b.dtype()
        && a.dtype() != DType::F16
        && [a, b].into_iter().all(|x| is_cpu_f32(x) || is_cpu_half(x))
}

/// The forward product and the two gradients, in f32 or bf16.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait LinearOps: Backend {
    /// `[n, in]`, `[out, in]` → `[n, out]`.
    fn linear_forward(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// Computes the forward product, into the buffer's memory if its shape and type fit and it is not shared.
    fn linear_into(
        buffer: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `[n, in]` and two weights `[out, in]` → `[n, out]` for each weight.
    fn linear_pair(
        x: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// ∂L/∂y `[n, out]`, W `[out, in]` → ∂L/∂x `[n, in]`.
    fn linear_input_gradient(dy: FloatTensor<Self>, weight: FloatTensor<Self>)
    -> FloatTensor<Self>;

    /// ∂L/∂y `[n, out]`, x `[n, in]` → ∂L/∂W `[out, in]`.
    fn linear_weight_gradient(dy: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self>;

    /// ∂L/∂y `[n, out]`, x `[n, in]`, both bf16 → ∂L/∂W `[out, in]` in f32.
    fn linear_weight_gradient_f32(dy: FloatTensor<Self>, x: FloatTensor<Self>)
    -> FloatTensor<Self>;

    /// A sum `[out, in]`, ∂L/∂y `[n, out]`, x `[n, in]` → the sum plus ∂L/∂W `[out, in]`. The sum has the type of the
    /// others, or is f32 if they are bf16.
    fn add_linear_weight_gradient(
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
        let write = |y: &mut _| multiply_by_weights(view(&x), [output(&weight, y)]);
        // SAFETY: the product writes all of its output.
        matrix(unsafe { vec_written_by(n * columns, write) }, [n, columns])
    }

    fn linear_into(
        buffer: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let shape = [shape2(&x)[0], shape2(&weight)[0]];
        let mut y = buffer;
        let bytes = shape[0] * shape[1] * x.dtype().size();
        let fits = y.dtype() == x.dtype()
            && shape2(&y) == shape
            && y.is_unique()
            && y.is_contiguous()
            && y.bytes().len() == bytes;
        if !fits {
            drop(y);
            return Self::linear_forward(x, weight);
        }
        let (x, weight) = (x.to_contiguous(), weight.to_contiguous());
        if x.dtype() == DType::BF16 {
            half::forward_into(&mut y, &x, &weight);
            return y;
        }
        let numbers: *mut [f32] = y.storage_mut::<f32>();
        // SAFETY: the buffer is not shared, and the product writes numbers to all of it and reads none.
        let out = unsafe { &mut *(numbers as *mut [MaybeUninit<f32>]) };
        multiply_by_weights(view(&x), [output(&weight, out)]);
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
        // SAFETY: the product writes all of its outputs.
        let y = unsafe {
            vec_written_by(n * a, |y| {
                other = vec_written_by(n * b, |other| {
                    let outputs = [output(&first, y), output(&second, other)];
                    multiply_by_weights(view(&x), outputs);
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

    fn linear_weight_gradient_f32(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        half::transposed_product_f32(&dy.to_contiguous(), &x.to_contiguous())
    }

    fn add_linear_weight_gradient(
        sum: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let (dy, x) = (dy.to_contiguous(), x.to_contiguous());
        if x.dtype() == DType::BF16 {
            return half::add_transposed_product(sum, &dy, &x);
        }
        let mut sum = compact(sum);
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

fn output<'a>(weight: &'a FloatTensor<Flex>, out: &'a mut [MaybeUninit<f32>]) -> WeightOutput<'a> {
    let weight = view(weight);
    WeightOutput { weight, out }
}

/// Views a contiguous tensor as a matrix.
fn view<E: Element + bytemuck::Pod>(tensor: &FloatTensor<Flex>) -> Matrix<'_, E> {
    let [rows, columns] = shape2(tensor);
    Matrix::new(elements(tensor), rows, columns)
}

/// Computes A·B, or Aᵀ·B if `transposed`.
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
        vec_written_by(rows * columns, |out: &mut [MaybeUninit<f32>]| {
            let out = out.as_mut_ptr().cast();
            gemm_at(out, columns, left, right, false, Threads::All);
        })
    };
    matrix(out, [rows, columns])
}
