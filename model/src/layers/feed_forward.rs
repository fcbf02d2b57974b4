//! The feed-forward block of a layer: one gated block, or experts.

use burn::module::Module;
use burn::tensor::Tensor;
use potstill_kernels::{GateActivation, add_bias, gated_linear};

use super::{Experts, Linear, Shapes};
use crate::parameters::MapParameters;
use crate::plan::{FeedForwardPlan, GatedPlan};

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

    pub(crate) fn map_parameters(self, prefix: &str, mapper: &mut impl MapParameters) -> Self {
        let prefix = format!("{prefix}.mlp");
        match self {
            Self::Gated(block) => Self::Gated(block.map_parameters(&prefix, mapper)),
            Self::Experts(experts) => Self::Experts(experts.map_parameters(&prefix, mapper)),
        }
    }
}

/// A gated block: down(activation(gate(x)) · up(x)).
#[derive(Module, Debug)]
pub(crate) struct GatedFeedForward {
    pub(crate) gate_and_up: GateAndUp,
    pub(crate) down: Linear,
    #[module(skip)]
    activation: GateActivation,
}

/// The projections into a gated block.
#[derive(Module, Debug)]
pub(crate) enum GateAndUp {
    Separate(SeparateGate),
    /// Gate and up in one projection, `[2·w, d]`.
    Fused(Linear),
}

/// Gate and up, `[w, d]` each.
#[derive(Module, Debug)]
pub(crate) struct SeparateGate {
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
}

impl GatedFeedForward {
    pub(crate) fn unset(plan: GatedPlan, d: usize, shapes: &Shapes) -> Self {
        let project = |columns| Linear::unset([columns, d], plan.bias, shapes);
        Self {
            gate_and_up: match plan.fused {
                true => GateAndUp::Fused(project(2 * plan.width)),
                false => GateAndUp::Separate(SeparateGate {
                    gate: project(plan.width),
                    up: project(plan.width),
                }),
            },
            down: Linear::unset([d, plan.width], plan.bias, shapes),
            activation: plan.activation,
        }
    }

    /// Computes the block: `[n, d]` → `[n, d]`.
    pub(crate) fn forward(&self, x_nd: Tensor<2>) -> Tensor<2> {
        let [gate_nw, up_nw] = match &self.gate_and_up {
            GateAndUp::Separate(SeparateGate { gate, up }) => {
                Linear::forward_pair([gate, up], x_nd)
            }
            GateAndUp::Fused(fused) => {
                let both_nw = fused.forward(x_nd);
                let width = both_nw.dims()[1] / 2;
                [0, width].map(|first| both_nw.clone().narrow(1, first, width))
            }
        };
        let y_nd = gated_linear(gate_nw, up_nw, self.down.weight.val(), self.activation);
        match &self.down.bias {
            Some(bias_d) => add_bias(y_nd, bias_d.val()),
            None => y_nd,
        }
    }

    pub(crate) fn map_parameters(self, prefix: &str, mapper: &mut impl MapParameters) -> Self {
        let name = |part: &str| format!("{prefix}.{part}");
        Self {
            gate_and_up: match self.gate_and_up {
                GateAndUp::Separate(SeparateGate { gate, up }) => {
                    GateAndUp::Separate(SeparateGate {
                        gate: gate.map_parameters(&name("gate_proj"), mapper),
                        up: up.map_parameters(&name("up_proj"), mapper),
                    })
                }
                GateAndUp::Fused(fused) => {
                    GateAndUp::Fused(fused.map_parameters(&name("gate_up_proj"), mapper))
                }
            },
            down: self.down.map_parameters(&name("down_proj"), mapper),
            activation: self.activation,
        }
    }
}
