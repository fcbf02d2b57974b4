//! Tests of the public API of the ops.
//!
//! The default build tests Flex. With the feature `wgpu` the tests of `attention` and `rows` also run on the GPU that
//! CubeCL finds, which may be a software Vulkan driver; `scripts/gpu.sh` and `.ci/run` run them.

// The lints' exceptions for tests cover test functions only, not the functions that they call.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod attention;
mod capture;
mod layers;
mod paged;
mod rows;
