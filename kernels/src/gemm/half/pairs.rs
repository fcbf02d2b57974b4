//! Tiles by the instruction that adds a dot product of two bf16 to each of sixteen sums, `VDPBF16PS`.
//!
//! The instruction (Intel SDM, volume 2, VDPBF16PS) computes, in each lane of 32 bits,
//!
//! ```text
//! sum = fma(high half of a, high half of b, sum)
//! sum = fma(low half of a,  low half of b,  sum)
//! ```
//!
//! in f32, each rounded to nearest even. Denormal numbers that go in, sums too, count as zero, denormal
//! results become zero, both with their sign; MXCSR is neither read nor written. So what this arm loses
//! beside the other is what lies under 2⁻¹²⁶, and the later step of a pair is added before the earlier.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_set1_epi32};

use super::super::tile::Tile;
use super::{Arm, Job};

/// Numbers in a vector.
pub(super) const LANES: usize = 16;

/// The instruction. Everything else in this arm does not know which form of it there is.
///
/// # Safety
/// `Sums` must be sixteen f32 and `Pairs` sixteen words of two bf16, without anything else, and valid
/// whatever their bits are.
pub(super) unsafe trait Dot: Copy + Send + Sync {
    type Sums: Copy;
    type Pairs: Copy;

    /// `pair` in every lane.
    fn splat(self, pair: u32) -> Self::Pairs;

    /// `sums` + a·b, lane by lane.
    fn dot(self, sums: Self::Sums, a: Self::Pairs, b: Self::Pairs) -> Self::Sums;

    /// Runs `job` compiled for the processor.
    fn run<J: Job>(self, job: J);
}

/// Proof that the processor has the instruction.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Hardware(());

#[cfg(target_arch = "x86_64")]
impl Hardware {
    pub(super) fn try_new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16");
        has.then_some(Self(()))
    }
}

// SAFETY: these are the vectors of 512 bits.
#[cfg(target_arch = "x86_64")]
unsafe impl Dot for Hardware {
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

    fn run<J: Job>(self, job: J) {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        fn inside<J: Job>(job: J) {
            job.run();
        }
        // SAFETY: the processor has them all.
        unsafe { inside(job) };
    }
}

/// Operands as pairs along k.
#[derive(Clone, Copy)]
pub(super) struct Pairs<D, const ROWS: usize, const VECTORS: usize>(pub(super) D);

impl<D: Dot, const ROWS: usize, const VECTORS: usize> Arm for Pairs<D, ROWS, VECTORS> {
    const STEPS: usize = 2;
    const ROWS: usize = ROWS;
    const COLUMNS: usize = VECTORS * LANES;

    fn run<J: Job>(self, job: J) {
        self.0.run(job);
    }

    #[inline(always)]
    unsafe fn tile(self, tile: &Tile) {
        const { assert!(size_of::<D::Sums>() == 64 && size_of::<D::Pairs>() == 64) };
        let place = |row: usize, vector: usize| {
            tile.c
                .wrapping_add(row * tile.stride + vector * LANES)
                .cast::<D::Sums>()
        };
        // SAFETY: all pointers stay within what the caller vouches for, and vectors are plain numbers.
        unsafe {
            let mut sums: [[D::Sums; VECTORS]; ROWS] = std::mem::zeroed();
            if tile.add {
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (vector, sum) in sums.iter_mut().enumerate() {
                        *sum = place(row, vector).read_unaligned();
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
                    place(row, vector).write_unaligned(*sum);
                }
            }
        }
    }
}
