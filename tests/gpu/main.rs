//! The whole run on a GPU's code, compared with the same run on the CPU: collect, score, train, export, eval and
//! report. `BURN_DEVICE` names the device; `scripts/gpu.sh --software` runs these tests on a Vulkan driver that computes
//! on the CPU. The numbers in the assertions are explained beside them.

#![cfg(any(feature = "wgpu", feature = "vulkan", feature = "cuda"))]
// Clippy allows `unwrap` and printing in test functions, but not in functions that tests share.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

// The tests on the CPU use the rest of it.
#[allow(dead_code)]
#[path = "../cli/fixture.rs"]
mod fixture;

mod refused;
mod whole_run;

/// The device that is tested.
fn device() -> String {
    std::env::var("BURN_DEVICE").unwrap_or_else(|_| "wgpu".to_owned())
}
