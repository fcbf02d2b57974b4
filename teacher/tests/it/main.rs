//! Tests of the crate from outside: teachers behind a server and, with the feature `local`, local
//! checkpoints.

// Clippy counts functions that tests share as library code.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod http;
mod hub;
#[cfg(feature = "local")]
mod local;
