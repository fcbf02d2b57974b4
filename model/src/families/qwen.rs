//! Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE.

use super::Shape;
use crate::Error;
use crate::keys::Keys;
use crate::plan::{
    DecoderPlan, ExpertsPlan, FeedForwardPlan, GatedPlan, GroupedPlan, QueryKeyNorm, RouterPlan,
    Scoring,
};

/// Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen: biases on queries, keys and values.
pub(super) fn qwen2(keys: &Keys) -> Result<DecoderPlan, Error> {
    let shape = Shape::read(keys, None, 1e-6)?;
    let windows = windows(keys, &shape)?;
    let gated = dense(keys, &shape)?;
    Ok(shape.decoder(shape.rotary(keys, 10_000.0)?, |layer| {
        let attention = GroupedPlan {
            input_bias: true,
            window: windows[layer],
            ..shape.attention()
        };
        (attention, FeedForwardPlan::Gated(gated))
    }))
}

/// Qwen3: norms on each query and key head instead of biases.
pub(super) fn qwen3(keys: &Keys) -> Result<DecoderPlan, Error> {
    let shape = Shape::read(keys, Some(128), 1e-6)?;
    let windows = windows(keys, &shape)?;
    let attention = attention(keys, &shape)?;
    let gated = dense(keys, &shape)?;
    Ok(shape.decoder(shape.rotary(keys, 10_000.0)?, |layer| {
        let window = windows[layer];
        let attention = GroupedPlan {
            window,
            ..attention.clone()
        };
        (attention, FeedForwardPlan::Gated(gated))
    }))
}

/// Qwen3-MoE: Qwen3 with experts in most layers.
pub(super) fn qwen3_moe(keys: &Keys) -> Result<DecoderPlan, Error> {
    let shape = Shape::read(keys, None, 1e-6)?;
    // The hub's configurations say `num_experts`, those that transformers 5 writes `num_local_experts`.
    let count = match keys.optional_count("num_experts")? {
        Some(count) => count,
        None => keys.count("num_local_experts", Some(128))?,
    };
    let experts = FeedForwardPlan::Experts(ExpertsPlan {
        count,
        chosen: keys.count("num_experts_per_tok", Some(8))?,
        expert: GatedPlan {
            width: keys.count("moe_intermediate_size", Some(768))?,
            ..dense(keys, &shape)?
        },
        shared_width: None,
        stacked: false,
        router: RouterPlan {
            name: "gate",
            scoring: Scoring::Softmax,
            bias: false,
            correction_bias: false,
            groups: None,
            normalised: keys.flag("norm_topk_prob", false)?,
            scale: 1.0,
        },
    });
    let gated = FeedForwardPlan::Gated(dense(keys, &shape)?);
    let step = keys.count("decoder_sparse_step", Some(1))?;
    let dense_layers = keys.indices("mlp_only_layers")?;
    let is_dense =
        |layer: usize| dense_layers.contains(&layer) || !(layer + 1).is_multiple_of(step);
    let attention = GroupedPlan {
        window: match keys.flag("use_sliding_window", false)? {
            true => Some(keys.count("sliding_window", None)?),
            false => None,
        },
        ..attention(keys, &shape)?
    };
    Ok(shape.decoder(shape.rotary(keys, 10_000.0)?, |layer| {
        let feed_forward = if is_dense(layer) { &gated } else { &experts };
        (attention.clone(), feed_forward.clone())
    }))
}

fn attention(keys: &Keys, shape: &Shape) -> Result<GroupedPlan, Error> {
    let bias = keys.flag("attention_bias", false)?;
    Ok(GroupedPlan {
        input_bias: bias,
        output_bias: bias,
        query_key_norm: QueryKeyNorm::Head,
        ..shape.attention()
    })
}

fn dense(keys: &Keys, shape: &Shape) -> Result<GatedPlan, Error> {
    Ok(GatedPlan {
        activation: keys.activation("hidden_act", "silu")?,
        ..shape.gated()
    })
}

/// Layers from `max_window_layers` on have a window, if `use_sliding_window`.
fn windows(keys: &Keys, shape: &Shape) -> Result<Vec<Option<usize>>, Error> {
    let sliding = keys.flag("use_sliding_window", false)?;
    let first = keys.index("max_window_layers", 28)?;
    // Configurations of the hub name a window beside `use_sliding_window: false`.
    match sliding {
        true => shape.windows(keys, |layer| layer >= first),
        false => Ok(vec![None; shape.layers]),
    }
}
