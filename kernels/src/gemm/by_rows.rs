//! x·Wᵀ with W read once in its stored layout, without packing it: dot products of rows of x and rows of W.
//!
//! For up to four rows of x, reading W takes most of the time, and `few_rows` transposes eight rows of W at a time
//! in registers. For more rows, x is packed, and rows of W are the rows of the tile. Each element is the same
//! chain over k as in [`gemm`](super::gemm), bit for bit. Many rows times a short k are computed there.

use std::mem::MaybeUninit;

use pulp::{Simd, WithSimd};

use super::pack::{self, PackedPanels, pack};
use super::tile::{MAX_TILE, Tile, whole_tile};
use super::{MIN_PARALLEL_WORK, Matrix, SharedOutput, Threads, gemm_at, run_tasks};
use crate::simd::vectorize;

/// Rows of W per task: together with [`TASK_PANELS`] small enough for the second-level cache.
const TASK_ROWS: usize = 48;
/// Panels of x that a task multiplies by its rows of W before it goes on to the next panels.
const TASK_PANELS: usize = 8;

/// Rows of x from which a short chain over k is computed from a packed W: the cost of a tile that is written
/// transposed does not depend on k, and packing W is cheap for so many rows.
const MIN_PACKED_ROWS: usize = 64;
/// Longest chain over k that is computed from a packed W.
const MAX_PACKED_DEPTH: usize = 256;

/// A weight `[out, in]` and the memory `[n, out]` that x·Wᵀ is written to.
pub(crate) struct WeightOutput<'a> {
    pub(crate) weight: Matrix<'a>,
    pub(crate) out: &'a mut [MaybeUninit<f32>],
}

/// Computes the products of one x `[n, in]` with several weights. x is packed once, and threads are woken once.
/// All of each output is written. The columns of x and of the weights must be contiguous.
pub(crate) fn multiply_by_weights<const N: usize>(x: Matrix<'_>, outputs: [WeightOutput<'_>; N]) {
    assert!(x.column_stride == 1);
    x.check();
    for WeightOutput { weight, out } in &outputs {
        assert_eq!(
            x.columns, weight.columns,
            "{x:?} times the transpose of {weight:?}"
        );
        assert!(weight.column_stride == 1);
        assert_eq!(out.len(), x.rows * weight.rows);
        weight.check();
    }
    if x.columns == 0 {
        for output in outputs {
            output.out.fill(MaybeUninit::new(0.0));
        }
    } else if x.rows >= MIN_PACKED_ROWS && x.columns <= MAX_PACKED_DEPTH {
        for WeightOutput { weight, out } in outputs {
            let out = out.as_mut_ptr().cast();
            // SAFETY: the output is borrowed exclusively and has as many elements as the product.
            unsafe {
                gemm_at(
                    out,
                    weight.rows,
                    x,
                    weight.transposed(),
                    false,
                    Threads::All,
                )
            };
        }
    } else if x.rows > 0 {
        let outputs = outputs.map(|WeightOutput { weight, out }| (weight, SharedOutput::new(out)));
        vectorize(ByRows {
            x,
            outputs,
            threads: Threads::All,
        });
    }
}

/// Computes `out` `[n, out]` = x·Wᵀ on this thread. The columns of x and of W must be contiguous.
pub(crate) fn multiply_by_rows(out: &mut [f32], x: Matrix<'_>, weight: Matrix<'_>) {
    assert!(x.columns == weight.columns && x.column_stride == 1 && weight.column_stride == 1);
    assert_eq!(out.len(), x.rows * weight.rows);
    x.check();
    weight.check();
    if x.columns == 0 {
        out.fill(0.0);
    } else if x.rows > 0 {
        vectorize(ByRows {
            x,
            outputs: [(weight, SharedOutput(out.as_mut_ptr()))],
            threads: Threads::One,
        });
    }
}

