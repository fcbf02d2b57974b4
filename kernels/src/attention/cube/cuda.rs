//! The variants of the attention kernels that are launched on CUDA, for some widths of heads.

use cubecl::prelude::*;

use super::block::UNITS;
use super::forward::forward_kernel::ForwardKernel;
use super::gradient::key_gradient_kernel::KeyGradientKernel;
use super::gradient::query_gradient_kernel::QueryGradientKernel;
use super::gradient::row_constants_kernel::RowConstantsKernel;
use super::gradient::sink_gradient_kernel::SinkGradientKernel;
use crate::cuda_gpu::{CudaGpu, FLOATS, KernelVariant, tensor};

/// Widths of a head of keys and of values: usual ones, an odd one, latent attention's, and the largest.
const WIDTHS: [(usize, usize); 5] = [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256)];

pub(crate) fn cuda_kernels(gpu: &CudaGpu) -> Vec<KernelVariant> {
    let settings = || gpu.settings(UNITS, ExecutionMode::Checked);
    let gpu_properties = || (gpu.properties.clone(), gpu.target.clone());
    let (properties, target) = gpu_properties();
    let sinks =
        SinkGradientKernel::new(settings(), properties, target, tensor(), tensor(), tensor());
    let mut variants = vec![KernelVariant::new("sink-gradient".to_owned(), sinks)];
    for (name, _, dtype) in FLOATS {
        for (e, w) in WIDTHS {
            let (properties, target) = gpu_properties();
            let constants = RowConstantsKernel::new(
                settings(),
                properties,
                target,
                tensor(),
                tensor(),
                tensor(),
                tensor(),
                w,
                dtype,
            );
            variants.push(KernelVariant::new(
                format!("row-constants-{name}-{e}x{w}"),
                constants,
            ));
            for capped in [false, true] {
                let name = format!("{name}-{e}x{w}{}", if capped { "-softcap" } else { "" });
                // The three have arguments of the same kinds.
                macro_rules! push {
                    ($kernel:ident, $prefix:literal) => {{
                        let (properties, target) = gpu_properties();
                        let kernel = $kernel::new(
                            settings(),
                            properties,
                            target,
                            tensor(),
                            tensor(),
                            tensor(),
                            tensor(),
                            tensor(),
                            tensor(),
                            tensor(),
                            (),
                            (),
                            capped,
                            e,
                            w,
                            dtype,
                        );
                        let name = format!(concat!($prefix, "-{}"), name);
                        variants.push(KernelVariant::new(name, kernel));
                    }};
                }
                push!(ForwardKernel, "forward");
                push!(KeyGradientKernel, "key-gradient");
                push!(QueryGradientKernel, "query-gradient");
            }
        }
    }
    variants
}
