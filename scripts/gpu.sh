#!/usr/bin/env bash
# Runs the checks that need a GPU: first the tests of the CubeCL kernels against their plain-loop and
# tensor-operation twins; then, on CUDA, `potstill-bench` beside PyTorch: the loss alone at the heads of
# 8B models, beside Liger's, and random models of a 0.5B and a 1.5B shape, in f32 and bf16. The tables
# go to target/gpu/.
#
#   scripts/gpu.sh              CUDA (feature cuda): an NVIDIA driver, libnvrtc and the CUDA headers;
#                               PYTHON names the Python with torch and transformers [python3];
#                               with liger-kernel, Liger's losses are measured too
#   scripts/gpu.sh --vulkan     any GPU with a Vulkan driver (feature wgpu: WGSL); kernels alone
#   scripts/gpu.sh --software   no GPU: Mesa's llvmpipe (package mesa-vulkan-drivers), and the benchmark
#                               of the CPU build, if there is one, on the quickstart's teacher
#
# Further arguments go to the test binary, for example: scripts/gpu.sh --nocapture
set -euo pipefail
cd "$(dirname "$0")/.."

features=cuda,fusion
bench=cuda
# The benchmark of the CPU build, looked up before the target directory becomes that of the features.
cpu_build=${CARGO_TARGET_DIR:-target}/release/potstill-bench
if [ ! -x "$cpu_build" ]; then cpu_build=target/release/potstill-bench; fi
export BURN_DEVICE=cuda
case "${1:-}" in
    --vulkan)
        shift
        features=wgpu,fusion
        bench=none
        export BURN_DEVICE=wgpu ;;
    --software)
        shift
        features=wgpu,fusion
        bench=cpu
        # Without `minimal`, autotune compiles for minutes before the first matrix product returns.
        export BURN_DEVICE=wgpu CUBECL_WGPU_DEFAULT_DEVICE=Cpu CUBECL_AUTOTUNE_LEVEL=minimal
        export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-$(mktemp -d)}" ;;
    *)
        # CubeCL panics without the headers, so they are checked first.
        if [ ! -d "${CUDA_PATH:-/usr/local/cuda}/include" ] && [ ! -d /opt/cuda/include ]; then
            echo "gpu.sh: no CUDA headers in ${CUDA_PATH:-/usr/local/cuda}/include" >&2
            echo "hint: set CUDA_PATH to the toolkit, or test on Vulkan with --vulkan or --software" >&2
            exit 1
        fi ;;
esac
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target/${features%%,*}}"
cargo test --release -p potstill-kernels --features "$features" --test it -- rows:: attention:: "$@"

python=${PYTHON:-python3}
tables=target/gpu
mkdir -p "$tables"

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

case "$bench" in
    cuda)
        cargo build --release -p potstill-bench --features "$features"
        for vocabulary in 128256 151936; do
            model=$tables/head-4096-$vocabulary
            head_shape "$model" 4096 "$vocabulary"
            # With teachers of 64 tokens and of 128.
            "$CARGO_TARGET_DIR/release/potstill-bench" "$model" --device cuda --python "$python" \
                --only loss,loss-128,loss-memory --tokens 8192 --type bf16 | tee "$tables/loss-$vocabulary.md"
        done
        for shape in "0.5B 896 24 14 2 4864" "1.5B 1536 28 12 2 8960"; do
            read -r -a sizes <<<"$shape"
            model=$tables/random-${sizes[0]}
            [ -e "$model/config.json" ] || random_model "$model" "${sizes[@]:1}"
            # Capture needs a tokenizer, which such a model does not have.
            "$CARGO_TARGET_DIR/release/potstill-bench" "$model" --device cuda --python "$python" \
                --only step,prefill,decode-32,decode-1,profile | tee "$tables/bench-${sizes[0]}.md"
        done ;;
    cpu)
        if [ -x "$cpu_build" ]; then
            "$cpu_build" examples/quickstart/teacher --quick --tokens 64 | tee "$tables/bench-cpu.md"
            # Beside PyTorch if PYTHON names one.
            "$cpu_build" examples/quickstart/teacher --quick --tokens 64 ${PYTHON:+--python "$PYTHON"} \
                --only loss,loss-memory,step-plain | tee "$tables/loss-cpu.md"
        else
            echo "gpu.sh: no $cpu_build (cargo build --release -p potstill-bench), so the benchmark was not run" >&2
        fi ;;
esac
