//! Invariants of `docs/architecture.md` that can be checked on the manifests, the sources and the command
//! line.

// Clippy counts functions that tests share as library code.
#![allow(clippy::unwrap_used)]

mod command_line;
mod dependencies;
mod modules;
mod names;
mod pages;
mod rules;
mod sources;
mod words;

use std::path::Path;

/// Each crate's folder and name, and the crates of the workspace that it may use.
const CRATES: [(&str, &str, &[&str]); 8] = [
    ("datasets", "potstill-datasets", &[]),
    ("kernels", "potstill-kernels", &[]),
    ("model", "potstill-model", &["potstill-kernels"]),
    (
        "teacher",
        "potstill-teacher",
        &["potstill-datasets", "potstill-kernels", "potstill-model"],
    ),
    (
        "student",
        "potstill-student",
        &["potstill-datasets", "potstill-kernels", "potstill-model"],
    ),
    ("eval", "potstill-eval", &["potstill-datasets"]),
    (
        "src",
        "potstill",
        &[
            "potstill-datasets",
            "potstill-eval",
            "potstill-kernels",
            "potstill-model",
            "potstill-student",
            "potstill-teacher",
        ],
    ),
    ("benches", "potstill-bench", &["potstill"]),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
