//! x·Wᵀ for one to four rows of x on AVX2: blocks of 8 × 8 of W are transposed in registers, so that eight
//! outputs are the lanes of a vector, and W is read once, from its start to its end.

use std::arch::x86_64::{
    __m256, _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_permute2f128_ps,
    _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};
use std::ops::Range;

use pulp::x86::V3;

use super::{Matrix, SharedOutput};

/// Largest number of rows of x for which this method is faster than packing x.
pub(super) const MAX_ROWS: usize = 4;
const LANES: usize = 8;

/// Computes the columns of `out` `[n, out]` that the rows `rows` of W give. `V3` proves that the processor has AVX2
/// and FMA.
pub(super) fn multiply_rows(
    _: V3,
    out: SharedOutput,
    x: Matrix<'_>,
    weight: Matrix<'_>,
    rows: Range<usize>,
) {
    for row in rows.clone().step_by(LANES) {
        let lanes = LANES.min(rows.end - row);
        let w = &weight.data[row * weight.row_stride..];
        let mut sums = [[0f32; LANES]; MAX_ROWS];
        if lanes == LANES {
            // SAFETY: W has eight rows from `row` on, x has its rows, and the processor has AVX2 and FMA.
            unsafe {
                match x.rows {
                    1 => eight_outputs::<1>(x, w.as_ptr(), weight.row_stride, &mut sums),
                    2 => eight_outputs::<2>(x, w.as_ptr(), weight.row_stride, &mut sums),
                    3 => eight_outputs::<3>(x, w.as_ptr(), weight.row_stride, &mut sums),
                    _ => eight_outputs::<4>(x, w.as_ptr(), weight.row_stride, &mut sums),
                }
            }
        } else {
            for (n, sums) in sums.iter_mut().enumerate().take(x.rows) {
                let x = &x.data[n * x.row_stride..][..weight.columns];
                for (lane, sum) in sums.iter_mut().enumerate().take(lanes) {
                    let w = &w[lane * weight.row_stride..][..weight.columns];
                    *sum = x.iter().zip(w).fold(0.0, |sum, (x, w)| x.mul_add(*w, sum));
                }
            }
        }
        for (n, sums) in sums.iter().enumerate().take(x.rows) {
            for (lane, sum) in sums.iter().enumerate().take(lanes) {
                // SAFETY: the element is within `[n, out]`, and no other task writes these columns.
                unsafe { *out.at(n * weight.rows + row + lane) = *sum };
            }
        }
    }
}

/// Computes eight outputs of each of the N rows of x.
///
/// # Safety
/// `w` must hold eight rows that start `stride` apart and have as many columns as x, and the processor must have
/// AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn eight_outputs<const N: usize>(
    x: Matrix<'_>,
    w: *const f32,
    stride: usize,
    sums: &mut [[f32; LANES]; MAX_ROWS],
) {
    let mut chains = [_mm256_setzero_ps(); N];
    let whole = x.columns / LANES * LANES;
    // SAFETY: column indices stay below x's columns, row indices below eight for W and below N for x.
    unsafe {
        let x_at = |n: usize, column: usize| &*x.data.as_ptr().add(n * x.row_stride + column);
        for start in (0..whole).step_by(LANES) {
            let rows = std::array::from_fn(|row| _mm256_loadu_ps(w.add(row * stride + start)));
            for (step, column) in transpose(rows).into_iter().enumerate() {
                for (n, chain) in chains.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(x_at(n, start + step));
                    *chain = _mm256_fmadd_ps(x, column, *chain);
                }
            }
        }
        for (n, (chain, sums)) in chains.iter().zip(sums).enumerate() {
            _mm256_storeu_ps(sums.as_mut_ptr(), *chain);
            for column in whole..x.columns {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    *sum = x_at(n, column).mul_add(*w.add(lane * stride + column), *sum);
                }
            }
        }
    }
}

/// Transposes a block of 8 × 8 numbers.
#[target_feature(enable = "avx2,fma")]
pub(super) fn transpose(rows: [__m256; LANES]) -> [__m256; LANES] {
    let mut pairs = rows;
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    let mut fours = pairs;
    for half in [0, 4] {
        for i in 0..2 {
            let (low, high) = (pairs[half + i], pairs[half + i + 2]);
            fours[half + 2 * i] = _mm256_shuffle_ps::<0x44>(low, high);
            fours[half + 2 * i + 1] = _mm256_shuffle_ps::<0xEE>(low, high);
        }
    }
    let mut columns = fours;
    for i in 0..4 {
        columns[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
        columns[i + 4] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
    }
    columns
}
