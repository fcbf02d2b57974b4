//! Custom burn ops of Potstill, each with its CPU (Flex), CubeCL and autodiff forms.
//!
//! An op lives in a folder of its own: the file beside the folder is the public function, the
//! backend trait and what it computes; `flex.rs` is the plain-loop form, `cube.rs` the GPU form,
//! `autodiff.rs` the gradient, and `reference.rs` the same formula in tensor operations, which the
//! tests hold the others to.
//!
//! Dimension suffixes of tensor names: `n` rows (batch × position), `v` vocabulary, `k` support,
//! `c` ids that a support holds besides its top-k, `m` draws from the tail.

mod adamw;
mod attention;
mod capture;
mod embedding;
mod exp;
mod flex;
mod gemm;
mod linear;
mod memory;
mod norm;
mod paged;
mod rotary;
mod rows;
mod simd;
mod swiglu;
mod weights;

pub use adamw::{AdamStep, adamw, adamw_reference, sum_of_squares};
pub use attention::{Attention, AttentionOps, attention, attention_reference};
pub use capture::{Capture, CaptureRow, Captured, capture, reference::capture_reference};
pub use embedding::add_rows;
pub use linear::{
    linear, linear_input_gradient, linear_into, linear_pair, linear_weight_gradient,
    linear_weight_gradient_wide,
};
pub use memory::{one_heap, trim_heap};
pub use norm::{rms_norm, rms_norm_reference};
pub use paged::{PagedRow, paged_attention, paged_attention_reference, write_slots};
pub use rotary::{rotary, rotary_reference};
pub use rows::{
    EMPTY_NATS, Head, MASKED, RowOps, RowStats, Sum, TAIL_FLOOR_NATS,
    reference::row_stats_reference, row_gradient, row_stats,
};
pub use swiglu::{swiglu, swiglu_linear, swiglu_reference};
pub use weights::{largest_logit, softmax_weights};
