//! Products of f32 matrices: what linear layers and attention are made of.
//!
//! C = A·B, or C += A·B. Every element of C is one chain of fused multiply-adds over k, from the first
//! to the last, whatever the sizes of the matrices, the place of the element, the number of threads or
//! the path taken. So the row of a product does not depend, bit for bit, on the rows beside it.
//!
//! Panels of A and B are packed as the tile reads them, `[k][6]` and `[k][16]` with vectors of eight,
//! A only where its rows do not lie along k; a tile of C stays in registers while it walks over
//! [`DEPTH`] of k (Goto and van de Geijn 2008).
//! Traffic: A is packed once a block of [`BLOCK`] rows, B once for each of these blocks.

// Tiles read and write through pointers: a bounds check a number would cost more than the product.
#![allow(unsafe_code)]

mod by_rows;
pub(crate) mod half;
mod pack;
mod tile;
#[cfg(target_arch = "x86_64")]
mod turned;

use std::mem::MaybeUninit;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

pub(crate) use by_rows::{Output, rows_by_rows};
pub(crate) use pack::Scratch;
use pack::{Panels, pack, pack_rows};
use tile::{Tile, tile};

use crate::simd::vectorize;

/// Elements of k that a tile walks over before the next tile: a panel of B of that depth stays in the
/// first-level cache.
const DEPTH: usize = 256;
/// The most rows of A, and the most of k, that are packed at once.
const BLOCK: usize = 2048;
/// Bytes of B that are packed at once.
const PACKED_BYTES: usize = 4 << 20;
/// Rows and columns of C that one task computes: its panels stay in the second-level cache.
const TASK_ROWS: usize = 96;
const TASK_COLUMNS: usize = 192;
/// Multiply-adds under which waking other threads costs more than they give.
const WORTH_SHARING: usize = 1 << 18;

/// A matrix in memory: element (i, j) is `data[i · row_stride + j · column_stride]`.
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
    /// Rows behind one another, `stride` numbers apart.
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

    /// The pointers below rest on this.
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

/// A place in memory that tasks write to, each to numbers of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared<E = f32>(pub(crate) *mut E);

impl Shared {
    pub(crate) fn new(numbers: &mut [MaybeUninit<f32>]) -> Self {
        Self(numbers.as_mut_ptr().cast())
    }
}

impl<E> Shared<E> {
    pub(crate) fn at(self, offset: usize) -> *mut E {
        self.0.wrapping_add(offset)
    }
}

// SAFETY: whoever writes through it vouches that no two tasks write to the same number.
unsafe impl<E> Send for Shared<E> {}
// SAFETY: as above.
unsafe impl<E> Sync for Shared<E> {}

/// `out` = A·B, or += where `add`; row i of C is `out[i · stride..][..n]`.
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
    // SAFETY: the output is ours and large enough.
    unsafe { gemm_at(out.as_mut_ptr(), stride, a, b, add, threads) };
}

/// [`gemm`] into a place of which others may write what lies between its rows.
///
/// # Safety
/// The product's numbers at `out`, rows `stride` apart, must be allocated and no one else's meanwhile;
/// they need not be set unless `add`.
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
            // SAFETY: as the caller says; zeros are a number.
            unsafe { out.add(row * stride).write_bytes(0, n) };
        }
        return;
    }
    a.check();
    b.check();
    let threads = match threads {
        Threads::All if m * n * k >= WORTH_SHARING => rayon::current_num_threads(),
        _ => 1,
    };
    vectorize(Product {
        out: Shared(out),
        stride,
        a,
        b,
        add,
        threads,
    });
}

struct Product<'a> {
    out: Shared,
    stride: usize,
    a: Matrix<'a>,
    b: Matrix<'a>,
    add: bool,
    threads: usize,
}

impl WithSimd for Product<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        // Twelve rows need 24 registers for the tile.
        if S::REGISTER_COUNT >= 32 && S::F32_LANES >= 16 {
            self.blocks::<S, 12>(simd);
        } else {
            self.blocks::<S, 6>(simd);
        }
    }
}

