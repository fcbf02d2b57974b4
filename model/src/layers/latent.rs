//! DeepSeek's latent attention with its projections.

use burn::module::Module;
use burn::tensor::Tensor;

use super::{Linear, MapLayers, Norm, Shapes};
use crate::attend::{Attend, LatentHeads, UpProjection};
use crate::plan::{LatentPlan, NormPlan};
use crate::rotary::RotaryAngles;

/// Latent attention; see [`LatentPlan`].
#[derive(Module, Debug)]
pub(crate) struct LatentAttention {
    query: LatentQuery,
    /// Projection to the latent vector of keys and values, and to the rotated part of the keys.
    latent: Linear,
    latent_norm: Norm,
    /// Projection from the latent vector to the plain part of the keys and to the values, head by head.
    up: Linear,
    output: Linear,
    #[module(skip)]
    plan: LatentPlan,
}

/// The projection of the queries.
#[derive(Module, Debug)]
enum LatentQuery {
    Whole(Linear),
    /// Through a latent vector of its own.
    Factored(FactoredQuery),
}

#[derive(Module, Debug)]
struct FactoredQuery {
    down: Linear,
    norm: Norm,
    up: Linear,
}

/// The norms of latent vectors have this ε in all models, whatever the configuration says of the other norms.
const LATENT_NORM: NormPlan = NormPlan {
    epsilon: 1e-6,
    gain_offset: 0.0,
};

impl LatentAttention {
    pub(crate) fn unset(plan: &LatentPlan, d: usize, shapes: &Shapes) -> Self {
        let queries = plan.heads * plan.key_width();
        let up = plan.heads * (plan.plain_width + plan.value_width);
        Self {
            query: match plan.query_rank {
                None => LatentQuery::Whole(Linear::unset([queries, d], false, shapes)),
                Some(rank) => LatentQuery::Factored(FactoredQuery {
                    down: Linear::unset([rank, d], plan.bias, shapes),
                    norm: Norm::unset(rank, LATENT_NORM, shapes),
                    up: Linear::unset([queries, rank], false, shapes),
                }),
            },
            latent: Linear::unset([plan.key_rank + plan.rotary_width, d], plan.bias, shapes),
            latent_norm: Norm::unset(plan.key_rank, LATENT_NORM, shapes),
            up: Linear::unset([up, plan.key_rank], false, shapes),
            output: Linear::unset([d, plan.heads * plan.value_width], plan.bias, shapes),
            plan: plan.clone(),
        }
    }

    /// Computes attention and its output projection: `[n, d]` → `[n, d]`.
    pub(crate) fn forward(
        &self,
        layer: usize,
        x_nd: Tensor<2>,
        rotary: &[RotaryAngles],
        attend: &mut impl Attend,
    ) -> Tensor<2> {
        let plan = &self.plan;
        let [n, _] = x_nd.dims();
        let (dtype, device) = (x_nd.dtype(), x_nd.device());
        let q_nc = match &self.query {
            LatentQuery::Whole(query) => query.forward(x_nd.clone()),
            LatentQuery::Factored(query) => {
                let latent_nr = query.norm.forward(query.down.forward(x_nd.clone()));
                query.up.forward(latent_nr)
            }
        };
        let q_nhe = q_nc.reshape([n, plan.heads, plan.key_width()]);
        let q_rotary_nc = (q_nhe.clone())
            .narrow(2, plan.plain_width, plan.rotary_width)
            .reshape([n, plan.heads * plan.rotary_width]);
        let all_nc = self.latent.forward(x_nd);
        let latent_nr = all_nc.clone().narrow(1, 0, plan.key_rank);
        let key_rotary_nc = all_nc.narrow(1, plan.key_rank, plan.rotary_width);
        let heads = LatentHeads {
            q_plain_nhe: q_nhe.narrow(2, 0, plan.plain_width),
            q_rotary_nhe: self.rotated(q_rotary_nc, rotary).reshape([
                n,
                plan.heads,
                plan.rotary_width,
            ]),
            latent_nr: self.latent_norm.forward(latent_nr),
            key_rotary_nr: self.rotated(key_rotary_nc, rotary),
            up: UpProjection {
                apply: &|latent_nr| self.up.forward(latent_nr),
                matrix: &|| self.up.merged_weight(dtype, &device),
            },
        };
        self.output.forward(attend.latent(layer, heads, plan))
    }

    /// Rotates heads of `rotary_width` columns each: `[n, columns]` → `[n, columns]`, with the pairs of each head as halves.
    fn rotated(&self, x_nc: Tensor<2>, rotary: &[RotaryAngles]) -> Tensor<2> {
        let ([n, columns], width) = (x_nc.dims(), self.plan.rotary_width);
        let x_nc = match self.plan.interleaved {
            // Even columns first, then odd ones: the products q·k do not depend on the order.
            true => (x_nc.reshape([n, columns / width, width / 2, 2]))
                .swap_dims(2, 3)
                .reshape([n, columns]),
            false => x_nc,
        };
        match rotary.get(self.plan.rotary) {
            Some(angles) => angles.rotate(x_nc, width),
            None => x_nc,
        }
    }

    pub(crate) fn map_parameters(self, prefix: &str, mapper: &mut impl MapLayers) -> Self {
        let name = |part: &str| format!("{prefix}.self_attn.{part}");
        Self {
            query: match self.query {
                LatentQuery::Whole(query) => {
                    LatentQuery::Whole(query.map_parameters(&name("q_proj"), mapper))
                }
                LatentQuery::Factored(FactoredQuery { down, norm, up }) => {
                    LatentQuery::Factored(FactoredQuery {
                        down: down.map_parameters(&name("q_a_proj"), mapper),
                        norm: norm.map_parameters(&name("q_a_layernorm"), mapper),
                        up: up.map_parameters(&name("q_b_proj"), mapper),
                    })
                }
            },
            latent: (self.latent).map_parameters(&name("kv_a_proj_with_mqa"), mapper),
            latent_norm: (self.latent_norm).map_parameters(&name("kv_a_layernorm"), mapper),
            up: self.up.map_parameters(&name("kv_b_proj"), mapper),
            output: self.output.map_parameters(&name("o_proj"), mapper),
            plan: self.plan,
        }
    }
}
