//! Gradients of a loss over row statistics with respect to the hidden states and the head's weight, computed in
//! one pass over chunks of rows.
//!
//! ```text
//! logits = hidden · headᵀ     ∂L/∂hidden = ∂L/∂logits · head     ∂L/∂head = Σ (∂L/∂logits)ᵀ · hidden
//! ```
//!
//! A chunk's logits are read once for the statistics and overwritten by their gradient. The loss itself sees
//! only [n, k], and only that part is differentiated by burn's autodiff. So one [chunk, v] block exists at a
//! time (one more for each further head), whatever the number of rows. Computing the logits a second time tile
//! by tile, without ever writing them, would cost a fourth matrix product, more than the two passes over the
//! block that it saves: `docs/benchmarks.md`.

use std::ops::Range;

use burn::tensor::{DType, Int, Tensor};
use potstill_kernels::{
    LogQSum, LogitTransform, RowStats, linear, linear_input_gradient, linear_into,
    linear_weight_gradient_f32, row_gradient, row_stats, row_stats_reference,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Implementation of loss and gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Kernels, `chunk_rows` rows of logits at a time.
    #[default]
    Fused,
    /// Tensor operations and autodiff on all rows of a micro-batch at once. Slower, and needs several times the memory:
    /// a reference for `fused`.
    Plain,
}

/// Options for [`head_loss`].
#[derive(Debug, Clone)]
pub struct HeadLossOptions<'a> {
    /// Transforms from raw logits to softmax logits; the loss gets the statistics of each.
    pub heads: &'a [LogitTransform],
    /// Whether the statistics include Σ log q.
    pub sum: LogQSum,
    /// Whether the head's gradient is computed; leaving it out saves a third of the work.
    pub train_head: bool,
    /// Number of rows whose logits exist at a time.
    pub chunk_rows: usize,
    /// Implementation.
    pub form: Form,
}

/// Gradients of a loss with respect to hidden states and head, without autodiff.
#[derive(Debug)]
pub struct HeadGradient {
    /// ∂L/∂hidden, [n, d], in the dtype of the states.
    pub hidden_nd: Tensor<2>,
    /// ∂L/∂head, [v, d], summed in f32 or f64; `None` unless [`HeadLossOptions::train_head`].
    pub head_vd: Option<Tensor<2>>,
}

/// Computes the gradients of Σ `loss(rows, statistics)` over all chunks of rows.
///
/// `loss` gets the rows of a chunk and their statistics, one for each of `heads`, and returns a scalar that
/// depends on the statistics: the weighted sum over the chunk's rows. burn differentiates it. The states and the
/// head are constants here; the caller propagates the gradient through the model.
///
/// # Shapes
/// - `hidden_nd`: [n, d]; `head_vd`: [v, d], of the same dtype.
/// - `support_nk`: as [`row_stats`] takes it.
///
/// # Panics
/// On shapes that do not match, as burn's operations do.
pub fn head_loss(
    hidden_nd: Tensor<2>,
    head_vd: Tensor<2>,
    support_nk: Tensor<2, Int>,
    options: &HeadLossOptions<'_>,
    loss: &mut dyn FnMut(Range<usize>, &[RowStats]) -> Tensor<1>,
) -> HeadGradient {
    head_loss_added(hidden_nd, head_vd, support_nk, options, None, loss)
}

/// Computes [`head_loss`] and adds ∂L/∂head to `sum_vd`, which is f32 or f64, in place if its storage is not shared.
pub(crate) fn head_loss_added(
    hidden_nd: Tensor<2>,
    head_vd: Tensor<2>,
    support_nk: Tensor<2, Int>,
    options: &HeadLossOptions<'_>,
    sum_vd: Option<Tensor<2>>,
    loss: &mut dyn FnMut(Range<usize>, &[RowStats]) -> Tensor<1>,
) -> HeadGradient {
    match options.form {
        Form::Fused => fused(hidden_nd, head_vd, support_nk, options, sum_vd, loss),
        Form::Plain => plain(hidden_nd, head_vd, support_nk, options, sum_vd, loss),
    }
}

