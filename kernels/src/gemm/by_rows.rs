//! x·Wᵀ with W read as it lies, once, and nothing of it packed: rows of x by rows of W.
//!
//! For up to four rows of x the time is that of reading W; eight rows of it are turned around in
//! registers as they come. For more, x is packed and W's rows are the rows of the tile. The chains over k
//! are those of [`gemm`](super::gemm), bit for bit.

use std::mem::MaybeUninit;

use pulp::{Simd, WithSimd};

use super::pack::{self, Panels, pack};
use super::tile::{LARGEST, Tile, whole};
use super::{Matrix, Shared, WORTH_SHARING, for_each};
use crate::simd::vectorize;

/// Rows of W that one task reads, and panels of x that it takes them to in turn: both stay in the
/// second-level cache.
const TASK_ROWS: usize = 48;
const TASK_PANELS: usize = 8;

/// A weight `[out, in]` and what x·Wᵀ is written to, `[n, out]`.
pub(crate) struct Output<'a> {
    pub(crate) weight: Matrix<'a>,
    pub(crate) out: &'a mut [MaybeUninit<f32>],
}

/// Products of one x `[n, in]` with several weights, whose rows lie behind one another as those of x do;
/// x is packed once, and threads are woken once. All of each output is written.
pub(crate) fn rows_by_rows<const N: usize>(x: Matrix<'_>, outputs: [Output<'_>; N]) {
    assert!(x.column_stride == 1);
    x.check();
    for Output { weight, out } in &outputs {
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
    } else if x.rows > 0 {
        vectorize(ByRows { x, outputs });
    }
}

struct ByRows<'a, const N: usize> {
    x: Matrix<'a>,
    outputs: [Output<'a>; N],
}

impl<const N: usize> WithSimd for ByRows<'_, N> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, outputs } = self;
        let all_rows: usize = outputs.iter().map(|output| output.weight.rows).sum();
        let threads = if x.rows * x.columns * all_rows >= WORTH_SHARING {
            rayon::current_num_threads()
        } else {
            1
        };
        // Tasks are numbered through, weight by weight.
        let mut tasks = 0;
        let places = outputs.map(|Output { weight, out }| {
            let first = tasks;
            tasks += weight.rows.div_ceil(TASK_ROWS);
            (first, weight, Shared::new(out))
        });
        let place = |task: usize| {
            let (first, weight, out) = places[places.partition_point(|p| p.0 <= task) - 1];
            let start = (task - first) * TASK_ROWS;
            (weight, out, start..weight.rows.min(start + TASK_ROWS))
        };
        #[cfg(target_arch = "x86_64")]
        if x.rows <= super::turned::MOST_ROWS
            && let Some(simd) = pulp::x86::V3::try_new()
        {
            for_each(tasks, threads, |task| {
                let (weight, out, rows) = place(task);
                super::turned::rows(simd, out, x, weight, rows);
            });
            return;
        }
        let vectors = if x.rows <= S::F32_LANES { 1 } else { 2 };
        let mut packed = pack::buffer();
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
        for_each(tasks, threads, |task| {
            let (weight, out, rows) = place(task);
            simd.vectorize(Task {
                out,
                panels,
                weight,
                rows,
            });
        });
        pack::give_back(packed);
    }
}

struct Task<'a> {
    out: Shared,
    panels: Panels<'a>,
    weight: Matrix<'a>,
    rows: std::ops::Range<usize>,
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if self.panels.width == S::F32_LANES {
            self.tiles::<S, 8, 1>(simd);
        } else {
            self.tiles::<S, 6, 2>(simd);
        }
    }
}

impl Task<'_> {
    /// Tiles of `ROWS` rows of W by a panel of x; they are written to `out` turned around.
    #[inline(always)]
    fn tiles<S: Simd, const ROWS: usize, const VECTORS: usize>(&self, simd: S) {
        let Self { panels, weight, .. } = self;
        let width = VECTORS * S::F32_LANES;
        for first in (0..panels.count()).step_by(TASK_PANELS) {
            for row in self.rows.clone().step_by(ROWS) {
                let rows = ROWS.min(self.rows.end - row);
                for panel in first..panels.count().min(first + TASK_PANELS) {
                    let mut turned = [0f32; LARGEST];
                    let place = Tile {
                        k: weight.columns,
                        a: weight.data[row * weight.row_stride..].as_ptr(),
                        a_row: weight.row_stride,
                        a_step: 1,
                        b: panels.panel(panel),
                        c: turned.as_mut_ptr(),
                        stride: width,
                        rows,
                        columns: width,
                        add: false,
                    };
                    // SAFETY: W has the rows, the panel the steps, and `turned` room for a whole tile.
                    unsafe { exact::<S, ROWS, VECTORS>(simd, place) };
                    for column in 0..panels.width_of(panel) {
                        let to = (panel * width + column) * weight.rows + row;
                        for row in 0..rows {
                            // SAFETY: within `[n, out]`; no other task writes these columns.
                            unsafe { *self.out.at(to + row) = turned[row * width + column] };
                        }
                    }
                }
            }
        }
    }
}

/// A tile that reads no row of A but its own: what lies behind W's last row is not ours.
///
/// # Safety
/// As for [`whole`], with as many rows of A as the tile has of its own.
#[inline(always)]
unsafe fn exact<S: Simd, const ROWS: usize, const VECTORS: usize>(simd: S, tile: Tile) {
    if tile.rows == ROWS {
        // SAFETY: as the caller says.
        unsafe { whole::<S, ROWS, VECTORS>(simd, &tile) };
        return;
    }
    for row in 0..tile.rows {
        let one = Tile {
            a: tile.a.wrapping_add(row * tile.a_row),
            c: tile.c.wrapping_add(row * tile.stride),
            ..tile
        };
        // SAFETY: as the caller says.
        unsafe { whole::<S, 1, VECTORS>(simd, &one) };
    }
}
