#!/usr/bin/env bash
# Runs the checks of a GPU's code, in the order in which a failure says most:
#
#   kernels   the CubeCL kernels against their plain-loop and tensor-operation twins
#   nvrtc     the CUDA C++ of all kernels, compiled for sm_80 and sm_90 (needs no GPU; scripts/nvrtc.py)
#   run       a whole run beside the CPU's, killed once and resumed, and what the device refuses (tests/gpu)
#   bench     on CUDA, beside PyTorch: the loss alone at the heads of 8B models, beside Liger's and QuACK's;
#             the step of random models of a 0.5B and a 1.5B shape at 4,096 tokens, in f32 and bf16, beside
#             transformers with and without Liger and FlashAttention; prefill, decode, profile
#
# The tables go to target/gpu/. What was never seen on hardware is listed in docs/gpu.md.
#
#   scripts/gpu.sh [PARTS]              CUDA (feature cuda): an NVIDIA driver, libnvrtc and the CUDA headers;
#                                       PYTHON names the Python with torch and transformers [python3], and if
#                                       they are there with liger-kernel, quack-kernels and flash-attn
#   scripts/gpu.sh --vulkan [PARTS]     any GPU with a Vulkan driver (feature wgpu: WGSL); no bench
#   scripts/gpu.sh --software [PARTS]   no GPU: Mesa's llvmpipe (package mesa-vulkan-drivers); the bench is
#                                       that of the CPU build, if there is one, on the quickstart's teacher
#
# PARTS are some of the names above [all], separated by commas. CARGO is the cargo command, with its options
# [cargo]. Where PREBUILT names a folder with the programs `it`, `gpu`, `potstill` and `potstill-bench` of an
# earlier build with the same features, nothing is built.
set -euo pipefail
cd "$(dirname "$0")/.."

backend=cuda
bench=cuda
# The benchmark of the CPU build, looked up before the target directory becomes that of the features.
cpu_build=${CARGO_TARGET_DIR:-target}/release/potstill-bench
if [ ! -x "$cpu_build" ]; then cpu_build=target/release/potstill-bench; fi
case "${1:-}" in
    --vulkan)
        shift
        backend=wgpu
        bench=none ;;
    --software)
        shift
        backend=wgpu
        bench=cpu
        # Without `minimal`, autotune compiles for minutes before the first matrix product returns.
        export CUBECL_WGPU_DEFAULT_DEVICE=Cpu CUBECL_AUTOTUNE_LEVEL=minimal
        export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-$(mktemp -d)}" ;;
    *)
        # CubeCL panics without the headers, so they are checked first.
        if [ ! -d "${CUDA_PATH:-/usr/local/cuda}/include" ] && [ ! -d /opt/cuda/include ]; then
            echo "gpu.sh: no CUDA headers in ${CUDA_PATH:-/usr/local/cuda}/include" >&2
            echo "hint: set CUDA_PATH to the toolkit, or test on Vulkan with --vulkan or --software" >&2
            exit 1
        fi ;;
esac
export BURN_DEVICE=$backend
parts=,${1:-kernels,nvrtc,run,bench},
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target/$backend}"
read -r -a cargo <<<"${CARGO:-cargo}"
# The same packages and features in each command, so that burn is compiled once.
packages=(-p potstill -p potstill-kernels --features "$backend,fusion,potstill-kernels/cuda-sources")
python=${PYTHON:-python3}
tables=target/gpu
mkdir -p "$tables"

wanted() { [[ $parts == *,$1,* ]]; }
part() { printf '\n-- %s (%s)\n' "$*" "$(date +%T)"; }

# Runs a test program: that of PREBUILT, or cargo's.
tests() { # program, arguments
    local program=$1
    shift
    if [ -n "${PREBUILT:-}" ]; then
        POTSTILL_BINARY=$(realpath "$PREBUILT/potstill") "$PREBUILT/$program" "$@"
    else
        "${cargo[@]}" test --release "${packages[@]}" --test "$program" -- "$@"
    fi
}

if wanted kernels; then
    part "kernels on $backend"
    tests it rows:: attention::
fi

if wanted nvrtc && [ -z "${PREBUILT:-}" ]; then
    part "CUDA C++ of the kernels"
    rm -rf "$tables/cuda"
    # `cargo run` takes a single package.
    "${cargo[@]}" build --release "${packages[@]}" --example cuda_sources
    "$CARGO_TARGET_DIR/release/examples/cuda_sources" "$tables/cuda"
    scripts/nvrtc.py "$tables/cuda"
fi

if wanted run; then
    part "a whole run on $backend"
    tests gpu --nocapture --test-threads 1
fi

# Writes a random model in bf16, for measurements of time and memory.
random_model() { # folder, width, layers, heads, key heads, inner width
    "$python" - "$@" <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

folder, *sizes = sys.argv[1:]
names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"]
sizes = dict(zip(names, map(int, sizes)))
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=151_936,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    dtype="bfloat16",
    **sizes,
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
PY
}

# Writes the configuration of a model without weights, which the loss alone needs.
head_shape() { # folder, width, vocabulary
    mkdir -p "$1"
    cat >"$1/config.json" <<JSON
{
  "model_type": "llama", "hidden_size": $2, "vocab_size": $3, "intermediate_size": 14336,
  "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192,
  "tie_word_embeddings": false, "hidden_act": "silu"
}
JSON
}

# A part that fails is an entry of the table or a message, and the next one is measured.
measure() { # table, arguments of potstill-bench
    local table=$1
    shift
    "$bench_program" "$@" | tee "$tables/$table.md" || echo "gpu.sh: $table failed" >&2
}

if wanted bench && [ "$bench" = cuda ]; then
    part "benchmark on $backend"
    if [ -n "${PREBUILT:-}" ]; then
        bench_program=$PREBUILT/potstill-bench
    else
        "${cargo[@]}" build --release -p potstill-bench "${packages[@]}"
        bench_program=$CARGO_TARGET_DIR/release/potstill-bench
    fi
    for vocabulary in 128256 151936; do
        model=$tables/head-4096-$vocabulary
        head_shape "$model" 4096 "$vocabulary"
        # With teachers of 64 tokens and of 128.
        measure "loss-$vocabulary" "$model" --device cuda --python "$python" \
            --only loss,loss-128,loss-memory --tokens 8192 --type bf16
    done
    for shape in "0.5B 896 24 14 2 4864" "1.5B 1536 28 12 2 8960"; do
        read -r -a sizes <<<"$shape"
        model=$tables/random-${sizes[0]}
        [ -e "$model/config.json" ] || random_model "$model" "${sizes[@]:1}"
        measure "step-${sizes[0]}" "$model" --device cuda --python "$python" --only step-peers --tokens 4096
        # Capture needs a tokenizer, which such a model does not have.
        measure "bench-${sizes[0]}" "$model" --device cuda --python "$python" \
            --only prefill,decode-32,decode-1,profile
    done
fi

if wanted bench && [ "$bench" = cpu ]; then
    part "benchmark of the CPU build"
    if [ -x "$cpu_build" ]; then
        "$cpu_build" examples/quickstart/teacher --quick --tokens 64 | tee "$tables/bench-cpu.md"
        # Beside PyTorch if PYTHON names one.
        "$cpu_build" examples/quickstart/teacher --quick --tokens 64 ${PYTHON:+--python "$PYTHON"} \
            --only loss,loss-memory,step-plain | tee "$tables/loss-cpu.md"
    else
        echo "gpu.sh: no $cpu_build (cargo build --release -p potstill-bench), so the benchmark was not run" >&2
    fi
fi