struct ByRows<'a, const N: usize> {
    x: Matrix<'a>,
    /// Each weight `[out, in]` and the memory `[n, out]` of its product.
    outputs: [(Matrix<'a>, SharedOutput); N],
    threads: Threads,
}

impl<const N: usize> WithSimd for ByRows<'_, N> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            x,
            outputs,
            threads,
        } = self;
        let all_rows: usize = outputs.iter().map(|(weight, _)| weight.rows).sum();
        let threads = match threads {
            Threads::All if x.rows * x.columns * all_rows >= MIN_PARALLEL_WORK => {
                rayon::current_num_threads()
            }
            _ => 1,
        };
        // The tasks of all weights are numbered consecutively, weight by weight.
        let mut tasks = 0;
        let weights = outputs.map(|(weight, out)| {
            let first = tasks;
            tasks += weight.rows.div_ceil(TASK_ROWS);
            (first, weight, out)
        });
        let task_rows = |task: usize| {
            let (first, weight, out) = weights[weights.partition_point(|w| w.0 <= task) - 1];
            let start = (task - first) * TASK_ROWS;
            (weight, out, start..weight.rows.min(start + TASK_ROWS))
        };
        #[cfg(target_arch = "x86_64")]
        if x.rows <= super::few_rows::MAX_ROWS
            && let Some(simd) = pulp::x86::V3::try_new()
        {
            run_tasks(tasks, threads, |task| {
                let (weight, out, rows) = task_rows(task);
                super::few_rows::multiply_rows(simd, out, x, weight, rows);
            });
            return;
        }
        let vectors = if x.rows <= S::F32_LANES { 1 } else { 2 };
        let mut packed = pack::take_buffer();
        let (first, depth) = ((0, x.rows), (0, x.columns));
        let panels = pack(
            simd,
            &mut packed,
            vectors * S::F32_LANES,
            x,
            first,
            depth,
            threads,
        );
        run_tasks(tasks, threads, |task| {
            let (weight, out, rows) = task_rows(task);
            simd.vectorize(WeightRowsTask {
                out,
                panels,
                weight,
                rows,
            });
        });
        pack::give_back(packed);
    }
}

/// A task that multiplies all panels of x by some rows of a weight.
struct WeightRowsTask<'a> {
    out: SharedOutput,
    panels: PackedPanels<'a>,
    weight: Matrix<'a>,
    rows: std::ops::Range<usize>,
}

impl WithSimd for WeightRowsTask<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if self.panels.width == S::F32_LANES {
            self.multiply_tiles::<S, 8, 1>(simd);
        } else {
            self.multiply_tiles::<S, 6, 2>(simd);
        }
    }
}

impl WeightRowsTask<'_> {
    /// Multiplies tiles of `ROWS` rows of W by a panel of x, and writes them transposed to `out`.
    #[inline(always)]
    fn multiply_tiles<S: Simd, const ROWS: usize, const VECTORS: usize>(&self, simd: S) {
        let Self { panels, weight, .. } = self;
        let width = VECTORS * S::F32_LANES;
        for first in (0..panels.count()).step_by(TASK_PANELS) {
            for row in self.rows.clone().step_by(ROWS) {
                let rows = ROWS.min(self.rows.end - row);
                for panel in first..panels.count().min(first + TASK_PANELS) {
                    let mut transposed = [MaybeUninit::<f32>::uninit(); MAX_TILE];
                    let tile = Tile {
                        k: weight.columns,
                        a: weight.data[row * weight.row_stride..].as_ptr(),
                        a_row: weight.row_stride,
                        a_step: 1,
                        b: panels.panel(panel),
                        c: transposed.as_mut_ptr().cast(),
                        stride: width,
                        rows,
                        columns: width,
                        add: false,
                    };
                    // SAFETY: W has the rows, the panel has the steps, and `transposed` has room for a whole tile.
                    unsafe { rows_of_tile::<S, ROWS, VECTORS>(simd, tile) };
                    for column in 0..panels.rows_of(panel) {
                        let to = (panel * width + column) * weight.rows + row;
                        for row in 0..rows {
                            let sum = transposed[row * width + column];
                            // SAFETY: the element is within `[n, out]`, no other task writes these columns, and the tile
                            // has written its first `rows` rows.
                            unsafe { *self.out.at(to + row) = sum.assume_init() };
                        }
                    }
                }
            }
        }
    }
}

/// Computes a tile that reads `tile.rows` rows of A and no more, because W ends after its last row.
///
/// # Safety
/// The conditions of [`whole_tile`] must hold, but A needs only `tile.rows` rows.
#[inline(always)]
unsafe fn rows_of_tile<S: Simd, const ROWS: usize, const VECTORS: usize>(simd: S, tile: Tile) {
    if tile.rows == ROWS {
        // SAFETY: the caller guarantees the operands, and A has all rows of a tile.
        unsafe { whole_tile::<S, ROWS, VECTORS>(simd, &tile) };
        return;
    }
    for row in 0..tile.rows {
        let one = Tile {
            a: tile.a.wrapping_add(row * tile.a_row),
            c: tile.c.wrapping_add(row * tile.stride),
            ..tile
        };
        // SAFETY: the caller guarantees the operands, and the row is one of `tile.rows`.
        unsafe { whole_tile::<S, 1, VECTORS>(simd, &one) };
    }
}