impl Product<'_> {
    /// Walks over blocks of rows of A and of k, and packs both operands of each.
    fn blocks<S: Simd, const ROWS: usize>(self, simd: S) {
        let Self { a, b, threads, .. } = self;
        let columns = 2 * S::F32_LANES;
        let mut packed_a = pack::buffer();
        let mut packed_b = pack::buffer();
        for row in (0..a.rows).step_by(BLOCK) {
            let rows = BLOCK.min(a.rows - row);
            for depth in (0..a.columns).step_by(BLOCK) {
                let k = BLOCK.min(a.columns - depth);
                let panels_a = pack_rows(
                    simd,
                    &mut packed_a,
                    ROWS,
                    a,
                    (row, rows),
                    (depth, k),
                    threads,
                );
                // Blocks of equal width, as many as keep B within its bytes.
                let room = (PACKED_BYTES / size_of::<f32>() / k).max(columns);
                let width = b
                    .columns
                    .div_ceil(b.columns.div_ceil(room))
                    .next_multiple_of(columns);
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
                    let part = Part {
                        a: panels_a,
                        b: panels_b,
                        out: Shared(self.out.at(row * self.stride + column)),
                        stride: self.stride,
                        add: self.add || depth > 0,
                    };
                    part.tasks::<S, ROWS>(simd, threads);
                }
            }
        }
        pack::give_back(packed_a);
        pack::give_back(packed_b);
    }
}

/// A block of C and the packed panels that it is computed from.
struct Part<'a> {
    a: Panels<'a>,
    b: Panels<'a>,
    out: Shared,
    stride: usize,
    add: bool,
}

impl Part<'_> {
    fn tasks<S: Simd, const ROWS: usize>(&self, simd: S, threads: usize) {
        let high = (TASK_ROWS / ROWS).max(1);
        let wide = (TASK_COLUMNS / self.b.width).max(1);
        let down = self.a.count().div_ceil(high);
        let tasks = down * self.b.count().div_ceil(wide);
        let run = |task: usize| {
            let (first_a, first_b) = (task % down * high, task / down * wide);
            let last_a = self.a.count().min(first_a + high);
            let last_b = self.b.count().min(first_b + wide);
            simd.vectorize(Task::<ROWS> {
                part: self,
                a: first_a..last_a,
                b: first_b..last_b,
            });
        };
        for_each(tasks, threads, run);
    }
}

/// Panels of A times panels of B.
struct Task<'a, const ROWS: usize> {
    part: &'a Part<'a>,
    a: std::ops::Range<usize>,
    b: std::ops::Range<usize>,
}

impl<const ROWS: usize> WithSimd for Task<'_, ROWS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Part {
            a,
            b,
            out,
            stride,
            add,
        } = *self.part;
        for depth in (0..a.k).step_by(DEPTH) {
            let k = DEPTH.min(a.k - depth);
            for column in self.b.clone() {
                for row in self.a.clone() {
                    let (a_from, a_row, a_step) = a.rows_at(row, depth);
                    // SAFETY: the panels hold `k` steps from `depth` on, and the tile's rows and columns
                    // lie within C, where no other task writes.
                    unsafe {
                        tile::<S, ROWS, 2>(
                            simd,
                            Tile {
                                k,
                                a: a_from,
                                a_row,
                                a_step,
                                b: b.panel(column).add(depth * b.width),
                                c: out.at(row * ROWS * stride + column * b.width),
                                stride,
                                rows: a.width_of(row),
                                columns: b.width_of(column),
                                add: add || depth > 0,
                            },
                        );
                    }
                }
            }
        }
    }
}

/// Runs tasks on the pool's threads, or one after another.
pub(crate) fn for_each(tasks: usize, threads: usize, run: impl Fn(usize) + Send + Sync) {
    if threads > 1 && tasks > 1 {
        (0..tasks).into_par_iter().with_max_len(1).for_each(run);
    } else {
        (0..tasks).for_each(run);
    }
}

#[cfg(test)]
mod tests;
