//! Custom burn ops of Potstill, each with its CPU (Flex), CubeCL and autodiff forms.
//!
//! | op | files | Flex | CubeCL | gradient |
//! |---|---|---|---|---|
//! | row statistics of logits over a support, and their gradient | `rows`, `rows/` | yes | yes | yes |
//! | causal attention within documents, for training | `attention`, `attention/` | yes | yes | yes |
//! | attention over a paged KV cache, for generation | `paged`, `paged/` | yes | tensor operations | none |
//! | capture of a teacher's sparse distribution | `capture`, `capture/` | yes | tensor operations | none |
//! | linear layers | `linear`, on the products of `gemm` | f32, bf16 | burn's | yes |
//! | linear layers over frozen weights in ggml's blocks | `blocks`, `blocks/` | f32, bf16 | tensor operations | of the input |
//! | bias, RMS norm, gated activations, rotary positions | `bias`, `norm`, `gated`, `rotary` | yes | tensor operations | yes |
//! | AdamW step, also with masters and 8-bit moments, sum of squares | `adamw`, `adamw/` | yes | tensor operations | none |
//! | orthogonalisation for Muon | `newton_schulz` | by `linear` | by `linear` | none |
//! | row-wise accumulation into an embedding table | `embedding` | yes | tensor operations | none |
//! | softmax weights of one row in host memory | `weights` | host slices | none | none |
//!
//! The file with the op's name holds the public function, the backend trait and the formula. In the folder
//! beside it, `flex.rs` is the plain-loop form, `cube.rs` the GPU form, `autodiff.rs` the gradient, and
//! `reference.rs` the same formula in tensor operations. The tests compare the other forms with the
//! reference. A small op has all its forms in one file.
//!
//! Shared by the ops: `flex` (CPU tensors as slices), `float` (the types that loops are generic over), `exp`
//! (a vectorisable exponential), `simd` (dispatch on the processor's vectors) and `gemm` (matrix products).
//!
//! Dimension suffixes of tensor names: `n` rows (batch × position), `v` vocabulary, `k` support size, `c`
//! columns of all heads (in `capture`: extra ids of a support), `m` tail draws, `d` model width, `e` width of
//! one head, `i` inputs and `o` outputs of a linear layer, `s` slots of a KV-cache pool.

mod adamw;
mod attention;
mod bias;
mod blocks;
mod capture;
#[cfg(feature = "cuda-sources")]
mod cuda_gpu;
#[cfg(feature = "cuda-sources")]
mod cuda_sources;
mod embedding;
mod exp;
mod flex;
mod float;
mod gated;
mod gemm;
mod linear;
mod memory;
mod newton_schulz;
mod norm;
mod paged;
mod rotary;
mod rows;
mod simd;
mod team;
#[cfg(test)]
mod test_numbers;
mod weights;

pub use adamw::eight_bit::{BLOCK, ByteMoment, adamw_8bit, adamw_8bit_reference, dynamic_codes};
pub use adamw::{AdamStep, adamw, adamw_master, adamw_reference, sum_of_squares};
pub use attention::{AttentionOps, AttentionOptions, attention, attention_reference};
pub use bias::{add_bias, linear_biased};
pub use blocks::{
    BlockMatrix, BlockType, dequantize, dequantize_into, linear_blocks, linear_blocks_reference,
    quantize,
};
pub use capture::{CaptureOptions, CaptureRow, Captured, capture, reference::capture_reference};
#[cfg(feature = "cuda-sources")]
pub use cuda_sources::{CudaSource, cuda_sources};
pub use embedding::add_rows;
pub use gated::{GateActivation, gated, gated_linear, gated_reference};
pub use linear::{
    linear, linear_input_gradient, linear_into, linear_pair, linear_weight_gradient,
    linear_weight_gradient_f32,
};
pub use memory::{ReportingHeap, trim_heap, use_one_heap};
pub use newton_schulz::newton_schulz;
pub use norm::{rms_norm, rms_norm_as, rms_norm_reference};
pub use paged::{PagedOptions, PagedRow, paged_attention, paged_attention_reference, write_slots};
pub use rotary::{rotary, rotary_reference};
pub use rows::{
    EMPTY_NATS, LogQSum, LogitTransform, MASKED, RowOps, RowStats, TAIL_FLOOR_NATS,
    reference::row_stats_reference, row_gradient, row_stats,
};
pub use weights::{largest_logit, softmax_weights};
