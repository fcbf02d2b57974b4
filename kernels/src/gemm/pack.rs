//! Packed panels of operands: groups of rows, step by step of k, in the order in which a tile reads them.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use pulp::{Simd, WithSimd};

use super::{Matrix, SharedOutput, run_tasks};

/// Words of a packed operand below which one thread is faster than waking others.
const MIN_PARALLEL_WORDS: usize = 1 << 16;

/// The panels of an operand. Panel p holds rows p · width.. as `[steps][width]` words of 32 bits; the last panel
/// is padded with zeros.
#[derive(Clone, Copy)]
pub(super) struct PackedPanels<'a> {
    data: &'a [f32],
    pub(super) width: usize,
    /// Words of each row. In f32 a word is one step of k.
    pub(super) steps: usize,
    pub(super) rows: usize,
    /// The leading panels that are read from the operand itself and are not in `data`.
    borrowed: Option<BorrowedRows<'a>>,
}

/// The leading whole panels of an operand whose rows are contiguous along k.
#[derive(Clone, Copy)]
struct BorrowedRows<'a> {
    data: &'a [f32],
    row_stride: usize,
    panels: usize,
}

impl<'a> PackedPanels<'a> {
    pub(super) fn new(data: &'a [f32], width: usize, steps: usize, rows: usize) -> Self {
        Self {
            data,
            width,
            steps,
            rows,
            borrowed: None,
        }
    }

    /// Number of panels.
    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(self.width)
    }

    /// Number of rows of panel `index` without the padding.
    pub(super) fn rows_of(&self, index: usize) -> usize {
        self.width.min(self.rows - index * self.width)
    }

    /// The first word of a panel, where no panel is borrowed.
    pub(super) fn panel(&self, index: usize) -> *const f32 {
        self.data[index * self.width * self.steps..].as_ptr()
    }

    /// The word of a panel's first row at a step of k, the distance to the next row, and the distance to the next
    /// step.
    pub(super) fn rows_at(&self, index: usize, step: usize) -> (*const f32, usize, usize) {
        let borrowed = self.borrowed.filter(|borrowed| index < borrowed.panels);
        if let Some(BorrowedRows {
            data, row_stride, ..
        }) = borrowed
        {
            let from = &data[index * self.width * row_stride + step..];
            return (from.as_ptr(), row_stride, 1);
        }
        let packed = index - self.borrowed.map_or(0, |borrowed| borrowed.panels);
        let from = &self.data[packed * self.width * self.steps + step * self.width..];
        (from.as_ptr(), 1, self.width)
    }
}

thread_local! {
    /// Buffers of earlier products, kept so that a product does not ask the system for new pages.
    static BUFFERS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Takes a buffer of any length and content. It is removed from the thread's list, because a thread that waits for
/// other tasks may start another product meanwhile.
pub(super) fn take_buffer() -> Vec<f32> {
    BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default()
}

pub(super) fn give_back(buffer: Vec<f32>) {
    BUFFERS.with_borrow_mut(|buffers| buffers.push(buffer));
}

/// Makes a buffer at least `len` numbers long.
pub(super) fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

/// A slice of `len` numbers of unspecified content, in memory of earlier products.
pub(crate) struct ScratchBuffer {
    buffer: Vec<f32>,
    len: usize,
}

impl ScratchBuffer {
    pub(crate) fn new(len: usize) -> Self {
        let mut buffer = take_buffer();
        grow(&mut buffer, len);
        Self { buffer, len }
    }
}

impl Deref for ScratchBuffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.buffer[..self.len]
    }
}

impl DerefMut for ScratchBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.len]
    }
}

impl Drop for ScratchBuffer {
    fn drop(&mut self) {
        give_back(std::mem::take(&mut self.buffer));
    }
}

/// Packs `rows` rows of `steps` words each into panels of `width` rows. `pack_panel` gets a panel's words, its first
/// row, and its number of rows without the padding.
pub(super) fn pack_panels<'a>(
    buffer: &'a mut Vec<f32>,
    width: usize,
    steps: usize,
    rows: usize,
    threads: usize,
    pack_panel: impl Fn(&mut [f32], usize, usize) + Send + Sync,
) -> PackedPanels<'a> {
    let count = rows.div_ceil(width);
    let words = count * width * steps;
    grow(buffer, words);
    let threads = if words < MIN_PARALLEL_WORDS {
        1
    } else {
        threads
    };
    // Each thread gets about four tasks of a few panels.
    let task_panels = count.div_ceil(4 * threads).max(1);
    let start = SharedOutput(buffer.as_mut_ptr());
    run_tasks(count.div_ceil(task_panels), threads, |task| {
        for panel in task * task_panels..count.min((task + 1) * task_panels) {
            let row = panel * width;
            // SAFETY: panels do not overlap, and the buffer holds all of them.
            let to =
                unsafe { std::slice::from_raw_parts_mut(start.at(row * steps), width * steps) };
            pack_panel(to, row, width.min(rows - row));
        }
    });
    PackedPanels::new(buffer, width, steps, rows)
}

