//! Tiles computed with `VDPBF16PS`, which adds the dot product of two pairs of bf16 to each of sixteen sums.
//!
//! The instruction (Intel SDM, volume 2, VDPBF16PS) computes, in each lane of 32 bits,
//!
//! ```text
//! sum = fma(high half of a, high half of b, sum)
//! sum = fma(low half of a,  low half of b,  sum)
//! ```
//!
//! in f32, each rounded to nearest even. Denormal inputs, the sum included, count as zero, and denormal results
//! become zero, both with their sign; MXCSR is neither read nor written. So this kernel differs from the widened
//! one in two ways: numbers below 2⁻¹²⁶ are lost, and the later step of a pair is added before the earlier one.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_set1_epi32};

use super::super::tile::Tile;
use super::{HalfKernel, VectorJob};

/// Sums in a vector.
pub(super) const LANES: usize = 16;

/// The dot-product instruction: the processor's own, or the emulation of the tests.
///
/// # Safety
/// `Sums` must be exactly sixteen f32 and `Pairs` exactly sixteen words of two bf16, and both must be valid for all
/// bit patterns.
pub(super) unsafe trait PairDot: Copy + Send + Sync {
    type Sums: Copy;
    type Pairs: Copy;

    /// Copies `pair` into every lane.
    fn splat(self, pair: u32) -> Self::Pairs;

    /// Computes `sums` + a·b in each lane.
    fn dot(self, sums: Self::Sums, a: Self::Pairs, b: Self::Pairs) -> Self::Sums;

    /// Runs `job` compiled for the processor's vectors.
    fn run<J: VectorJob>(self, job: J);
}

/// The instruction of the processor. A value of this type proves that the processor has AVX-512 BF16.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx512Bf16(());

#[cfg(target_arch = "x86_64")]
impl Avx512Bf16 {
    pub(super) fn try_new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        has.then_some(Self(()))
    }
}

// SAFETY: both types are vectors of 512 bits that are valid for all bit patterns.
#[cfg(target_arch = "x86_64")]
unsafe impl PairDot for Avx512Bf16 {
    type Sums = __m512;
    type Pairs = __m512bh;

    #[inline(always)]
    fn splat(self, pair: u32) -> __m512bh {
        // SAFETY: the processor has AVX-512, and both types are 512 plain bits.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair.cast_signed())) }
    }

    #[inline(always)]
    fn dot(self, sums: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        // SAFETY: the processor has the instruction.
        unsafe { _mm512_dpbf16_ps(sums, a, b) }
    }

    fn run<J: VectorJob>(self, job: J) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        fn run_with_features<J: VectorJob>(job: J) {
            job.run();
        }
        // SAFETY: the value proves that the processor has these features.
        unsafe { run_with_features(job) };
    }
}

/// Multiplies operands that are packed as pairs of steps of k.
#[derive(Clone, Copy)]
pub(super) struct PairKernel<D, const ROWS: usize, const VECTORS: usize>(pub(super) D);

impl<D: PairDot, const ROWS: usize, const VECTORS: usize> HalfKernel
    for PairKernel<D, ROWS, VECTORS>
{
    const STEPS: usize = 2;
    const ROWS: usize = ROWS;
    const COLUMNS: usize = VECTORS * LANES;

    fn run<J: VectorJob>(self, job: J) {
        self.0.run(job);
    }

    #[inline(always)]
    unsafe fn tile(self, tile: &Tile) {
        const { assert!(size_of::<D::Sums>() == 64 && size_of::<D::Pairs>() == 64) };
        let sums_at = |row: usize, vector: usize| {
            tile.c
                .wrapping_add(row * tile.stride + vector * LANES)
                .cast::<D::Sums>()
        };
        // SAFETY: all pointers stay within the memory that the caller guarantees, and vectors are plain numbers.
        unsafe {
            let mut sums: [[D::Sums; VECTORS]; ROWS] = std::mem::zeroed();
            if tile.add {
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (vector, sum) in sums.iter_mut().enumerate() {
                        *sum = sums_at(row, vector).read_unaligned();
                    }
                }
            }
            let (mut a, mut b) = (tile.a.cast::<u32>(), tile.b.cast::<D::Pairs>());
            for _ in 0..tile.k {
                let mut columns = [self.0.splat(0); VECTORS];
                for (vector, column) in columns.iter_mut().enumerate() {
                    *column = b.add(vector).read_unaligned();
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let x = self.0.splat(*a.add(row));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = self.0.dot(*sum, x, column);
                    }
                }
                a = a.add(ROWS);
                b = b.add(VECTORS);
            }
            for (row, sums) in sums.iter().enumerate() {
                for (vector, sum) in sums.iter().enumerate() {
                    sums_at(row, vector).write_unaligned(*sum);
                }
            }
        }
    }
}
