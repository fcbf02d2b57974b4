#!/usr/bin/env bash
# Runs the tests of the unsafe code under AddressSanitizer, and under Miri where Miri can run it.
#
#   scripts/sanitize.sh          both
#   scripts/sanitize.sh asan     all tests of `potstill-kernels`, which has all unsafe code but one line, with the loops for
#                                this processor; and the tests that read GGUF files, whose header is mapped into memory
#                                (the one line, in model/src/files.rs)
#   scripts/sanitize.sh miri     small products of `kernels::gemm` without the vectors of a processor: bounds, uninitialised
#                                memory and aliasing of tiles, packing and outputs
#
# It needs a nightly toolchain, and for Miri `rustup component add miri rust-src --toolchain nightly`. NIGHTLY names the
# toolchain [nightly]. Not covered: kernels of a GPU, and AVX-512 BF16 on a processor without it.
set -euo pipefail
cd "$(dirname "$0")/.."

nightly=${NIGHTLY:-nightly}
what=${1:-both}
target=$(rustc -vV | sed -n 's/^host: //p')
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target/sanitize}

if [ "$what" != miri ]; then
    # An instrumented allocator keeps freed memory for a while, and leaks are not what is looked for.
    export ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=64
    RUSTFLAGS=-Zsanitizer=address cargo "+$nightly" test --release --target "$target" -p potstill-kernels
    RUSTFLAGS=-Zsanitizer=address cargo "+$nightly" test --release --target "$target" -p potstill-model --test gguf
fi
if [ "$what" != asan ]; then
    # The tests read the features of the processor, and the buffers of a thread live as long as it.
    MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-ignore-leaks" \
        cargo "+$nightly" miri test -p potstill-kernels --lib small_products
fi
