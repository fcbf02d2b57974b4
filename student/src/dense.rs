//! Losses on more than a divergence's buckets: on the order of tokens, on hidden states, and on sorted
//! distributions for a teacher with another tokenizer.
//!
//! Each loss is a plain tensor function that returns one number for each row, `[n]`; the caller sums and
//! divides. The losses are differentiable with respect to the student's tensors; the teacher's are constants.

mod hidden;
mod ranking;
mod sorted;

pub use hidden::{LayerMap, LayerMapError, Projection, hidden_cosine, hidden_mse};
pub use ranking::{Margin, at_teacher_top, hinge_ranking, logistic_ranking};
pub use sorted::{universal_logit, universal_logit_sparse};

use burn::tensor::{DType, Tensor};

/// Converts both tensors to f64 if the first is f64, or else to f32: half precision has too few digits for
/// differences.
fn wide(pair: [Tensor<2>; 2]) -> [Tensor<2>; 2] {
    let dtype = match pair[0].dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    pair.map(|x| x.cast(dtype))
}
