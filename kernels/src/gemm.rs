//! Matrix products in f32 for linear layers and attention: C = A·B, or C += A·B.
//!
//! Every element of C is one chain of fused multiply-adds over k, from the first step to the last, whatever the
//! sizes of the matrices, the position of the element, the number of threads or the code path. So a row of a
//! product does not depend on the other rows, bit for bit.
//!
//! - This file walks over blocks of A, B and C and divides them into tasks (Goto and van de Geijn 2008).
//! - `pack` copies operands into panels in the order in which a tile reads them: `[k][6]` of A and `[k][16]` of B
//!   with vectors of eight. A panel of A whose rows are contiguous along k is read in place.
//! - `tile` computes a tile of C in registers, over [`DEPTH`] steps of k at a time.
//! - `by_rows` computes x·Wᵀ without packing W, and `few_rows` does so for one to four rows of x on AVX2.
//! - `half` computes products of bf16 matrices.
//!
//! Traffic: A is packed once, in blocks of [`BLOCK`] rows, and B once for each of these blocks.

// Tiles read and write through pointers: a bounds check for each number would cost more than the product.
#![allow(unsafe_code)]

mod by_rows;
#[cfg(target_arch = "x86_64")]
mod few_rows;
pub(crate) mod half;
mod pack;
mod tile;

use std::mem::MaybeUninit;

use pulp::{Simd, WithSimd};

pub(crate) use by_rows::{WeightOutput, multiply_by_rows, multiply_by_weights};
pub(crate) use pack::ScratchBuffer;
use pack::{PackedPanels, pack, pack_or_borrow};
use tile::{Tile, tile};

use crate::simd::vectorize;
pub(crate) use crate::team::run_tasks;

/// Steps of k that one call of a tile covers: a panel of B of this depth stays in the first-level cache.
const DEPTH: usize = 256;
/// Largest number of rows of A, and of steps of k, that are packed at once.
const BLOCK: usize = 2048;
/// Largest number of bytes of B that are packed at once.
const PACKED_BYTES: usize = 4 << 20;
/// Rows of C per task: together with [`TASK_COLUMNS`] small enough for the second-level cache.
const TASK_ROWS: usize = 96;
/// Columns of C per task.
const TASK_COLUMNS: usize = 192;
/// Multiply-adds below which one thread is faster than waking others.
const MIN_PARALLEL_WORK: usize = 1 << 18;

/// A strided view of a matrix: element (i, j) is `data[i · row_stride + j · column_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, E = f32> {
    pub(crate) data: &'a [E],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

impl<E> std::fmt::Debug for Matrix<'_, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}]", self.rows, self.columns)
    }
}

impl<'a, E> Matrix<'a, E> {
    /// A view of rows that start `stride` numbers apart.
    pub(crate) fn strided(data: &'a [E], rows: usize, columns: usize, stride: usize) -> Self {
        let matrix = Self {
            data,
            rows,
            columns,
            row_stride: stride,
            column_stride: 1,
        };
        matrix.check();
        matrix
    }

    pub(crate) fn new(data: &'a [E], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    pub(crate) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Asserts that all elements are within `data`, which the code that reads through pointers relies on.
    fn check(&self) {
        if self.rows > 0 && self.columns > 0 {
            let last = (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride;
            assert!(last < self.data.len(), "a matrix reaches past its data");
        }
    }
}

/// Whether a product may use the other threads of the pool.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Threads {
    All,
    One,
}

/// A pointer to an output that several tasks write to, each to its own elements.
#[derive(Clone, Copy)]
pub(crate) struct SharedOutput<E = f32>(pub(crate) *mut E);

impl SharedOutput {
    pub(crate) fn new(numbers: &mut [MaybeUninit<f32>]) -> Self {
        Self(numbers.as_mut_ptr().cast())
    }
}

impl<E> SharedOutput<E> {
    pub(crate) fn at(self, offset: usize) -> *mut E {
        self.0.wrapping_add(offset)
    }
}

// SAFETY: the pointer can be dereferenced in unsafe code only, which guarantees that no two tasks access the same element
// and that the output outlives the tasks. Elements are written from other threads, so they must be `Send`.
unsafe impl<E: Send> Send for SharedOutput<E> {}
// SAFETY: a shared reference gives a copy of the pointer, for which the same holds.
unsafe impl<E: Send> Sync for SharedOutput<E> {}

/// Computes `out` = A·B, or `out` += A·B if `add`; row i of C is `out[i · stride..][..n]`.
pub(crate) fn gemm(
    out: &mut [f32],
    stride: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    add: bool,
    threads: Threads,
) {
    let (m, n) = (a.rows, b.columns);
    assert!(
        m == 0 || n == 0 || (m - 1) * stride + n <= out.len(),
        "a product reaches past its output"
    );
    // SAFETY: the output is borrowed exclusively and large enough.
    unsafe { gemm_at(out.as_mut_ptr(), stride, a, b, add, threads) };
}

/// Computes [`gemm`] through a pointer, so that other tasks may write the columns between its rows at the same
/// time.
///
/// # Safety
/// The elements of C, in rows that start `stride` apart at `out`, must be allocated, and no other task may access
/// them during the call. They must be initialised if `add`.
pub(crate) unsafe fn gemm_at(
    out: *mut f32,
    stride: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    add: bool,
    threads: Threads,
) {
    assert_eq!(a.columns, b.rows, "a product of {a:?} and {b:?}");
    let (m, n, k) = (a.rows, b.columns, a.columns);
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        for row in 0..if add { 0 } else { m } {
            // SAFETY: the caller guarantees that the row is allocated; all bits zero are the number 0.
            unsafe { out.add(row * stride).write_bytes(0, n) };
        }
        return;
    }
    a.check();
    b.check();
    let threads = match threads {
        Threads::All if m * n * k >= MIN_PARALLEL_WORK => rayon::current_num_threads(),
        _ => 1,
    };
    vectorize(F32Product {
        out: SharedOutput(out),
        stride,
        a,
        b,
        add,
        threads,
    });
}

