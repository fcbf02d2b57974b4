//! Panels of bf16 operands, in words of 32 bits: a widened number, or two steps of k beside one another.

use burn::tensor::bf16;

use super::super::{Matrix, Shared, for_each};
use super::{Arm, Job};

/// Words under which waking other threads costs more than they give.
const WORTH_SHARING: usize = 1 << 16;

/// Packed rows: panel p holds rows p · width.. as `[words][width]`, the last one filled up with zeros.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    data: &'a [u32],
    width: usize,
    pub(super) words: usize,
    pub(super) rows: usize,
}

impl<'a> Panels<'a> {
    pub(super) fn new(buffer: &'a [f32], width: usize, words: usize, rows: usize) -> Self {
        Self {
            data: bytemuck::cast_slice(buffer),
            width,
            words,
            rows,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(self.width)
    }

    /// Rows of panel `index` that are not filling.
    pub(super) fn width_of(&self, index: usize) -> usize {
        self.width.min(self.rows - index * self.width)
    }

    pub(super) fn panel(&self, index: usize) -> *const u32 {
        self.data[index * self.width * self.words..].as_ptr()
    }
}

/// First and how many.
type Span = (usize, usize);

/// Packs rows and columns of `from`.
pub(super) fn pack<A: Arm>(
    arm: A,
    buffer: &mut Vec<f32>,
    width: usize,
    from: Matrix<'_, bf16>,
    (rows, steps): (Span, Span),
    threads: usize,
) {
    let (words, count) = (steps.1.div_ceil(A::STEPS), rows.1.div_ceil(width));
    if buffer.len() < count * width * words {
        buffer.resize(count * width * words, 0.0);
    }
    let threads = if count * width * words < WORTH_SHARING {
        1
    } else {
        threads
    };
    // A few panels a task, four tasks a thread.
    let share = count.div_ceil(4 * threads).max(1);
    let start = Shared(buffer.as_mut_ptr().cast::<u32>());
    for_each(count.div_ceil(share), threads, |task| {
        for index in task * share..count.min((task + 1) * share) {
            let row = index * width;
            // SAFETY: panels do not overlap, and the buffer holds all of them.
            let to =
                unsafe { std::slice::from_raw_parts_mut(start.at(row * words), width * words) };
            let span = (rows.0 + row, width.min(rows.1 - row));
            arm.run(One {
                arm,
                to,
                width,
                from,
                rows: span,
                steps,
            });
        }
    });
}

struct One<'a, A> {
    arm: A,
    to: &'a mut [u32],
    width: usize,
    from: Matrix<'a, bf16>,
    rows: Span,
    steps: Span,
}

impl<A: Arm> Job for One<'_, A> {
    #[inline(always)]
    fn run(self) {
        panel(
            self.arm, self.to, self.width, self.from, self.rows, self.steps,
        );
    }
}

/// Packs one panel: rows and columns of `from`.
#[inline(always)]
pub(super) fn panel<A: Arm>(
    _: A,
    to: &mut [u32],
    width: usize,
    from: Matrix<'_, bf16>,
    rows: Span,
    steps: Span,
) {
    let first = rows.0 * from.row_stride + steps.0 * from.column_stride;
    let panel = Panel {
        to,
        source: &from.data[first..],
        filled: rows.1,
        steps: steps.1,
        row_stride: from.row_stride,
        column_stride: from.column_stride,
    };
    match width {
        1 => panel.pack::<A, 1>(),
        2 => panel.pack::<A, 2>(),
        4 => panel.pack::<A, 4>(),
        6 => panel.pack::<A, 6>(),
        8 => panel.pack::<A, 8>(),
        12 => panel.pack::<A, 12>(),
        16 => panel.pack::<A, 16>(),
        32 => panel.pack::<A, 32>(),
        64 => panel.pack::<A, 64>(),
        _ => panel.any::<A>(width),
    }
}

struct Panel<'a> {
    to: &'a mut [u32],
    source: &'a [bf16],
    filled: usize,
    steps: usize,
    row_stride: usize,
    column_stride: usize,
}

impl Panel<'_> {
    #[inline(always)]
    fn pack<A: Arm, const WIDTH: usize>(self) {
        if self.row_stride == 1 && self.filled == WIDTH {
            self.straight::<A, WIDTH>();
            return;
        }
        #[cfg(target_arch = "x86_64")]
        if self.column_stride == 1
            && let Some(simd) = pulp::x86::V3::try_new()
        {
            let whole = super::turn::panel::<WIDTH>(
                simd,
                A::STEPS,
                self.to,
                self.source,
                self.row_stride,
                self.filled,
                self.steps,
            );
            let rest = Panel {
                to: &mut self.to[whole / A::STEPS * WIDTH..],
                source: self.source.get(whole..).unwrap_or_default(),
                steps: self.steps - whole,
                ..self
            };
            rest.any::<A>(WIDTH);
            return;
        }
        self.any::<A>(WIDTH);
    }

    /// Rows lie across k: a step is a piece of the source.
    #[inline(always)]
    fn straight<A: Arm, const WIDTH: usize>(self) {
        let piece = |step: usize| &self.source[step * self.column_stride..][..WIDTH];
        for (word, to) in self.to.chunks_exact_mut(WIDTH).enumerate() {
            let low = piece(word * A::STEPS);
            if A::STEPS == 1 {
                for (to, number) in to.iter_mut().zip(low) {
                    *to = widened(*number);
                }
            } else if word * A::STEPS + 1 < self.steps {
                let high = piece(word * A::STEPS + 1);
                for ((to, low), high) in to.iter_mut().zip(low).zip(high) {
                    *to = pair(*low, *high);
                }
            } else {
                for (to, low) in to.iter_mut().zip(low) {
                    *to = pair(*low, bf16::ZERO);
                }
            }
        }
    }

    #[inline(always)]
    fn any<A: Arm>(self, width: usize) {
        if self.filled < width {
            self.to.fill(0);
        }
        for row in 0..self.filled {
            let at = |step: usize| self.source[row * self.row_stride + step * self.column_stride];
            for (word, to) in self.to.chunks_exact_mut(width).enumerate() {
                let step = word * A::STEPS;
                to[row] = if A::STEPS == 1 {
                    widened(at(step))
                } else if step + 1 < self.steps {
                    pair(at(step), at(step + 1))
                } else {
                    pair(at(step), bf16::ZERO)
                };
            }
        }
    }
}

/// The bits of a number as f32.
#[inline(always)]
fn widened(number: bf16) -> u32 {
    u32::from(number.to_bits()) << 16
}

/// The earlier step in the low half.
#[inline(always)]
fn pair(low: bf16, high: bf16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
}
