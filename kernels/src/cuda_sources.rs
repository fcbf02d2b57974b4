//! The CUDA C++ of the CubeCL kernels, made without CUDA and without a GPU.
//!
//! Each kernel is expanded as CubeCL's CUDA runtime expands it when it is launched, in every variant that the ops
//! launch, so that NVRTC (`scripts/nvrtc.py`) can compile all of them on any machine.

use cubecl::{CompilationError, Compiler, define_kernel};
use cubecl_cpp::shared::CppCompiler;
use cubecl_cpp::target::Cuda;

use crate::cuda_gpu::{CudaGpu, KernelVariant};
use crate::{attention, rows};

/// A kernel in CUDA C++.
pub struct CudaSource {
    /// The kernel and its variant, usable as the name of a file.
    pub name: String,
    /// The text that NVRTC compiles.
    pub text: String,
}

/// Returns all variants of all kernels for GPUs of a compute capability, 80 for 8.0.
///
/// # Errors
/// Returns CubeCL's error for a kernel that has no form in CUDA C++.
pub fn cuda_sources(compute_capability: u32) -> Result<Vec<CudaSource>, CompilationError> {
    let gpu = CudaGpu::new(compute_capability);
    let kernels = [rows::cuda_kernels(&gpu), attention::cuda_kernels(&gpu)];
    let source = |variant: KernelVariant| {
        let definition = define_kernel(&*variant.kernel)?;
        let compiled = CppCompiler::<Cuda>::default().compile(definition, &gpu.options)?;
        Ok(CudaSource {
            name: variant.name,
            text: compiled.source,
        })
    };
    kernels.into_iter().flatten().map(source).collect()
}
