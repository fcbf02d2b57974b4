#!/usr/bin/env bash
# Tests of the CubeCL kernels against their plain-loop and tensor-operation twins, on a GPU.
#
#   scripts/gpu.sh              CUDA (feature cuda): an NVIDIA driver, libnvrtc and the CUDA headers
#   scripts/gpu.sh --vulkan     any GPU with a Vulkan driver (feature wgpu: WGSL)
#   scripts/gpu.sh --software   no GPU: Mesa's llvmpipe (package mesa-vulkan-drivers)
#
# What follows goes to cargo, for example: scripts/gpu.sh -- --nocapture
set -euo pipefail
cd "$(dirname "$0")/.."

features=cuda,fusion
export BURN_DEVICE=cuda
case "${1:-}" in
    --vulkan)
        shift
        features=wgpu,fusion
        export BURN_DEVICE=wgpu ;;
    --software)
        shift
        features=wgpu,fusion
        # Without `minimal`, autotune compiles for minutes before the first matrix product returns.
        export BURN_DEVICE=wgpu CUBECL_WGPU_DEFAULT_DEVICE=Cpu CUBECL_AUTOTUNE_LEVEL=minimal
        export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-$(mktemp -d)}" ;;
    *)
        # CubeCL panics without them; a sentence is kinder.
        if [ ! -d "${CUDA_PATH:-/usr/local/cuda}/include" ] && [ ! -d /opt/cuda/include ]; then
            echo "gpu.sh: no CUDA headers in ${CUDA_PATH:-/usr/local/cuda}/include: set CUDA_PATH to the toolkit," \
                "or test on Vulkan with --vulkan or --software" >&2
            exit 1
        fi ;;
esac
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target/${features%%,*}}"
cargo test --release -p potstill-kernels --features "$features" --test rows "$@"
