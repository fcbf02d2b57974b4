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

/// As [`vectorize`], for a closure; it is marked `#[inline(always)]` where it is written.
///
/// A closure that borrows is called through a shim where it is taken as `FnOnce`, and the shim is not
/// always inlined: the loops are then compiled for the least of processors.
#[inline(always)]
pub(crate) fn vectorize_closure<R>(work: impl FnMut() -> R) -> R {
    struct Closure<F>(F);
    impl<R, F: FnMut() -> R> WithSimd for Closure<F> {
        type Output = R;

        #[inline(always)]
        fn with_simd<S: Simd>(mut self, _: S) -> R {
            (self.0)()
        }
    }
    vectorize(Closure(work))
}
