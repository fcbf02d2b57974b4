//! x·Wᵀ for one to four rows of x on AVX2: blocks of eight by eight of W are turned around in registers,
//! so that eight outputs are the lanes of a vector, and W is read once, from one end to the other.

use std::arch::x86_64::{
    __m256, _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_permute2f128_ps,
    _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};
use std::ops::Range;

use pulp::x86::V3;

use super::{Matrix, Shared};

/// More rows are faster the other way.
pub(super) const MOST_ROWS: usize = 4;
const LANES: usize = 8;

/// Columns `rows` of `out` `[n, out]`, which are rows of W; `V3` is the proof that the processor has AVX2
/// and FMA.
pub(super) fn rows(_: V3, out: Shared, x: Matrix<'_>, weight: Matrix<'_>, rows: Range<usize>) {
    for row in rows.clone().step_by(LANES) {
        let lanes = LANES.min(rows.end - row);
        let w = &weight.data[row * weight.row_stride..];
        let mut sums = [[0f32; LANES]; MOST_ROWS];
        if lanes == LANES {
            // SAFETY: W has eight rows from `row` on, and x has its rows; the processor is as required.
            unsafe {
                match x.rows {
                    1 => eight::<1>(x, w.as_ptr(), weight.row_stride, &mut sums),
                    2 => eight::<2>(x, w.as_ptr(), weight.row_stride, &mut sums),
                    3 => eight::<3>(x, w.as_ptr(), weight.row_stride, &mut sums),
                    _ => eight::<4>(x, w.as_ptr(), weight.row_stride, &mut sums),
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
                // SAFETY: within `[n, out]`; no other task writes these columns.
                unsafe { *out.at(n * weight.rows + row + lane) = *sum };
            }
        }
    }
}

/// # Safety
/// `w` must hold eight rows, `stride` apart, of x's columns, and the processor have AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn eight<const N: usize>(
    x: Matrix<'_>,
    w: *const f32,
    stride: usize,
    sums: &mut [[f32; LANES]; MOST_ROWS],
) {
    let mut chains = [_mm256_setzero_ps(); N];
    let whole = x.columns / LANES * LANES;
    // SAFETY: columns stay below x's, rows below eight of W and N of x.
    unsafe {
        let x_at = |n: usize, column: usize| &*x.data.as_ptr().add(n * x.row_stride + column);
        for start in (0..whole).step_by(LANES) {
            let rows = std::array::from_fn(|row| _mm256_loadu_ps(w.add(row * stride + start)));
            for (step, column) in turn(rows).into_iter().enumerate() {
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

/// The transpose of eight by eight.
#[target_feature(enable = "avx2,fma")]
pub(super) fn turn(rows: [__m256; LANES]) -> [__m256; LANES] {
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
