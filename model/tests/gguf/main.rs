//! Tests of GGUF: codecs against gguf-py and llama-quantize, files, and bad input.

// The lints' exceptions for tests cover test functions only, not the functions that they call.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod codecs;

use std::path::{Path, PathBuf};

/// Returns the path of a file that `make_gguf.py` made.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}
