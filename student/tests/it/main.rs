//! Integration tests of the crate: gradients against finite differences, splits and PyTorch; resumption.

// Lints exempt test functions, but not the functions that tests share.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

mod check;
mod controls;
mod curves;
mod dense;
mod draws;
mod evaluation;
mod evaluation_golden;
mod families;
mod gradients;
mod guard;
mod head_loss;
mod interrupted;
mod loading;
mod losses;
mod losses_bounds;
mod losses_cases;
mod losses_golden;
mod losses_reference;
mod memory;
mod other_tokenizers;
mod own_text;
mod plain;
mod precision;
mod reference;
mod replicas;
mod resume;
mod support;
mod trainable;
mod transform;
mod unigram;
