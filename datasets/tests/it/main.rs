//! Tests of the crate from outside.

// Clippy counts functions that tests share as library code.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod store;
mod text;
