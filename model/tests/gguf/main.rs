//! Tests of GGUF: codecs against gguf-py and llama-quantize, files, and bad input.

// The lints' exceptions for tests cover test functions only, not the functions that they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod bad_input;
mod codecs;
mod reading;
mod round_trip;

use std::path::{Path, PathBuf};

/// Returns the path of a file that `make_gguf.py` made.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// Returns a path in the folder of real models, or `None` after printing why the test is skipped.
fn real(part: &str) -> Option<PathBuf> {
    let Some(root) = std::env::var_os("POTSTILL_REAL") else {
        eprintln!("skipped: POTSTILL_REAL is not set");
        return None;
    };
    let path = PathBuf::from(root).join(part);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: POTSTILL_REAL has no {part}");
    None
}
