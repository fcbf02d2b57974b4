//! The texts that the rows of a forward pass see: the documents that they are in, or a KV cache.
//!
//! Training and scoring compute whole documents, generation computes the next rows of texts whose earlier keys and
//! values are in a cache (`generate/cache`). The layers are the same for both and call this trait.

use burn::tensor::Tensor;
use potstill_kernels::attention;

use crate::plan::{GroupedPlan, LatentPlan};

/// Queries, keys and values of n rows, after norms and rotation.
pub(crate) struct Heads {
    /// `[n, h·e]`.
    pub(crate) q_nc: Tensor<2>,
    /// `[n, g·e]`.
    pub(crate) k_nc: Tensor<2>,
    /// `[n, g·e]`.
    pub(crate) v_nc: Tensor<2>,
    /// A logit of each query head that takes part in its softmax and is dropped afterwards, `[h]`.
    pub(crate) sinks_h: Option<Tensor<1>>,
}

/// Queries and latent vectors of n rows, after norms and rotation.
pub(crate) struct LatentHeads<'a> {
    /// Plain part of the queries, `[n, h, plain_width]`.
    pub(crate) q_plain_nhe: Tensor<3>,
    /// Rotated part of the queries, `[n, h, rotary_width]`.
    pub(crate) q_rotary_nhe: Tensor<3>,
    /// Latent vectors, `[n, key_rank]`.
    pub(crate) latent_nr: Tensor<2>,
    /// Rotated part of the keys, which all heads share, `[n, rotary_width]`.
    pub(crate) key_rotary_nr: Tensor<2>,
    /// Projection of the latent vectors to the plain part of the keys and to the values:
    /// `[h · (plain_width + value_width), key_rank]`, key and value of a head one after the other.
    pub(crate) up: UpProjection<'a>,
}

/// A linear layer without bias as a function and as a matrix.
pub(crate) struct UpProjection<'a> {
    /// Computes the layer: `[n, key_rank]` → `[n, c]`.
    pub(crate) apply: &'a dyn Fn(Tensor<2>) -> Tensor<2>,
    /// Makes the matrix `[c, key_rank]`.
    pub(crate) matrix: &'a dyn Fn() -> Tensor<2>,
}

/// Computes the attention of rows to the rows that they see.
pub(crate) trait Attend {
    /// Computes grouped-query attention of a layer: → `[n, h·e]`.
    fn grouped(&mut self, layer: usize, heads: Heads, plan: &GroupedPlan) -> Tensor<2>;

    /// Computes latent attention of a layer: → `[n, h · value_width]`.
    fn latent(&mut self, layer: usize, heads: LatentHeads<'_>, plan: &LatentPlan) -> Tensor<2>;
}

/// Consecutive documents of these lengths. A row sees its document up to itself.
pub(crate) struct Documents<'a>(pub(crate) &'a [usize]);

impl Attend for Documents<'_> {
    fn grouped(&mut self, _layer: usize, heads: Heads, plan: &GroupedPlan) -> Tensor<2> {
        let Heads {
            q_nc,
            k_nc,
            v_nc,
            sinks_h,
        } = heads;
        attention(q_nc, k_nc, v_nc, sinks_h, self.0, &plan.options())
    }

    fn latent(&mut self, _layer: usize, heads: LatentHeads<'_>, plan: &LatentPlan) -> Tensor<2> {
        let [n, h, _] = heads.q_plain_nhe.dims();
        let up_nhe =
            (heads.up.apply)(heads.latent_nr).reshape([n, h, plan.plain_width + plan.value_width]);
        let key_rotary_nhe = (heads.key_rotary_nr)
            .reshape([n, 1, plan.rotary_width])
            .repeat_dim(1, h);
        let k_plain_nhe = up_nhe.clone().narrow(2, 0, plan.plain_width);
        let v_nhe = up_nhe.narrow(2, plan.plain_width, plan.value_width);
        let joined = |plain: Tensor<3>, rotary: Tensor<3>| {
            Tensor::cat(vec![plain, rotary], 2).reshape([n, h * plan.key_width()])
        };
        attention(
            joined(heads.q_plain_nhe, heads.q_rotary_nhe),
            joined(k_plain_nhe, key_rotary_nhe),
            v_nhe.reshape([n, h * plan.value_width]),
            None,
            self.0,
            &plan.options(),
        )
    }
}
