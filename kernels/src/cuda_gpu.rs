//! The properties of a GPU as CubeCL's CUDA runtime reports them, and kernels that are expanded for it; see `cuda_sources`.

use std::sync::Arc;

use cubecl::cmma::MatrixLayout;
use cubecl::ir::features::Plane;
use cubecl::ir::{
    ContiguousElements, DeviceIdentity, ElemType, FloatKind, HardwareProperties, IntKind,
    MemoryDeviceProperties, MmaProperties,
};
use cubecl::prelude::*;
use cubecl::profile::TimingMethod;
use cubecl_cpp::cuda::mma::manual::contiguous_elements_cuda;
use cubecl_cpp::shared::{CompilationOptions, CppSupportedFeatures};

/// A kernel with the arguments that are fixed when it is compiled.
pub(crate) struct KernelVariant {
    pub(crate) name: String,
    pub(crate) kernel: Box<dyn CubeKernel>,
}

impl KernelVariant {
    pub(crate) fn new(name: String, kernel: impl CubeKernel) -> Self {
        Self {
            name,
            kernel: Box::new(kernel),
        }
    }
}

/// A GPU, as far as our kernels depend on it.
pub(crate) struct CudaGpu {
    pub(crate) properties: Arc<DeviceProperties>,
    pub(crate) target: Arc<TargetProperties>,
    pub(crate) options: CompilationOptions,
}

impl CudaGpu {
    /// The values are those of `cubecl-cuda` 0.11, `runtime.rs`.
    pub(crate) fn new(compute_capability: u32) -> Self {
        let memory = MemoryDeviceProperties::new(1 << 34, 512);
        let identity = DeviceIdentity {
            name: format!("compute capability {compute_capability}"),
            fingerprint: format!("ptx_sm{compute_capability}"),
            physical: None,
        };
        let timing = TimingMethod::Device;
        let mut properties =
            DeviceProperties::new(Default::default(), memory, hardware(), timing, identity);
        cubecl_cpp::register_supported_types(&mut properties);
        properties.features.copy_async = true;
        properties.features.memory_reinterpret = true;
        properties.features.alignment = true;
        properties.features.device_memory_scope = true;
        for feature in [Plane::Ops, Plane::Sync, Plane::NonUniformControlFlow] {
            properties.features.plane.insert(feature);
        }
        let hopper = compute_capability >= 90;
        properties.features.cube_cluster = hopper;
        Self {
            properties: Arc::new(properties),
            target: Arc::new(TargetProperties { mma: products() }),
            options: CompilationOptions {
                warp_size: 32,
                supports_features: CppSupportedFeatures {
                    grid_constants: true,
                    clusters: hopper,
                    fast_math: true,
                    fast_tanh: true,
                    elect_sync: hopper,
                    dp4a: true,
                },
                amd_wmma: None,
            },
        }
    }

    /// Settings of a kernel whose cubes have `units` units in one dimension.
    pub(crate) fn settings(&self, units: u32, mode: ExecutionMode) -> KernelSettings {
        KernelSettings::new(CubeDim::new_1d(units).into(), mode, AddressType::U32)
    }
}

fn hardware() -> HardwareProperties {
    HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 1024,
        max_shared_memory_size: 163 << 10,
        max_cube_count: (i32::MAX as u32, 65_535, 65_535),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: Some(108),
        num_cpu_cores: None,
        last_level_cache_size: None,
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        max_vector_size: VectorSize::MAX,
        cube_mma_reserved_shared_memory: 0,
    }
}

fn products() -> MmaProperties {
    MmaProperties {
        register_size_bits: 32,
        const_plane_size: 32,
        register_layout_a: MatrixLayout::RowMajor,
        register_layout_b: MatrixLayout::ColMajor,
        register_layout_acc: MatrixLayout::RowMajor,
        register_duplication_a: 1,
        register_duplication_b: 1,
        register_duplication_acc: 1,
        contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
    }
}

/// A tensor argument with a buffer of its own.
pub(crate) fn tensor() -> TensorCompilationArg {
    aliased_tensor(None)
}

/// A tensor argument that is written over the argument at a position.
pub(crate) fn aliased_tensor(position: Option<usize>) -> TensorCompilationArg {
    TensorCompilationArg {
        meta: TensorMetaCompilationArg { len: (), rank: () },
        buffer: BufferCompilationArg { inplace: position },
    }
}

/// The types of numbers that kernels compute with on a GPU, with the name and the size in bytes of each.
pub(crate) const FLOATS: [(&str, usize, ElemType); 3] = [
    ("f32", 4, F32),
    ("f16", 2, ElemType::Float(FloatKind::F16)),
    ("bf16", 2, ElemType::Float(FloatKind::BF16)),
];
pub(crate) const F32: ElemType = ElemType::Float(FloatKind::F32);
pub(crate) const F64: ElemType = ElemType::Float(FloatKind::F64);
pub(crate) const I32: ElemType = ElemType::Int(IntKind::I32);
