//! Tests of the ops from outside.
//!
//! The default build tests Flex. With the feature `wgpu` the tests of `attention` and `rows` run on the GPU
//! that CubeCL finds too; `scripts/gpu.sh` and `.ci/run` show how (software Vulkan serves).

// Clippy counts functions that tests share as library code.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod attention;
mod capture;
mod layers;
mod paged;
mod rows;