fn fused(
    hidden_nd: Tensor<2>,
    head_vd: Tensor<2>,
    support_nk: Tensor<2, Int>,
    options: &HeadLossOptions<'_>,
    sum_vd: Option<Tensor<2>>,
    loss: &mut dyn FnMut(Range<usize>, &[RowStats]) -> Tensor<1>,
) -> HeadGradient {
    let [n, _] = hidden_nd.dims();
    let chunk_rows = options.chunk_rows.max(1);
    let mut hidden_gradients = Vec::with_capacity(n.div_ceil(chunk_rows));
    let mut head_gradient_vd = sum_vd;
    // The memory of the logits is reused from chunk to chunk.
    let mut block_nv: Option<Tensor<2>> = None;
    for start in (0..n).step_by(chunk_rows) {
        let rows = start..n.min(start + chunk_rows);
        let chunk_nd = hidden_nd.clone().slice(rows.clone());
        let support_nk = support_nk.clone().slice(rows.clone());
        let logits_nv = linear_into(block_nv.take(), chunk_nd.clone(), head_vd.clone());
        let Some(gradient_nv) = logits_gradient(logits_nv, &support_nk, rows, options, loss) else {
            hidden_gradients.push(chunk_nd.zeros_like());
            continue;
        };
        hidden_gradients.push(linear_input_gradient(gradient_nv.clone(), head_vd.clone()));
        if options.train_head {
            let sum_vd = head_gradient_vd.take();
            let sum_vd = linear_weight_gradient_f32(gradient_nv.clone(), chunk_nd, sum_vd);
            head_gradient_vd = Some(sum_vd);
        }
        block_nv = Some(gradient_nv);
    }
    let zeros = || head_vd.zeros_like().cast(stats_dtype(head_vd.dtype()));
    HeadGradient {
        hidden_nd: match hidden_gradients.is_empty() {
            true => hidden_nd.zeros_like(),
            false => Tensor::cat(hidden_gradients, 0),
        },
        head_vd: options
            .train_head
            .then(|| head_gradient_vd.unwrap_or_else(zeros)),
    }
}

/// Computes ∂L/∂logits of a chunk in the memory of the logits; `None` if the loss does not depend on them.
pub(crate) fn logits_gradient(
    logits_nv: Tensor<2>,
    support_nk: &Tensor<2, Int>,
    rows: Range<usize>,
    options: &HeadLossOptions<'_>,
    loss: &mut dyn FnMut(Range<usize>, &[RowStats]) -> Tensor<1>,
) -> Option<Tensor<2>> {
    let stats_of = |head| row_stats(logits_nv.clone(), support_nk.clone(), head, options.sum);
    let stats: Vec<RowStats> = options.heads.iter().map(stats_of).collect();
    let leaves: Vec<Tensor<2>> = stats.iter().map(|stats| leaf(stats.all())).collect();
    let tracked: Vec<RowStats> = stats
        .iter()
        .zip(&leaves)
        .map(|(stats, leaf)| stats.with_all(leaf.clone()))
        .collect();
    let mut tape = loss(rows, &tracked).backward();
    let mut gradients: Vec<_> = leaves
        .iter()
        .map(|leaf| leaf.grad_remove(&mut tape))
        .zip(options.heads.iter().zip(&stats))
        .filter_map(|(gradient, head_stats)| Some((gradient?, head_stats)))
        .collect();
    drop((tracked, leaves, tape));
    // The last gradient is written over the logits.
    let (last, (head, stats)) = gradients.pop()?;
    let others = gradients.into_iter().map(|(gradient, (head, stats))| {
        let logits_nv = logits_nv.clone();
        row_gradient(logits_nv, support_nk.clone(), stats, gradient, head)
    });
    let others: Option<Tensor<2>> = others.reduce(|sum, gradient| sum + gradient);
    let gradient_nv = row_gradient(logits_nv, support_nk.clone(), stats, last, head);
    Some(match others {
        Some(others) => gradient_nv + others,
        None => gradient_nv,
    })
}

fn plain(
    hidden_nd: Tensor<2>,
    head_vd: Tensor<2>,
    support_nk: Tensor<2, Int>,
    options: &HeadLossOptions<'_>,
    sum_vd: Option<Tensor<2>>,
    loss: &mut dyn FnMut(Range<usize>, &[RowStats]) -> Tensor<1>,
) -> HeadGradient {
    let [n, _] = hidden_nd.dims();
    let wide = stats_dtype(head_vd.dtype());
    let hidden = leaf(hidden_nd.clone());
    let head = match options.train_head {
        true => leaf(head_vd.clone()),
        false => Tensor::from_inner(head_vd.clone()),
    };
    let logits_nv = linear(hidden.clone(), head.clone()).cast(wide);
    let stats_of =
        |head| row_stats_reference(logits_nv.clone(), support_nk.clone(), head, options.sum);
    let stats: Vec<RowStats> = options.heads.iter().map(stats_of).collect();
    drop(logits_nv);
    let mut tape = loss(0..n, &stats).backward();
    drop(stats);
    let hidden_gradient = hidden.grad_remove(&mut tape);
    let head_gradient = head.grad_remove(&mut tape);
    let none = || head_vd.zeros_like();
    let added = || {
        let gradient_vd = head_gradient.unwrap_or_else(none).cast(wide);
        match sum_vd {
            Some(sum_vd) => sum_vd + gradient_vd,
            None => gradient_vd,
        }
    };
    HeadGradient {
        hidden_nd: hidden_gradient.unwrap_or_else(|| hidden_nd.zeros_like()),
        head_vd: options.train_head.then(added),
    }
}

/// Returns the tensor as a leaf of a new autodiff graph.
pub(crate) fn leaf<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    Tensor::from_inner(tensor).require_grad()
}

/// Returns the dtype of statistics and of sums of gradients.
pub(crate) fn stats_dtype(logits: DType) -> DType {
    match logits {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}
