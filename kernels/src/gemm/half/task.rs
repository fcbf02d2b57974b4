//! Tasks of a bf16 product: each computes a part of C in f32 from packed panels and rounds it once.

use std::mem::MaybeUninit;

use burn::tensor::bf16;

use super::super::pack::{PackedPanels, give_back, grow, take_buffer};
use super::super::tile::Tile;
use super::super::{DEPTH, Matrix, SharedOutput, run_tasks};
use super::{HalfKernel, VectorJob, pack};
use crate::float::StoredFloat;

/// A block of C and the operands for it over a block of k.
pub(super) struct HalfOutputBlock<'a, E> {
    pub(super) a: PackedPanels<'a>,
    /// Panels of B; without data if tasks pack B themselves.
    pub(super) b: PackedPanels<'a>,
    /// B as stored, if tasks pack it themselves.
    pub(super) unpacked_b: Option<UnpackedB<'a>>,
    pub(super) out: SharedOutput<E>,
    pub(super) stride: usize,
    pub(super) add: bool,
    /// Whether this is the first block of k.
    pub(super) is_first: bool,
    /// Whether this is the last block of k, after which the sums are rounded and written.
    pub(super) is_last: bool,
    /// Panels of A and of B per task.
    pub(super) task_panels: (usize, usize),
}

/// The part of B that belongs to a block.
#[derive(Clone, Copy)]
pub(super) struct UnpackedB<'a> {
    /// B transposed: its columns are rows.
    pub(super) b: Matrix<'a, bf16>,
    /// Columns and steps of k of the block, each as first index and length.
    pub(super) span: ((usize, usize), (usize, usize)),
}

impl<E: StoredFloat<f32>> HalfOutputBlock<'_, E> {
    pub(super) fn run_tasks<K: HalfKernel>(&self, kernel: K, sums: &mut Vec<f32>, threads: usize) {
        let (panels_a, panels_b) = self.task_panels;
        let tasks_down = self.a.count().div_ceil(panels_a);
        let tasks = tasks_down * self.b.count().div_ceil(panels_b);
        let task_sums = panels_a.min(self.a.count()) * K::ROWS * panels_b * K::COLUMNS;
        let is_only_block = self.is_first && self.is_last;
        if !is_only_block {
            grow(sums, tasks * task_sums);
        }
        let sums = SharedOutput(sums.as_mut_ptr());
        run_tasks(tasks, threads, |task| {
            let (first_a, first_b) = (task % tasks_down * panels_a, task / tasks_down * panels_b);
            let mut own = take_buffer();
            let panel_words = K::COLUMNS * DEPTH;
            grow(&mut own, panel_words + task_sums);
            let (own_panel, own_sums) = own.split_at_mut(panel_words);
            kernel.run(HalfTask {
                kernel,
                block: self,
                a: first_a..self.a.count().min(first_a + panels_a),
                b: first_b..self.b.count().min(first_b + panels_b),
                panel: bytemuck::cast_slice_mut(own_panel),
                sums: if is_only_block {
                    own_sums.as_mut_ptr()
                } else {
                    sums.at(task * task_sums)
                },
            });
            give_back(own);
        });
    }
}

/// A task that multiplies some panels of A by some panels of B.
struct HalfTask<'a, K, E> {
    kernel: K,
    block: &'a HalfOutputBlock<'a, E>,
    a: std::ops::Range<usize>,
    b: std::ops::Range<usize>,
    /// Memory for one panel of B, if the task packs B.
    panel: &'a mut [u32],
    /// The task's sums, in rows as wide as the task's panels of B together.
    sums: *mut f32,
}

impl<K: HalfKernel, E: StoredFloat<f32>> VectorJob for HalfTask<'_, K, E> {
    #[inline(always)]
    fn run(self) {
        let Self {
            kernel,
            block,
            sums,
            ..
        } = self;
        let stride = self.b.len() * K::COLUMNS;
        if block.is_first && block.add {
            self.for_each_row(|sums, out| {
                for (sum, out) in sums.iter_mut().zip(out) {
                    // SAFETY: C is initialised if the product is added to it.
                    *sum = unsafe { out.assume_init() }.widen();
                }
            });
        }
        let max_words = DEPTH / K::STEPS;
        for word in (0..block.a.steps).step_by(max_words) {
            let k = max_words.min(block.a.steps - word);
            for (across, column) in self.b.clone().enumerate() {
                let b = match block.unpacked_b {
                    Some(UnpackedB { b, span }) => {
                        let ((first, _), (depth, steps)) = span;
                        let (row, start) = (first + column * K::COLUMNS, word * K::STEPS);
                        let span = (depth + start, (k * K::STEPS).min(steps - start));
                        let filled = block.b.rows_of(column);
                        let panel = &mut self.panel[..k * K::COLUMNS];
                        pack::pack_panel(kernel, panel, K::COLUMNS, b, (row, filled), span);
                        panel.as_ptr().cast()
                    }
                    // SAFETY: the panel holds the words.
                    None => unsafe { block.b.panel(column).add(word * K::COLUMNS) },
                };
                for (down, row) in self.a.clone().enumerate() {
                    // SAFETY: the panels hold `k` words from `word` on, and the sums have room for whole tiles of
                    // all the task's panels.
                    unsafe {
                        kernel.tile(&Tile {
                            k,
                            a: block.a.panel(row).add(word * K::ROWS),
                            a_row: 1,
                            a_step: K::ROWS,
                            b,
                            c: sums.add(down * K::ROWS * stride + across * K::COLUMNS),
                            stride,
                            rows: K::ROWS,
                            columns: K::COLUMNS,
                            add: block.add || !block.is_first || word > 0,
                        });
                    }
                }
            }
        }
        if block.is_last {
            self.for_each_row(|sums, out| {
                for (sum, out) in sums.iter().zip(out) {
                    out.write(E::narrow(*sum));
                }
            });
        }
    }
}

impl<K: HalfKernel, E: StoredFloat<f32>> HalfTask<'_, K, E> {
    /// Calls `visit` with the sums and the elements of C of each row of the task's part of C.
    #[inline(always)]
    fn for_each_row(&self, visit: impl Fn(&mut [f32], &mut [MaybeUninit<E>])) {
        let block = self.block;
        let (first, stride) = (self.b.start * K::COLUMNS, self.b.len() * K::COLUMNS);
        let columns = stride.min(block.b.rows - first);
        let row = self.a.start * K::ROWS;
        let rows = (self.a.len() * K::ROWS).min(block.a.rows - row);
        for down in 0..rows {
            // SAFETY: no other task accesses these sums or these rows and columns of C.
            unsafe {
                visit(
                    std::slice::from_raw_parts_mut(self.sums.add(down * stride), columns),
                    std::slice::from_raw_parts_mut(
                        block.out.at((row + down) * block.stride + first).cast(),
                        columns,
                    ),
                );
            }
        }
    }
}
