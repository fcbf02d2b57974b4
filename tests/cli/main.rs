//! Flows of the real binary over a tiny random model, in temporary folders.

// Lints know test functions, not the functions they share.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod docs;
mod events;
mod first_hour;
mod fixture;
mod losses;
mod mistakes;
mod real;
mod render;
mod reports;
mod runs;
mod secure;
mod served;
