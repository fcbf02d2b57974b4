//! Linear layers over frozen weights in ggml's blocks: y = x·Wᵀ with W dequantised a few rows at a time.
//!
//! ```text
//! y = x·Wᵀ          ∂L/∂x = ∂L/∂y·W
//! ```
//!
//! The weight is a constant: it has no gradient, and its dense form never exists as a whole. On the CPU, in f32 and bf16,
//! a chunk of rows is dequantised into a small scratch for each product with it; in bf16 the numbers are rounded to bf16
//! first, and sums are f32. In other types and on other devices, each chunk is dequantised on the host and multiplied by
//! tensor operations. `codec`, `blocks32` and `blocks256` convert between numbers and blocks; GGUF files use them too.

// Products write to uninitialised memory.
#![allow(unsafe_code)]

mod autodiff;
mod block_type;
mod blocks256;
mod blocks32;
mod codec;

use std::fmt;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor, TensorData, bf16};

use crate::flex::{elements, is_cpu_f32, is_cpu_half, matrix, shape2, vec_written_by};
use crate::gemm::{Matrix, ScratchBuffer, Threads, gemm, gemm_at, half};

pub use block_type::BlockType;
pub use codec::{dequantize, dequantize_into, quantize};

/// Numbers of a weight that are dequantised at a time: 2 MiB in f32, which second-level caches hold.
const CHUNK_NUMBERS: usize = 1 << 19;

/// A matrix in blocks, each within a row. Clones share the bytes.
#[derive(Clone, PartialEq)]
pub struct BlockMatrix {
    kind: BlockType,
    shape: [usize; 2],
    bytes: Arc<[u8]>,
}

impl fmt::Debug for BlockMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.kind.name(), self.shape)
    }
}

impl BlockMatrix {
    /// Takes the blocks of a matrix, row by row; `None` if the rows are not whole blocks, or the bytes are not as many as
    /// the shape requires.
    #[must_use]
    pub fn new(kind: BlockType, shape: [usize; 2], bytes: Vec<u8>) -> Option<Self> {
        let [rows, columns] = shape;
        let expected = kind.bytes(columns).checked_mul(rows);
        let fits = columns.is_multiple_of(kind.block_len()) && expected == Some(bytes.len());
        fits.then(|| Self {
            kind,
            shape,
            bytes: bytes.into(),
        })
    }

    /// Quantises a matrix; `None` if its rows are not whole blocks, or nothing quantises to this type.
    #[must_use]
    pub fn quantized(kind: BlockType, shape: [usize; 2], values: &[f32]) -> Option<Self> {
        if !shape[1].is_multiple_of(kind.block_len()) {
            return None;
        }
        Self::new(kind, shape, quantize(kind, values)?)
    }

    /// The type of the blocks.
    #[must_use]
    pub fn kind(&self) -> BlockType {
        self.kind
    }

    /// Rows and columns.
    #[must_use]
    pub fn dims(&self) -> [usize; 2] {
        self.shape
    }

    /// The stored blocks.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Converts the whole matrix to numbers.
    #[must_use]
    pub fn dequantized(&self) -> TensorData {
        TensorData::new(dequantize(self.kind, &self.bytes), self.shape)
    }

    /// Converts some rows to numbers and applies `convert` to each.
    fn rows_into<T: Send>(
        &self,
        rows: &Range<usize>,
        out: &mut [T],
        convert: impl Fn(f32) -> T + Sync,
    ) {
        let row = self.kind.bytes(self.shape[1]);
        let bytes = &self.bytes[rows.start * row..rows.end * row];
        dequantize_into(self.kind, bytes, out, convert);
    }

    /// The chunks of rows that are dequantised at a time.
    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let [rows, columns] = self.shape;
        let step = (CHUNK_NUMBERS / columns.max(1)).next_multiple_of(16);
        (0..rows)
            .step_by(step)
            .map(move |start| start..rows.min(start + step))
    }
}

/// Computes x·Wᵀ: `[n, in]` and a weight `[out, in]` in blocks → `[n, out]`; differentiable in x.
///
/// # Panics
/// Panics on shapes that do not fit, as burn's own operations do.
#[must_use]
pub fn linear_blocks(x_ni: Tensor<2>, weight_oi: &BlockMatrix) -> Tensor<2> {
    let ([n, width], [_, columns]) = (x_ni.dims(), weight_oi.dims());
    assert_eq!(
        width, columns,
        "linear_blocks: {n} rows of {width} for a weight of {columns} columns"
    );
    let is_own = is_cpu_f32(&x_ni) || is_cpu_half(&x_ni) && x_ni.dtype() == DType::BF16;
    match is_own {
        true => {
            let y = <Dispatch as BlockOps>::blocks_forward(x_ni.into_dispatch(), weight_oi.clone());
            Tensor::from_dispatch(y)
        }
        false => linear_blocks_reference(x_ni, weight_oi),
    }
}

/// Computes [`linear_blocks`] in tensor operations, one chunk of rows after the other.
#[must_use]
pub fn linear_blocks_reference(x_ni: Tensor<2>, weight_oi: &BlockMatrix) -> Tensor<2> {
    let [_, columns] = weight_oi.dims();
    let options = (&x_ni.device(), x_ni.dtype());
    let chunk = |rows: Range<usize>| {
        let mut values = vec![0.0; rows.len() * columns];
        weight_oi.rows_into(&rows, &mut values, |number| number);
        let data = TensorData::new(values, [rows.len(), columns]);
        let weight_ri = Tensor::<2>::from_data(data, options);
        x_ni.clone().matmul(weight_ri.transpose())
    };
    Tensor::cat(weight_oi.chunks().map(chunk).collect(), 1)
}

