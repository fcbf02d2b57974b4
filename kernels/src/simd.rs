//! The widest vectors the processor has, chosen at run time.

use pulp::{Simd, WithSimd};

/// Runs `op` compiled for the processor's vectors: AVX-512, AVX2 with FMA, NEON, or one number at a
/// time. A closure is vectorised by the compiler where its loops allow it.
#[inline]
pub(crate) fn vectorize<Op: WithSimd>(op: Op) -> Op::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = pulp::x86::V4::try_new() {
            return Simd::vectorize(simd, op);
        }
        // `pulp::Arch` knows this one only with a feature that `gemm` does not set.
        if let Some(simd) = pulp::x86::V3::try_new() {
            return Simd::vectorize(simd, op);
        }
    }
    pulp::Arch::new().dispatch(op)
}
