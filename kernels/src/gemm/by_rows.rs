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

/// `out` `[n, out]` = `x` `[n, in]` · `weight` `[out, in]`ᵀ; both have their rows behind one another. All
/// of `out` is written.
pub(crate) fn rows_by_rows(out: &mut [MaybeUninit<f32>], x: Matrix<'_>, weight: Matrix<'_>) {
    assert_eq!(
        x.columns, weight.columns,
        "{x:?} times the transpose of {weight:?}"
    );
    assert!(x.column_stride == 1 && weight.column_stride == 1);
    assert_eq!(out.len(), x.rows * weight.rows);
    x.check();
    weight.check();
    if x.columns == 0 {
        out.fill(MaybeUninit::new(0.0));
    } else if !out.is_empty() {
        vectorize(ByRows { out, x, weight });
    }
}

struct ByRows<'a> {
    out: &'a mut [MaybeUninit<f32>],
    x: Matrix<'a>,
    weight: Matrix<'a>,
}

impl WithSimd for ByRows<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { out, x, weight } = self;
        let work = x.rows * x.columns * weight.rows;
        let threads = if work >= WORTH_SHARING {
            rayon::current_num_threads()
        } else {
            1
        };
        let out = Shared::new(out);
        let tasks = weight.rows.div_ceil(TASK_ROWS);
        let rows = |task: usize| task * TASK_ROWS..weight.rows.min((task + 1) * TASK_ROWS);
        #[cfg(target_arch = "x86_64")]
        if x.rows <= super::turned::MOST_ROWS
            && let Some(simd) = pulp::x86::V3::try_new()
        {
            for_each(tasks, threads, |task| {
                super::turned::rows(simd, out, x, weight, rows(task));
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
            simd.vectorize(Task {
                out,
                panels,
                weight,
                rows: rows(task),
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
