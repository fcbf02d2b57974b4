//! Grouped-query attention with its projections.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::{Linear, MapLayers, Norm, Shapes};
use crate::attend::{Attend, Heads};
use crate::parameters::{Role, map_parameter};
use crate::plan::{GroupedPlan, NormPlan, QueryKeyNorm};
use crate::rotary::RotaryAngles;

/// Grouped-query attention; see [`GroupedPlan`].
#[derive(Module, Debug)]
pub(crate) struct GroupedAttention {
    projections: Projections,
    query_norm: Option<Norm>,
    key_norm: Option<Norm>,
    sinks: Option<Param<Tensor<1>>>,
    output: Linear,
    #[module(skip)]
    plan: GroupedPlan,
}

/// The projections of queries, keys and values.
#[derive(Module, Debug)]
enum Projections {
    Separate(SeparateProjections),
    /// Queries, keys and values in one projection, `[h·e + 2·g·e, d]`.
    Fused(Linear),
}

#[derive(Module, Debug)]
struct SeparateProjections {
    query: Linear,
    key: Linear,
    value: Linear,
}

impl GroupedAttention {
    pub(crate) fn unset(plan: &GroupedPlan, d: usize, norm: NormPlan, shapes: &Shapes) -> Self {
        let (queries, keys) = (plan.query_columns(), plan.key_columns());
        let project = |columns| Linear::unset([columns, d], plan.input_bias, shapes);
        let norm = |heads: usize| match plan.query_key_norm {
            QueryKeyNorm::None => None,
            QueryKeyNorm::Head => Some(Norm::unset(plan.head_dim, norm, shapes)),
            QueryKeyNorm::Row => Some(Norm::unset(heads * plan.head_dim, norm, shapes)),
        };
        Self {
            projections: match plan.fused {
                true => Projections::Fused(project(queries + 2 * keys)),
                false => Projections::Separate(SeparateProjections {
                    query: project(queries),
                    key: project(keys),
                    value: project(keys),
                }),
            },
            query_norm: norm(plan.heads),
            key_norm: norm(plan.key_heads),
            sinks: plan.sinks.then(|| shapes.zeros([plan.heads])),
            output: Linear::unset([d, queries], plan.output_bias, shapes),
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
        let [q_nc, k_nc, v_nc] = self.project(x_nd);
        let q_nc = self.normed(self.query_norm.as_ref(), q_nc);
        let k_nc = self.normed(self.key_norm.as_ref(), k_nc);
        let heads = Heads {
            q_nc: self.rotated(q_nc, rotary),
            k_nc: self.rotated(k_nc, rotary),
            v_nc,
            sinks_h: self.sinks.as_ref().map(Param::val),
        };
        self.output
            .forward(attend.grouped(layer, heads, &self.plan))
    }

    fn project(&self, x_nd: Tensor<2>) -> [Tensor<2>; 3] {
        match &self.projections {
            Projections::Separate(SeparateProjections { query, key, value }) => {
                let q_nc = query.forward(x_nd.clone());
                let [k_nc, v_nc] = Linear::forward_pair([key, value], x_nd);
                [q_nc, k_nc, v_nc]
            }
            Projections::Fused(fused) => {
                let (queries, keys) = (self.plan.query_columns(), self.plan.key_columns());
                let all_nc = fused.forward(x_nd);
                [(0, queries), (queries, keys), (queries + keys, keys)]
                    .map(|(first, columns)| all_nc.clone().narrow(1, first, columns))
            }
        }
    }

    fn normed(&self, norm: Option<&Norm>, x_nc: Tensor<2>) -> Tensor<2> {
        match (norm, self.plan.query_key_norm) {
            (Some(norm), QueryKeyNorm::Head) => norm.forward_heads(x_nc),
            (Some(norm), _) => norm.forward(x_nc),
            (None, _) => x_nc,
        }
    }

    fn rotated(&self, x_nc: Tensor<2>, rotary: &[RotaryAngles]) -> Tensor<2> {
        match self.plan.rotary.and_then(|table| rotary.get(table)) {
            Some(angles) => angles.rotate(x_nc, self.plan.head_dim),
            None => x_nc,
        }
    }

    pub(crate) fn map_parameters(self, prefix: &str, mapper: &mut impl MapLayers) -> Self {
        let name = |part: &str| format!("{prefix}.self_attn.{part}");
        let projections = match self.projections {
            Projections::Separate(SeparateProjections { query, key, value }) => {
                Projections::Separate(SeparateProjections {
                    query: query.map_parameters(&name("q_proj"), mapper),
                    key: key.map_parameters(&name("k_proj"), mapper),
                    value: value.map_parameters(&name("v_proj"), mapper),
                })
            }
            Projections::Fused(fused) => {
                Projections::Fused(fused.map_parameters(&name("qkv_proj"), mapper))
            }
        };
        let norm = |norm: Option<Norm>, part: &str, mapper: &mut _| {
            norm.map(|norm| norm.map_parameters(&name(part), mapper))
        };
        let sinks = self.sinks;
        Self {
            projections,
            query_norm: norm(self.query_norm, "q_norm", mapper),
            key_norm: norm(self.key_norm, "k_norm", mapper),
            sinks: sinks.map(|sinks| map_parameter(mapper, name("sinks"), Role::Bias, sinks)),
            output: self.output.map_parameters(&name("o_proj"), mapper),
            plan: self.plan,
        }
    }
}
