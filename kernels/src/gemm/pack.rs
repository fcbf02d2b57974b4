//! Panels: so many rows of an operand, step by step of k, as a tile reads them.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use pulp::{Simd, WithSimd};

use super::{Matrix, Shared, for_each};

/// Numbers under which waking other threads costs more than they give.
const WORTH_SHARING: usize = 1 << 16;

/// Packed rows: panel p holds rows p · width.. as `[k][width]`, the last one filled up with zeros.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    data: &'a [f32],
    pub(super) width: usize,
    pub(super) k: usize,
    rows: usize,
    /// The panels that are read where they lie, and not from `data`.
    lying: Option<Lying<'a>>,
}

/// The first panels of an operand whose rows lie along k.
#[derive(Clone, Copy)]
struct Lying<'a> {
    data: &'a [f32],
    row_stride: usize,
    count: usize,
}

impl Panels<'_> {
    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(self.width)
    }

    /// Rows of panel `index` that are not filling.
    pub(super) fn width_of(&self, index: usize) -> usize {
        self.width.min(self.rows - index * self.width)
    }

    pub(super) fn panel(&self, index: usize) -> *const f32 {
        self.data[index * self.width * self.k..].as_ptr()
    }

    /// Where a panel begins at a step of k, and how far it is to the next row and to the next step.
    pub(super) fn rows_at(&self, index: usize, step: usize) -> (*const f32, usize, usize) {
        let lying = self.lying.filter(|lying| index < lying.count);
        if let Some(Lying {
            data, row_stride, ..
        }) = lying
        {
            let from = &data[index * self.width * row_stride + step..];
            return (from.as_ptr(), row_stride, 1);
        }
        let packed = index - self.lying.map_or(0, |lying| lying.count);
        let from = &self.data[packed * self.width * self.k + step * self.width..];
        (from.as_ptr(), 1, self.width)
    }
}

thread_local! {
    /// Memory of earlier products, so that a product does not ask for new pages.
    static BUFFERS: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of any length. It is taken out, since a thread that waits for others may start on another
/// product.
pub(super) fn buffer() -> Vec<f32> {
    BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default()
}

pub(super) fn give_back(buffer: Vec<f32>) {
    BUFFERS.with_borrow_mut(|buffers| buffers.push(buffer));
}

/// So many numbers of memory of earlier products, holding anything.
pub(crate) struct Scratch {
    buffer: Vec<f32>,
    len: usize,
}

impl Scratch {
    pub(crate) fn new(len: usize) -> Self {
        let mut buffer = buffer();
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        Self { buffer, len }
    }
}

impl Deref for Scratch {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.buffer[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        give_back(std::mem::take(&mut self.buffer));
    }
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
) -> Panels<'a> {
    let (k, count) = (depth.1, rows.1.div_ceil(width));
    if buffer.len() < count * width * k {
        buffer.resize(count * width * k, 0.0);
    }
    let threads = if count * width * k < WORTH_SHARING {
        1
    } else {
        threads
    };
    // A few panels a task, four tasks a thread.
    let share = count.div_ceil(4 * threads).max(1);
    let start = Shared(buffer.as_mut_ptr());
    for_each(count.div_ceil(share), threads, |task| {
        for panel in task * share..count.min((task + 1) * share) {
            let row = panel * width;
            // SAFETY: panels do not overlap, and the buffer holds all of them.
            let to = unsafe { std::slice::from_raw_parts_mut(start.at(row * k), width * k) };
            let first = (rows.0 + row) * from.row_stride + depth.0 * from.column_stride;
            simd.vectorize(Panel {
                to,
                source: &from.data[first..],
                width,
                filled: width.min(rows.1 - row),
                k,
                row_stride: from.row_stride,
                column_stride: from.column_stride,
            });
        }
    });
    Panels {
        data: buffer,
        width,
        k,
        rows: rows.1,
        lying: None,
    }
}

/// As [`pack`], but whole panels of an operand whose rows lie along k are read as they lie: the tile's
/// rows are so many streams then.
pub(super) fn pack_rows<'a, S: Simd>(
    simd: S,
    buffer: &'a mut Vec<f32>,
    width: usize,
    from: Matrix<'a>,
    rows: (usize, usize),
    depth: (usize, usize),
    threads: usize,
) -> Panels<'a> {
    // Rows that are whole pages apart would fight for the same lines of the cache.
    if from.column_stride != 1 || from.row_stride.is_multiple_of(PAGE) {
        return pack(simd, buffer, width, from, rows, depth, threads);
    }
    let count = rows.1 / width;
    let rest = (rows.0 + count * width, rows.1 % width);
    let packed = pack(simd, buffer, width, from, rest, depth, 1);
    Panels {
        rows: rows.1,
        lying: Some(Lying {
            data: &from.data[rows.0 * from.row_stride + depth.0..],
            row_stride: from.row_stride,
            count,
        }),
        ..packed
    }
}

/// Numbers of a page of 4 KiB.
const PAGE: usize = 1024;

struct Panel<'a> {
    to: &'a mut [f32],
    source: &'a [f32],
    width: usize,
    filled: usize,
    k: usize,
    row_stride: usize,
    column_stride: usize,
}

impl WithSimd for Panel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match self.width {
            6 => self.pack::<6>(),
            8 => self.pack::<8>(),
            12 => self.pack::<12>(),
            16 => self.pack::<16>(),
            32 => self.pack::<32>(),
            _ => self.any(),
        }
    }
}

/// Steps of k that are turned around at once.
const TURN: usize = 8;

impl Panel<'_> {
    #[inline(always)]
    fn pack<const WIDTH: usize>(self) {
        if self.filled < WIDTH {
            self.any();
        } else if self.row_stride == 1 {
            for (step, to) in self.to.as_chunks_mut::<WIDTH>().0.iter_mut().enumerate() {
                if let Some(from) = self.source[step * self.column_stride..].first_chunk() {
                    *to = *from;
                }
            }
        } else if self.column_stride == 1 {
            self.turned::<WIDTH>();
        } else {
            self.any();
        }
    }

    /// Rows lie along k: blocks of eight steps are read row by row and written step by step.
    #[inline(always)]
    fn turned<const WIDTH: usize>(self) {
        let whole = self.k / TURN * TURN;
        for start in (0..whole).step_by(TURN) {
            let mut block = [[0f32; TURN]; WIDTH];
            for (row, block) in block.iter_mut().enumerate() {
                block.copy_from_slice(&self.source[row * self.row_stride + start..][..TURN]);
            }
            let to = &mut self.to[start * WIDTH..][..TURN * WIDTH];
            for (step, to) in to.chunks_exact_mut(WIDTH).enumerate() {
                for (to, row) in to.iter_mut().zip(&block) {
                    *to = row[step];
                }
            }
        }
        for step in whole..self.k {
            for row in 0..WIDTH {
                self.to[step * WIDTH + row] = self.source[row * self.row_stride + step];
            }
        }
    }

    fn any(self) {
        for (step, to) in self.to.chunks_exact_mut(self.width).enumerate() {
            let (filled, rest) = to.split_at_mut(self.filled);
            for (row, to) in filled.iter_mut().enumerate() {
                *to = self.source[row * self.row_stride + step * self.column_stride];
            }
            rest.fill(0.0);
        }
    }
}
