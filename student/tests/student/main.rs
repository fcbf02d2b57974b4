//! Flows of the crate: gradients against finite differences, splits and PyTorch; resumption.

// Lints know test functions, not the functions they share.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

mod dense;
mod draws;
mod evaluation;
mod gradients;
mod other_tokenizers;
mod plain;
mod reference;
mod resume;
mod support;