/// The forward product and the gradient of the input, in f32 or bf16.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait BlockOps: Backend {
    /// `[n, in]`, `[out, in]` → `[n, out]`.
    fn blocks_forward(x: FloatTensor<Self>, weight: BlockMatrix) -> FloatTensor<Self>;

    /// ∂L/∂y `[n, out]`, W `[out, in]` → ∂L/∂x `[n, in]`.
    fn blocks_input_gradient(dy: FloatTensor<Self>, weight: BlockMatrix) -> FloatTensor<Self>;
}

impl BlockOps for Flex {
    fn blocks_forward(x: FloatTensor<Self>, weight: BlockMatrix) -> FloatTensor<Self> {
        let x = x.to_contiguous();
        let shape = [shape2(&x)[0], weight.dims()[0]];
        if x.dtype() == DType::BF16 {
            return matrix(forward_half(elements(&x), shape, &weight), shape);
        }
        let write = |y: &mut [MaybeUninit<f32>]| forward(elements(&x), y, shape, &weight);
        // SAFETY: the chunks of rows of the weight, each a range of columns of the product, cover all of it.
        matrix(unsafe { vec_written_by(shape[0] * shape[1], write) }, shape)
    }

    fn blocks_input_gradient(dy: FloatTensor<Self>, weight: BlockMatrix) -> FloatTensor<Self> {
        let dy = dy.to_contiguous();
        let shape = [shape2(&dy)[0], weight.dims()[1]];
        if dy.dtype() == DType::BF16 {
            let dx = input_gradient_half(elements(&dy), shape, &weight);
            let dx: Vec<bf16> = dx.into_iter().map(bf16::from_f32).collect();
            return matrix(dx, shape);
        }
        matrix(input_gradient(elements(&dy), shape, &weight), shape)
    }
}

/// Computes x·Wᵀ into `y` `[n, out]`.
fn forward(x: &[f32], y: &mut [MaybeUninit<f32>], [n, outputs]: [usize; 2], weight: &BlockMatrix) {
    let [_, inputs] = weight.dims();
    let left = Matrix::new(x, n, inputs);
    let start: *mut f32 = y.as_mut_ptr().cast();
    for rows in weight.chunks() {
        let mut values = ScratchBuffer::new(rows.len() * inputs);
        weight.rows_into(&rows, &mut values, |number| number);
        let right = Matrix::new(&values, rows.len(), inputs).transposed();
        // SAFETY: the columns `rows` of each row of the product are within `y`, which nothing else accesses.
        unsafe {
            let out = start.add(rows.start);
            gemm_at(out, outputs, left, right, false, Threads::All);
        }
    }
}

/// Computes ∂L/∂y·W, `[n, in]`.
fn input_gradient(dy: &[f32], [n, inputs]: [usize; 2], weight: &BlockMatrix) -> Vec<f32> {
    let [outputs, _] = weight.dims();
    let mut dx = vec![0.0; n * inputs];
    for rows in weight.chunks() {
        let mut values = ScratchBuffer::new(rows.len() * inputs);
        weight.rows_into(&rows, &mut values, |number| number);
        let left = columns(dy, n, outputs, &rows);
        let right = Matrix::new(&values, rows.len(), inputs);
        gemm(&mut dx, inputs, left, right, true, Threads::All);
    }
    dx
}

/// Computes x·Wᵀ in bf16, `[n, out]`.
fn forward_half(x: &[bf16], [n, outputs]: [usize; 2], weight: &BlockMatrix) -> Vec<bf16> {
    let [_, inputs] = weight.dims();
    let left = Matrix::new(x, n, inputs);
    let mut y = vec![bf16::ZERO; n * outputs];
    let mut values = Vec::new();
    let mut part = Vec::new();
    for rows in weight.chunks() {
        values.resize(rows.len() * inputs, bf16::ZERO);
        weight.rows_into(&rows, &mut values, bf16::from_f32);
        part.resize(n * rows.len(), bf16::ZERO);
        let right = Matrix::new(&values, rows.len(), inputs).transposed();
        half::product_into(&mut part, left, right);
        let parts = part.chunks_exact(rows.len());
        for (y, part) in y.chunks_exact_mut(outputs).zip(parts) {
            y[rows.clone()].copy_from_slice(part);
        }
    }
    y
}

/// Computes ∂L/∂y·W of operands in bf16, in f32: `[n, in]`.
fn input_gradient_half(dy: &[bf16], [n, inputs]: [usize; 2], weight: &BlockMatrix) -> Vec<f32> {
    let [outputs, _] = weight.dims();
    let mut dx = vec![0.0; n * inputs];
    let mut values = Vec::new();
    for rows in weight.chunks() {
        values.resize(rows.len() * inputs, bf16::ZERO);
        weight.rows_into(&rows, &mut values, bf16::from_f32);
        let left = columns(dy, n, outputs, &rows);
        let right = Matrix::new(&values, rows.len(), inputs);
        half::add_product(&mut dx, left, right);
    }
    dx
}

/// Views some columns of a matrix of `n` rows and `stride` columns.
fn columns<'a, E>(data: &'a [E], n: usize, stride: usize, columns: &Range<usize>) -> Matrix<'a, E> {
    // A matrix without rows has no first column.
    let data = data.get(columns.start..).unwrap_or_default();
    Matrix::strided(data, n, columns.len(), stride)
}

#[cfg(test)]
mod tests;
