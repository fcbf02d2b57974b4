//! Packing of rows that are contiguous along k, on AVX2: blocks of eight rows by eight pairs are transposed in
//! registers.

use std::arch::x86_64::{
    __m256i, _MM_HINT_T0, _mm_cvtsi128_si32, _mm_prefetch, _mm_storel_epi64, _mm_storeu_si128,
    _mm256_and_si256, _mm256_castps_si256, _mm256_castsi256_si128, _mm256_extracti128_si256,
    _mm256_loadu_ps, _mm256_set1_epi32, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_si256,
};

use burn::tensor::bf16;
use pulp::x86::V3;

use super::super::few_rows::transpose;

/// Rows of a block, and pairs of steps in a block.
const LANES: usize = 8;

/// Packs the whole blocks of 16 steps into words of `steps_per_word` steps, `[words][WIDTH]`, and returns the number
/// of steps that were packed. Rows from `filled` on are zeros. `V3` proves that the processor has AVX2 and FMA.
pub(super) fn pack_blocks<const WIDTH: usize>(
    _: V3,
    steps_per_word: usize,
    to: &mut [u32],
    source: &[bf16],
    row_stride: usize,
    filled: usize,
    steps: usize,
) -> usize {
    let blocks = steps / (2 * LANES);
    let whole = blocks * 2 * LANES;
    if blocks == 0 {
        return 0;
    }
    assert!(0 < filled && filled <= WIDTH);
    assert!((filled - 1) * row_stride + whole <= source.len());
    assert!(whole / steps_per_word * WIDTH <= to.len());
    for row in (0..WIDTH).step_by(LANES) {
        let rows = BlockRows {
            to: to[row..].as_mut_ptr(),
            width: WIDTH,
            source: source.as_ptr().wrapping_add(row * row_stride),
            row_stride,
            filled: filled.saturating_sub(row).min(LANES),
        };
        // SAFETY: the assertions ensure that the rows hold the blocks and that the panel has room for their words;
        // the processor has AVX2 and FMA.
        unsafe {
            match (steps_per_word, (WIDTH - row).min(LANES)) {
                (1, 1) => rows.transpose_blocks::<1, 1>(blocks),
                (1, 2) => rows.transpose_blocks::<1, 2>(blocks),
                (1, 4) => rows.transpose_blocks::<1, 4>(blocks),
                (1, 6) => rows.transpose_blocks::<1, 6>(blocks),
                (1, 8) => rows.transpose_blocks::<1, 8>(blocks),
                (2, 1) => rows.transpose_blocks::<2, 1>(blocks),
                (2, 2) => rows.transpose_blocks::<2, 2>(blocks),
                (2, 4) => rows.transpose_blocks::<2, 4>(blocks),
                (2, 8) => rows.transpose_blocks::<2, 8>(blocks),
                (per, lanes) => unreachable!("no tile has {lanes} rows, {per} steps a word"),
            }
        }
    }
    whole
}

/// Up to eight rows of a panel.
#[derive(Clone, Copy)]
struct BlockRows {
    to: *mut u32,
    width: usize,
    source: *const bf16,
    row_stride: usize,
    filled: usize,
}

impl BlockRows {
    /// Packs `blocks` blocks of the rows.
    ///
    /// # Safety
    /// The first `filled` rows must hold the blocks, `to` must have room for `ROWS` words of each step, and the
    /// processor must have AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn transpose_blocks<const STEPS: usize, const ROWS: usize>(self, blocks: usize) {
        let high = _mm256_set1_epi32(0xFFFF_0000u32.cast_signed());
        for block in 0..blocks {
            let mut rows = [_mm256_setzero_ps(); LANES];
            for (row, pairs) in rows.iter_mut().enumerate().take(ROWS) {
                if row < self.filled {
                    let at = row * self.row_stride + block * 2 * LANES;
                    // The next eight rows are prefetched, because the hardware prefetcher does not find them.
                    let next = self.source.wrapping_add(at + LANES * self.row_stride);
                    // SAFETY: the row holds the block; a prefetch reads nothing.
                    *pairs = unsafe {
                        _mm_prefetch::<_MM_HINT_T0>(next.cast());
                        _mm256_loadu_ps(self.source.add(at).cast())
                    };
                }
            }
            let start = block * 2 * LANES / STEPS;
            for (step, pairs) in transpose(rows).into_iter().enumerate() {
                let pairs = _mm256_castps_si256(pairs);
                let place = |word: usize| self.to.wrapping_add((start + word) * self.width);
                // SAFETY: the panel has room for the block's words.
                unsafe {
                    if STEPS == 2 {
                        store::<ROWS>(place(step), pairs);
                    } else {
                        store::<ROWS>(place(2 * step), _mm256_slli_epi32::<16>(pairs));
                        store::<ROWS>(place(2 * step + 1), _mm256_and_si256(pairs, high));
                    }
                }
            }
        }
    }
}

/// Stores the first `COUNT` words: 1, 2, 4, 6 or 8.
///
/// # Safety
/// `to` must have room for the words, and the processor must have AVX2.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn store<const COUNT: usize>(to: *mut u32, words: __m256i) {
    let low = _mm256_castsi256_si128(words);
    // SAFETY: the caller guarantees the memory and the processor.
    unsafe {
        match COUNT {
            8 => _mm256_storeu_si256(to.cast(), words),
            1 => *to = _mm_cvtsi128_si32(low).cast_unsigned(),
            2 => _mm_storel_epi64(to.cast(), low),
            _ => _mm_storeu_si128(to.cast(), low),
        }
        if COUNT == 6 {
            _mm_storel_epi64(to.add(4).cast(), _mm256_extracti128_si256::<1>(words));
        }
    }
}
