//! Dispatch to the widest vectors that the processor has, at run time.

use pulp::{Simd, WithSimd};

/// Runs `op` compiled for the processor's vectors: AVX-512, AVX2 with FMA, NEON, or one number at a time.
#[inline]
pub(crate) fn vectorize<Op: WithSimd>(op: Op) -> Op::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = pulp::x86::V4::try_new() {
            return Simd::vectorize(simd, op);
        }
        // `pulp::Arch` tries AVX2 only with a feature of pulp that `gemm` does not set.
        if let Some(simd) = pulp::x86::V3::try_new() {
            return Simd::vectorize(simd, op);
        }
    }
    pulp::Arch::new().dispatch(op)
}

/// Runs a closure as [`vectorize`] does; the compiler vectorises its loops where they allow it. The caller
/// marks the closure `#[inline(always)]`.
///
/// The bound is `FnMut` because a borrowing closure that is taken as `FnOnce` is called through a shim. The
/// shim is not always inlined, and then the loops are compiled for the baseline processor.
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
