//! Tasks: a piece of C in f32, from packed panels to numbers that are rounded once.

use burn::tensor::bf16;

use super::super::tile::Tile;
use super::super::{DEPTH, Matrix, Shared, for_each, pack as wide};
use super::pack::{self, Panels};
use super::{Arm, Job};

/// A block of C over a block of k.
pub(super) struct Part<'a> {
    pub(super) a: Panels<'a>,
    pub(super) b: Panels<'a>,
    /// Where tasks pack B: its columns as rows, the first of them, the first step of k and how many.
    pub(super) lone: Option<(Matrix<'a, bf16>, usize, usize, usize)>,
    pub(super) out: Shared<bf16>,
    pub(super) stride: usize,
    pub(super) add: bool,
    /// Whether this is the first block of k, and whether it is the last.
    pub(super) first: bool,
    pub(super) last: bool,
    /// The sums of a task.
    pub(super) region: usize,
}

impl Part<'_> {
    pub(super) fn tasks<A: Arm>(
        &self,
        arm: A,
        (high, wide): (usize, usize),
        sums: &mut Vec<f32>,
        threads: usize,
    ) {
        let down = self.a.count().div_ceil(high);
        let tasks = down * self.b.count().div_ceil(wide);
        let once = self.first && self.last;
        if !once && sums.len() < tasks * self.region {
            sums.resize(tasks * self.region, 0.0);
        }
        let sums = Shared(sums.as_mut_ptr());
        for_each(tasks, threads, |task| {
            let (first_a, first_b) = (task % down * high, task / down * wide);
            let mut own = wide::buffer();
            let panel = A::COLUMNS * DEPTH;
            if own.len() < panel + self.region {
                own.resize(panel + self.region, 0.0);
            }
            let (own_panel, own_sums) = own.split_at_mut(panel);
            arm.run(Task {
                arm,
                part: self,
                a: first_a..self.a.count().min(first_a + high),
                b: first_b..self.b.count().min(first_b + wide),
                panel: bytemuck::cast_slice_mut(own_panel),
                sums: if once {
                    own_sums.as_mut_ptr()
                } else {
                    sums.at(task * self.region)
                },
            });
            wide::give_back(own);
        });
    }
}

/// Panels of A times panels of B, with sums and a panel of B of the task's own.
struct Task<'a, A> {
    arm: A,
    part: &'a Part<'a>,
    a: std::ops::Range<usize>,
    b: std::ops::Range<usize>,
    panel: &'a mut [u32],
    /// The region, rows of as many numbers as the task's panels of B are wide.
    sums: *mut f32,
}

impl<A: Arm> Job for Task<'_, A> {
    #[inline(always)]
    fn run(self) {
        let Self {
            arm, part, sums, ..
        } = self;
        let stride = self.b.len() * A::COLUMNS;
        if part.first && part.add {
            self.each_row(|sums, out| {
                for (sum, out) in sums.iter_mut().zip(out) {
                    *sum = f32::from_bits(u32::from(out.to_bits()) << 16);
                }
            });
        }
        let walk = DEPTH / A::STEPS;
        for word in (0..part.a.words).step_by(walk) {
            let k = walk.min(part.a.words - word);
            for (across, column) in self.b.clone().enumerate() {
                let b = match part.lone {
                    Some((b, first, depth, steps)) => {
                        let (row, start) = (first + column * A::COLUMNS, word * A::STEPS);
                        let span = (depth + start, (k * A::STEPS).min(steps - start));
                        let filled = part.b.width_of(column);
                        let panel = &mut self.panel[..k * A::COLUMNS];
                        pack::panel(arm, panel, A::COLUMNS, b, (row, filled), span);
                        panel.as_ptr()
                    }
                    // SAFETY: the panel holds the words.
                    None => unsafe { part.b.panel(column).add(word * A::COLUMNS) },
                };
                for (down, row) in self.a.clone().enumerate() {
                    // SAFETY: the panels hold `k` words from `word` on, and the region has room for
                    // whole tiles of all the task's panels.
                    unsafe {
                        arm.tile(&Tile {
                            k,
                            a: part.a.panel(row).add(word * A::ROWS).cast(),
                            a_row: 1,
                            a_step: A::ROWS,
                            b: b.cast(),
                            c: sums.add(down * A::ROWS * stride + across * A::COLUMNS),
                            stride,
                            rows: A::ROWS,
                            columns: A::COLUMNS,
                            add: part.add || !part.first || word > 0,
                        });
                    }
                }
            }
        }
        if part.last {
            self.each_row(|sums, out| {
                for (sum, out) in sums.iter().zip(out) {
                    *out = bf16::from_bits(narrow(*sum));
                }
            });
        }
    }
}

impl<A: Arm> Task<'_, A> {
    /// Each row of the task's part of C, its sums and its numbers.
    #[inline(always)]
    fn each_row(&self, each: impl Fn(&mut [f32], &mut [bf16])) {
        let part = self.part;
        let (first, stride) = (self.b.start * A::COLUMNS, self.b.len() * A::COLUMNS);
        let columns = stride.min(part.b.rows - first);
        let row = self.a.start * A::ROWS;
        let rows = (self.a.len() * A::ROWS).min(part.a.rows - row);
        for down in 0..rows {
            // SAFETY: the sums are the task's own, and so are these rows and columns of C.
            unsafe {
                each(
                    std::slice::from_raw_parts_mut(self.sums.add(down * stride), columns),
                    std::slice::from_raw_parts_mut(
                        part.out.at((row + down) * part.stride + first),
                        columns,
                    ),
                );
            }
        }
    }
}

/// The nearest bf16, ties to even, without a branch, so that compilers vectorise it.
#[inline(always)]
pub(super) fn narrow(number: f32) -> u16 {
    let bits = number.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    // A NaN stays one, and a quiet one.
    let nan = bits >> 16 | 0x40;
    (if number.is_nan() { nan } else { rounded }) as u16
}