/// Packs `rows` (first, count) of `from` over `depth` (first, count) of its columns.
pub(super) fn pack<'a, S: Simd>(
    simd: S,
    buffer: &'a mut Vec<f32>,
    width: usize,
    from: Matrix<'_>,
    rows: (usize, usize),
    depth: (usize, usize),
    threads: usize,
) -> PackedPanels<'a> {
    let pack_panel = |to: &mut [f32], row: usize, filled: usize| {
        let first = (rows.0 + row) * from.row_stride + depth.0 * from.column_stride;
        simd.vectorize(PanelPacker {
            to,
            source: &from.data[first..],
            width,
            filled,
            k: depth.1,
            row_stride: from.row_stride,
            column_stride: from.column_stride,
        });
    };
    pack_panels(buffer, width, depth.1, rows.1, threads, pack_panel)
}

/// Packs as [`pack`] does, but whole panels of an operand whose rows are contiguous along k are read in place: the
/// tile then reads each of its rows as a separate stream.
pub(super) fn pack_or_borrow<'a, S: Simd>(
    simd: S,
    buffer: &'a mut Vec<f32>,
    width: usize,
    from: Matrix<'a>,
    rows: (usize, usize),
    depth: (usize, usize),
    threads: usize,
) -> PackedPanels<'a> {
    // Rows whose distance is a multiple of a page would compete for the same cache lines.
    if from.column_stride != 1 || from.row_stride.is_multiple_of(PAGE) {
        return pack(simd, buffer, width, from, rows, depth, threads);
    }
    let panels = rows.1 / width;
    let rest = (rows.0 + panels * width, rows.1 % width);
    let packed = pack(simd, buffer, width, from, rest, depth, 1);
    PackedPanels {
        rows: rows.1,
        borrowed: Some(BorrowedRows {
            data: &from.data[rows.0 * from.row_stride + depth.0..],
            row_stride: from.row_stride,
            panels,
        }),
        ..packed
    }
}

/// Numbers in a page of 4 KiB.
const PAGE: usize = 1024;

/// Packs one panel of an f32 operand.
struct PanelPacker<'a> {
    to: &'a mut [f32],
    source: &'a [f32],
    width: usize,
    /// Rows of the panel without the padding.
    filled: usize,
    k: usize,
    row_stride: usize,
    column_stride: usize,
}

impl WithSimd for PanelPacker<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match self.width {
            6 => self.pack::<6>(),
            8 => self.pack::<8>(),
            12 => self.pack::<12>(),
            16 => self.pack::<16>(),
            32 => self.pack::<32>(),
            _ => self.pack_any_width(),
        }
    }
}

/// Steps of k that are transposed at once.
const TRANSPOSED_STEPS: usize = 8;

impl PanelPacker<'_> {
    #[inline(always)]
    fn pack<const WIDTH: usize>(self) {
        if self.row_stride == 1 && self.filled < WIDTH {
            for (step, to) in self.to.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
                let from = &self.source[step * self.column_stride..][..self.filled];
                to[..self.filled].copy_from_slice(from);
                to[self.filled..].fill(0.0);
            }
        } else if self.row_stride == 1 {
            for (step, to) in self.to.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
                if let Some(from) = self.source[step * self.column_stride..].first_chunk() {
                    *to = *from;
                }
            }
        } else if self.column_stride == 1 {
            // Loops over a number of rows that the compiler knows are unrolled.
            if self.filled == WIDTH {
                self.pack_transposed::<WIDTH>(WIDTH);
            } else {
                let filled = self.filled;
                self.pack_transposed::<WIDTH>(filled);
            }
        } else {
            self.pack_any_width();
        }
    }

    /// Packs rows that are contiguous along k: blocks of eight steps are read row by row and written step by step.
    #[inline(always)]
    fn pack_transposed<const WIDTH: usize>(self, filled: usize) {
        let whole = self.k / TRANSPOSED_STEPS * TRANSPOSED_STEPS;
        for start in (0..whole).step_by(TRANSPOSED_STEPS) {
            let mut block = [[0f32; TRANSPOSED_STEPS]; WIDTH];
            // Rows beyond the operand are zeros.
            for (row, block) in block.iter_mut().enumerate().take(filled) {
                let from = &self.source[row * self.row_stride + start..];
                block.copy_from_slice(&from[..TRANSPOSED_STEPS]);
            }
            let to = &mut self.to[start * WIDTH..][..TRANSPOSED_STEPS * WIDTH];
            for (step, to) in to.chunks_exact_mut(WIDTH).enumerate() {
                for (to, row) in to.iter_mut().zip(&block) {
                    *to = row[step];
                }
            }
        }
        for step in whole..self.k {
            let to = &mut self.to[step * WIDTH..][..WIDTH];
            to.fill(0.0);
            for (row, to) in to.iter_mut().enumerate().take(filled) {
                *to = self.source[row * self.row_stride + step];
            }
        }
    }

    fn pack_any_width(self) {
        for (step, to) in self.to.chunks_exact_mut(self.width).enumerate() {
            let (filled, padding) = to.split_at_mut(self.filled);
            for (row, to) in filled.iter_mut().enumerate() {
                *to = self.source[row * self.row_stride + step * self.column_stride];
            }
            padding.fill(0.0);
        }
    }
}
