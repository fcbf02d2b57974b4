//! Packed panels of bf16 operands in words of 32 bits: a number widened to f32, or two steps of k.

use burn::tensor::bf16;

use super::super::Matrix;
use super::super::pack::{PackedPanels, pack_panels};
use super::{HalfKernel, VectorJob};

/// First index and length.
type Span = (usize, usize);

/// Packs rows and columns of `from` as words for `kernel`.
pub(super) fn pack<'a, K: HalfKernel>(
    kernel: K,
    buffer: &'a mut Vec<f32>,
    width: usize,
    from: Matrix<'_, bf16>,
    (rows, steps): (Span, Span),
    threads: usize,
) -> PackedPanels<'a> {
    let pack_panel = |to: &mut [f32], row: usize, filled: usize| {
        kernel.run(PackJob {
            kernel,
            to: bytemuck::cast_slice_mut(to),
            width,
            from,
            rows: (rows.0 + row, filled),
            steps,
        });
    };
    let words = steps.1.div_ceil(K::STEPS);
    pack_panels(buffer, width, words, rows.1, threads, pack_panel)
}

struct PackJob<'a, K> {
    kernel: K,
    to: &'a mut [u32],
    width: usize,
    from: Matrix<'a, bf16>,
    rows: Span,
    steps: Span,
}

impl<K: HalfKernel> VectorJob for PackJob<'_, K> {
    #[inline(always)]
    fn run(self) {
        pack_panel(
            self.kernel,
            self.to,
            self.width,
            self.from,
            self.rows,
            self.steps,
        );
    }
}

/// Packs one panel: the given rows and columns of `from`.
#[inline(always)]
pub(super) fn pack_panel<K: HalfKernel>(
    _: K,
    to: &mut [u32],
    width: usize,
    from: Matrix<'_, bf16>,
    rows: Span,
    steps: Span,
) {
    let first = rows.0 * from.row_stride + steps.0 * from.column_stride;
    let panel = HalfPanelPacker {
        to,
        source: &from.data[first..],
        filled: rows.1,
        steps: steps.1,
        row_stride: from.row_stride,
        column_stride: from.column_stride,
    };
    match width {
        1 => panel.pack::<K, 1>(),
        2 => panel.pack::<K, 2>(),
        4 => panel.pack::<K, 4>(),
        6 => panel.pack::<K, 6>(),
        8 => panel.pack::<K, 8>(),
        12 => panel.pack::<K, 12>(),
        16 => panel.pack::<K, 16>(),
        32 => panel.pack::<K, 32>(),
        64 => panel.pack::<K, 64>(),
        _ => panel.pack_any_width::<K>(width),
    }
}

/// Packs one panel of a bf16 operand.
struct HalfPanelPacker<'a> {
    to: &'a mut [u32],
    source: &'a [bf16],
    /// Rows of the panel without the padding.
    filled: usize,
    steps: usize,
    row_stride: usize,
    column_stride: usize,
}

impl HalfPanelPacker<'_> {
    #[inline(always)]
    fn pack<K: HalfKernel, const WIDTH: usize>(self) {
        if self.row_stride == 1 && self.filled == WIDTH {
            self.pack_contiguous_steps::<K, WIDTH>();
            return;
        }
        #[cfg(target_arch = "x86_64")]
        if self.column_stride == 1
            && let Some(simd) = pulp::x86::V3::try_new()
        {
            let packed_steps = super::transpose::pack_blocks::<WIDTH>(
                simd,
                K::STEPS,
                self.to,
                self.source,
                self.row_stride,
                self.filled,
                self.steps,
            );
            let rest = HalfPanelPacker {
                to: &mut self.to[packed_steps / K::STEPS * WIDTH..],
                source: self.source.get(packed_steps..).unwrap_or_default(),
                steps: self.steps - packed_steps,
                ..self
            };
            rest.pack_any_width::<K>(WIDTH);
            return;
        }
        self.pack_any_width::<K>(WIDTH);
    }

    /// Packs an operand in which the rows of one step are contiguous.
    #[inline(always)]
    fn pack_contiguous_steps<K: HalfKernel, const WIDTH: usize>(self) {
        let numbers_at = |step: usize| &self.source[step * self.column_stride..][..WIDTH];
        for (word, to) in self.to.chunks_exact_mut(WIDTH).enumerate() {
            let low = numbers_at(word * K::STEPS);
            if K::STEPS == 1 {
                for (to, number) in to.iter_mut().zip(low) {
                    *to = widened_bits(*number);
                }
            } else if word * K::STEPS + 1 < self.steps {
                let high = numbers_at(word * K::STEPS + 1);
                for ((to, low), high) in to.iter_mut().zip(low).zip(high) {
                    *to = pair_bits(*low, *high);
                }
            } else {
                for (to, low) in to.iter_mut().zip(low) {
                    *to = pair_bits(*low, bf16::ZERO);
                }
            }
        }
    }

    #[inline(always)]
    fn pack_any_width<K: HalfKernel>(self, width: usize) {
        if self.filled < width {
            self.to.fill(0);
        }
        for row in 0..self.filled {
            let at = |step: usize| self.source[row * self.row_stride + step * self.column_stride];
            for (word, to) in self.to.chunks_exact_mut(width).enumerate() {
                let step = word * K::STEPS;
                to[row] = if K::STEPS == 1 {
                    widened_bits(at(step))
                } else if step + 1 < self.steps {
                    pair_bits(at(step), at(step + 1))
                } else {
                    pair_bits(at(step), bf16::ZERO)
                };
            }
        }
    }
}

/// The bits of a number widened to f32.
#[inline(always)]
fn widened_bits(number: bf16) -> u32 {
    u32::from(number.to_bits()) << 16
}

/// Two steps in one word, the earlier step in the low half.
#[inline(always)]
fn pair_bits(low: bf16, high: bf16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
}
