//! The feed-forward block of a layer: one gated block, or experts.

use burn::module::Module;
use burn::tensor::Tensor;

use super::{Experts, GatedFeedForward, MapLayers, Shapes};
use crate::plan::FeedForwardPlan;

/// The feed-forward block of a layer.
#[derive(Module, Debug)]
pub(crate) enum FeedForward {
    Gated(GatedFeedForward),
    Experts(Experts),
}

impl FeedForward {
    pub(crate) fn unset(plan: &FeedForwardPlan, d: usize, shapes: &Shapes) -> Self {
        match plan {
            FeedForwardPlan::Gated(plan) => Self::Gated(GatedFeedForward::unset(*plan, d, shapes)),
            FeedForwardPlan::Experts(plan) => Self::Experts(Experts::unset(plan, d, shapes)),
        }
    }

    /// Computes the block: `[n, d]` → `[n, d]`.
    pub(crate) fn forward(&self, x_nd: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Gated(block) => block.forward(x_nd),
            Self::Experts(experts) => experts.forward(x_nd),
        }
    }

    pub(crate) fn map_parameters(self, prefix: &str, mapper: &mut impl MapLayers) -> Self {
        let prefix = format!("{prefix}.mlp");
        match self {
            Self::Gated(block) => Self::Gated(block.map_parameters(&prefix, mapper)),
            Self::Experts(experts) => Self::Experts(experts.map_parameters(&prefix, mapper)),
        }
    }
}
