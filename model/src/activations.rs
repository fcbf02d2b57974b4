//! The numbers that a layer keeps for its backward pass, counted from its plan.

use crate::Config;
use crate::plan::{AttentionPlan, FeedForwardPlan, GatedPlan, LayerPlan, QueryKeyNorm};

/// Numbers for each row (token) of a layer in training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActivationColumns {
    /// Numbers that are kept from the forward pass to the backward pass, in the model's type.
    pub kept: usize,
    /// Numbers that are kept in f32 whatever the model's type is: the inputs of both blocks, which are sums of the residual
    /// stream, and sums of the softmax.
    pub kept_f32: usize,
    /// Numbers that exist while the layer's backward pass is computed, besides those that are kept: outputs that are
    /// computed again, and gradients.
    pub backward: usize,
}

/// The size of a layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionColumns {
    /// Numbers of a token that take part in the products with other positions: columns of all query heads, and of all
    /// outputs of heads.
    pub columns: usize,
    /// Number of positions that a token sees, its own included; `None` for all.
    pub window: Option<usize>,
}

impl Config {
    /// Returns the size of each layer's attention.
    #[must_use]
    pub fn attention_columns(&self) -> Vec<AttentionColumns> {
        let of_layer = |layer: &LayerPlan| match &layer.attention {
            AttentionPlan::Grouped(plan) => AttentionColumns {
                columns: 2 * plan.query_columns(),
                window: plan.window,
            },
            AttentionPlan::Latent(plan) => AttentionColumns {
                columns: plan.heads * (plan.key_width() + plan.value_width),
                window: None,
            },
        };
        self.plan.layers.iter().map(of_layer).collect()
    }

    /// Returns the numbers that each layer keeps for its backward pass.
    ///
    /// A layer keeps its input and the input of each norm, but not the outputs of norms, which are computed again; queries
    /// and keys after rotation, values, and the output of attention; and gate and up of a feed-forward block, but not their
    /// product, which is computed again.
    #[must_use]
    pub fn activation_columns(&self) -> Vec<ActivationColumns> {
        let layers = self.plan.layers.iter();
        layers
            .map(|layer| columns(layer, self.hidden_size))
            .collect()
    }
}

fn columns(layer: &LayerPlan, d: usize) -> ActivationColumns {
    let (attention, kept_f32) = attention_columns(&layer.attention);
    let (feed_forward, widest) = feed_forward_columns(&layer.feed_forward, d);
    let output_norms = [
        layer.norms.attention_output,
        layer.norms.feed_forward_output,
    ];
    let output_norms = output_norms.iter().flatten().count();
    ActivationColumns {
        kept: output_norms * d + attention + feed_forward,
        kept_f32: 2 * d + kept_f32,
        backward: 3 * d + 3 * widest,
    }
}

/// Numbers that attention keeps, and sums of its softmax.
fn attention_columns(plan: &AttentionPlan) -> (usize, usize) {
    match plan {
        AttentionPlan::Grouped(plan) => {
            let (queries, keys) = (plan.query_columns(), plan.key_columns());
            // The inputs of the norms of queries and keys.
            let normed = match plan.query_key_norm {
                QueryKeyNorm::None => 0,
                QueryKeyNorm::Head | QueryKeyNorm::Row => queries + keys,
            };
            (2 * queries + 2 * keys + normed, plan.heads)
        }
        AttentionPlan::Latent(plan) => {
            let (keys, values) = (plan.heads * plan.key_width(), plan.heads * plan.value_width);
            let latent = 2 * plan.key_rank + plan.rotary_width + 2 * plan.query_rank.unwrap_or(0);
            (2 * keys + 2 * values + latent, plan.heads)
        }
    }
}

/// Numbers that a feed-forward block keeps, and the width of the widest tensor in it.
fn feed_forward_columns(plan: &FeedForwardPlan, d: usize) -> (usize, usize) {
    match plan {
        FeedForwardPlan::Gated(GatedPlan { width, .. }) => (2 * width, *width),
        FeedForwardPlan::Experts(plan) => {
            let width = plan.expert.width;
            let shared = plan.shared_width.unwrap_or(0);
            // The input, the product and the output of each chosen expert are kept too.
            let chosen = plan.chosen * (3 * width + 3 * d);
            (
                chosen + 2 * shared + 3 * plan.count,
                (plan.chosen * width).max(shared),
            )
        }
    }
}