struct F32Product<'a> {
    out: SharedOutput,
    stride: usize,
    a: Matrix<'a>,
    b: Matrix<'a>,
    add: bool,
    threads: usize,
}

impl WithSimd for F32Product<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        // A tile of twelve rows needs 24 registers for its sums.
        if S::REGISTER_COUNT >= 32 && S::F32_LANES >= 16 {
            self.multiply_blocks::<S, 12>(simd);
        } else {
            self.multiply_blocks::<S, 6>(simd);
        }
    }
}

impl F32Product<'_> {
    /// Walks over blocks of rows of A, of k, and of columns of B, and packs both operands of each.
    fn multiply_blocks<S: Simd, const ROWS: usize>(self, simd: S) {
        let Self { a, b, threads, .. } = self;
        let columns = 2 * S::F32_LANES;
        let mut packed_a = pack::take_buffer();
        let mut packed_b = pack::take_buffer();
        for row in (0..a.rows).step_by(BLOCK) {
            let rows = BLOCK.min(a.rows - row);
            for depth in (0..a.columns).step_by(BLOCK) {
                let k = BLOCK.min(a.columns - depth);
                let panels_a = pack_or_borrow(
                    simd,
                    &mut packed_a,
                    ROWS,
                    a,
                    (row, rows),
                    (depth, k),
                    threads,
                );
                let max_columns = (PACKED_BYTES / size_of::<f32>() / k).max(columns);
                let width = equal_width(b.columns, max_columns, columns);
                for column in (0..b.columns).step_by(width) {
                    let width = width.min(b.columns - column);
                    let panels_b = pack(
                        simd,
                        &mut packed_b,
                        columns,
                        b.transposed(),
                        (column, width),
                        (depth, k),
                        threads,
                    );
                    let block = OutputBlock {
                        a: panels_a,
                        b: panels_b,
                        out: SharedOutput(self.out.at(row * self.stride + column)),
                        stride: self.stride,
                        add: self.add || depth > 0,
                    };
                    block.run_tasks::<S, ROWS>(simd, threads);
                }
            }
        }
        pack::give_back(packed_a);
        pack::give_back(packed_b);
    }
}

/// Width of the blocks into which `columns` are divided: all equal but the last, as few as possible with at most
/// `max_columns` each, and a multiple of a tile's width.
fn equal_width(columns: usize, max_columns: usize, tile_columns: usize) -> usize {
    columns
        .div_ceil(columns.div_ceil(max_columns))
        .next_multiple_of(tile_columns)
}

/// A block of C and the panels of the operands that it is computed from.
struct OutputBlock<'a> {
    a: PackedPanels<'a>,
    b: PackedPanels<'a>,
    out: SharedOutput,
    stride: usize,
    add: bool,
}

impl OutputBlock<'_> {
    fn run_tasks<S: Simd, const ROWS: usize>(&self, simd: S, threads: usize) {
        let panels_a = (TASK_ROWS / ROWS).max(1);
        let panels_b = (TASK_COLUMNS / self.b.width).max(1);
        let tasks_down = self.a.count().div_ceil(panels_a);
        let tasks = tasks_down * self.b.count().div_ceil(panels_b);
        let run = |task: usize| {
            let (first_a, first_b) = (task % tasks_down * panels_a, task / tasks_down * panels_b);
            let last_a = self.a.count().min(first_a + panels_a);
            let last_b = self.b.count().min(first_b + panels_b);
            simd.vectorize(BlockTask::<ROWS> {
                block: self,
                a: first_a..last_a,
                b: first_b..last_b,
            });
        };
        run_tasks(tasks, threads, run);
    }
}

/// A task that multiplies some panels of A by some panels of B.
struct BlockTask<'a, const ROWS: usize> {
    block: &'a OutputBlock<'a>,
    a: std::ops::Range<usize>,
    b: std::ops::Range<usize>,
}

impl<const ROWS: usize> WithSimd for BlockTask<'_, ROWS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let OutputBlock {
            a,
            b,
            out,
            stride,
            add,
        } = *self.block;
        for depth in (0..a.steps).step_by(DEPTH) {
            let k = DEPTH.min(a.steps - depth);
            for column in self.b.clone() {
                for row in self.a.clone() {
                    let (a_start, a_row, a_step) = a.rows_at(row, depth);
                    // SAFETY: the panels hold `k` steps from `depth` on, and the tile's rows and columns are
                    // within C, where no other task writes.
                    unsafe {
                        tile::<S, ROWS, 2>(
                            simd,
                            Tile {
                                k,
                                a: a_start,
                                a_row,
                                a_step,
                                b: b.panel(column).add(depth * b.width),
                                c: out.at(row * ROWS * stride + column * b.width),
                                stride,
                                rows: a.rows_of(row),
                                columns: b.rows_of(column),
                                add: add || depth > 0,
                            },
                        );
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
