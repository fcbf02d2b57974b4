//! Tests of the real binary with a tiny random model, in temporary folders.

// Clippy allows `unwrap` in test functions, but not in functions that tests share.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod docs;
mod earlier;
mod events;
mod first_hour;
mod fixture;
mod hub;
// The tests of the crate `teacher` use the rest of the server.
#[allow(dead_code)]
#[path = "../../teacher/tests/it/hub/server.rs"]
mod hub_server;
mod limits_http;
mod losses;
mod mistakes;
mod odd_data;
mod own_text;
mod plan;
mod real;
mod render;
mod reports;
mod runs;
mod sampling;
mod secure;
mod served;
mod students;
mod tampered;
mod terminal;
mod tokens;
mod training;
mod untrainable;
