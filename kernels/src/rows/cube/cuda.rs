//! The variants of the row kernels that are launched on CUDA.

use cubecl::prelude::*;

use super::gradient::gradient_kernel::GradientKernel;
use super::row::UNITS;
use super::stats::stats_kernel::StatsKernel;
use crate::cuda_gpu::{CudaGpu, F32, F64, FLOATS, I32, KernelVariant, aliased_tensor, tensor};

/// Rows of any alignment: vectors of 16 bytes, or single numbers.
pub(crate) fn cuda_kernels(gpu: &CudaGpu) -> Vec<KernelVariant> {
    let mut variants = Vec::new();
    for (name, size, dtype) in FLOATS.into_iter().chain([("f64", 8, F64)]) {
        for lanes in [16 / size, 1] {
            for capped in [false, true] {
                let name = format!("{name}-{lanes}{}", if capped { "-softcap" } else { "" });
                for summed in [false, true] {
                    let name = format!("stats-{name}{}", if summed { "-sum" } else { "" });
                    let kernel = StatsKernel::new(
                        gpu.settings(UNITS as u32, ExecutionMode::Unchecked),
                        gpu.properties.clone(),
                        gpu.target.clone(),
                        tensor(),
                        tensor(),
                        tensor(),
                        (),
                        (),
                        (),
                        (),
                        lanes,
                        capped,
                        summed,
                        true,
                        true,
                        [dtype, I32],
                    );
                    variants.push(KernelVariant::new(name, kernel));
                }
                for in_place in [false, true] {
                    let kernel = GradientKernel::new(
                        gpu.settings(UNITS as u32, ExecutionMode::Unchecked),
                        gpu.properties.clone(),
                        gpu.target.clone(),
                        tensor(),
                        tensor(),
                        tensor(),
                        tensor(),
                        aliased_tensor(in_place.then_some(0)),
                        (),
                        (),
                        (),
                        (),
                        lanes,
                        capped,
                        true,
                        [dtype, I32, if dtype == F64 { F64 } else { F32 }],
                    );
                    let name =
                        format!("gradient-{name}{}", if in_place { "-in-place" } else { "" });
                    variants.push(KernelVariant::new(name, kernel));
                }
            }
        }
    }
    variants
}
