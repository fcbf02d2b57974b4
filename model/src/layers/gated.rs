//! A gated feed-forward block.

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};
use potstill_kernels::GateActivation;

use super::{Linear, MapLayers, Shapes};
use crate::plan::GatedPlan;

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
        self.down.forward_gated(gate_nw, up_nw, self.activation)
    }

    /// Returns the block with the `width` neurons that have the largest weights, in their order.
    pub(crate) fn narrowed(self, width: usize) -> Self {
        let kept = self.strongest(width);
        let gate_and_up = match self.gate_and_up {
            GateAndUp::Separate(SeparateGate { gate, up }) => GateAndUp::Separate(SeparateGate {
                gate: gate.with_outputs(&kept),
                up: up.with_outputs(&kept),
            }),
            GateAndUp::Fused(both) => {
                let all = both.weight.dims()[0] / 2;
                let rows_of_up = kept.iter().map(|neuron| neuron + all as i32);
                let rows: Vec<i32> = kept.iter().copied().chain(rows_of_up).collect();
                GateAndUp::Fused(both.with_outputs(&rows))
            }
        };
        Self {
            gate_and_up,
            down: self.down.with_inputs(&kept),
            activation: self.activation,
        }
    }

    /// Returns the `width` neurons with the largest product of the norms of gate row, up row and down column, ascending.
    fn strongest(&self, width: usize) -> Vec<i32> {
        let [gate_wd, up_wd] = match &self.gate_and_up {
            GateAndUp::Separate(SeparateGate { gate, up }) => {
                [gate, up].map(|linear| linear.weight.dense(DType::F32, &Device::flex()))
            }
            GateAndUp::Fused(both) => {
                let both = both.weight.dense(DType::F32, &Device::flex());
                let all = both.dims()[0] / 2;
                [0, all].map(|first| both.clone().narrow(0, first, all))
            }
        };
        let squares = |weight: Tensor<2>, along: usize| -> Vec<f64> {
            let weight = weight.without_autodiff().cast(DType::F32);
            let sums = (weight.clone() * weight).sum_dim(along);
            sums.into_data().iter::<f64>().collect()
        };
        let (gate, up) = (squares(gate_wd, 1), squares(up_wd, 1));
        let down = squares(self.down.weight.dense(DType::F32, &Device::flex()), 0);
        let weight = |neuron: usize| gate[neuron] * up[neuron] * down[neuron];
        let mut order: Vec<usize> = (0..down.len()).collect();
        // The sort is stable, so the first of equal neurons is kept.
        order.sort_by(|&a, &b| weight(b).total_cmp(&weight(a)));
        order.truncate(width);
        order.sort_unstable();
        order.into_iter().map(|neuron| neuron as i32).collect()
    }

    pub(crate) fn map_parameters(self, prefix: &str, mapper: &mut impl MapLayers) -> Self {
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
