#!/usr/bin/env bash
# Fuzzes the parsers of foreign bytes with libFuzzer and AddressSanitizer. The targets are the functions of
# tests/parsers/, which `cargo test --test parsers` runs on seeds and some thousand mutations.
#
#   scripts/fuzz.sh TARGET [SECONDS]   one target [300]
#   scripts/fuzz.sh all [SECONDS]      each target in turn, each for that long [300]
#   scripts/fuzz.sh list               the names of the targets
#
# It needs a nightly toolchain and `cargo install cargo-fuzz`. NIGHTLY names the toolchain [nightly]; FEATURES="" leaves out
# the targets that need burn, which takes long to build.
#
# What is found along the way goes to fuzz/corpus/TARGET and is the start of the next round. The last lines that libFuzzer
# prints are the number of runs, and the coverage as `cov` (edges) and `ft` (features). An input that fails is written to
# fuzz/artifacts/TARGET, and the exit code is 1: make it small with `cargo +nightly fuzz tmin TARGET FILE`, mend the fault,
# and put the input into tests/parsers/corpus/TARGET, where each test run repeats it.
#
# An input fails that panics, takes over 20 seconds or 4 GB, or breaks what the target asserts.
set -euo pipefail
cd "$(dirname "$0")/.."

nightly=${NIGHTLY:-nightly}
features=${FEATURES-models}
target=${1:?usage: scripts/fuzz.sh TARGET|all|list [SECONDS]}
seconds=${2:-300}

names() { sed -n 's/^name = "\(.*\)"$/\1/p' fuzz/Cargo.toml | tail -n +2; }
if [ "$target" = list ]; then
    names
    exit
fi

dictionary() {
    case "$1" in
        template) echo jinja ;;
        run_file) echo toml ;;
        gguf) echo gguf ;;
        *) echo json ;;
    esac
}

# The versions of the workspace, so that what is fuzzed is what is built.
cp Cargo.lock fuzz/Cargo.lock
POTSTILL_SEEDS=$PWD/fuzz/seeds cargo test --release --test parsers -q seeds
options=(--sanitizer address --no-default-features --features "$features")
cargo "+$nightly" fuzz build "${options[@]}"

# The targets write their files here.
TMPDIR=$(mktemp -d -p "$([ -d /dev/shm ] && echo /dev/shm || echo /tmp)")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

failed=0
for name in $([ "$target" = all ] && names || echo "$target"); do
    mkdir -p "fuzz/corpus/$name" "fuzz/seeds/$name"
    echo "== $name"
    cargo "+$nightly" fuzz run "${options[@]}" "$name" "fuzz/corpus/$name" "fuzz/seeds/$name" -- \
        -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -max_len=65536 -print_final_stats=1 \
        -dict="fuzz/dictionaries/$(dictionary "$name").dict" || failed=1
done
exit $failed
