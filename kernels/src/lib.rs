//! Custom burn ops of Potstill, each with its CPU (Flex), CubeCL and autodiff forms.
//!
//! An op lives in a folder of its own: the file beside the folder is the public function, the
//! backend trait and what it computes; `flex.rs` is the plain-loop form, `cube.rs` the GPU form,
//! `autodiff.rs` the gradient, and `reference.rs` the same formula in tensor operations, which the
//! tests hold the others to.
//!
//! Dimension suffixes of tensor names: `n` rows (batch × position), `v` vocabulary, `k` support.

mod exp;
mod gemm;
mod rows;
mod simd;

pub use rows::{
    Head, RowOps, RowStats, TAIL_FLOOR_NATS, reference::row_stats_reference, row_stats,
};
