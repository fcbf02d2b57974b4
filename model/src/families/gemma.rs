//! Gemma 2 and the text decoder of Gemma 3.

use serde_json::json;

use super::Shape;
use crate::Error;
use crate::keys::Keys;
use crate::plan::{
    DecoderPlan, FeedForwardPlan, GatedPlan, GroupedPlan, LayerNorms, NormPlan, QueryKeyNorm,
};
use crate::rotary_table::RotaryKeys;

/// Gemma 2: a window on every other layer, softcaps on scores and logits.
pub(super) fn gemma2(keys: &Keys) -> Result<DecoderPlan, Error> {
    let shape = Shape::read(keys, Some(256), 1e-6)?;
    let windows = shape.windows(keys, |layer| layer % 2 == 0)?;
    let attention = GroupedPlan {
        softcap: keys.optional_number("attn_logit_softcapping")?,
        ..attention(keys, &shape)?
    };
    let rotary = vec![shape.rotary(keys, 10_000.0)?];
    let mut plan = decoder(keys, &shape, |layer| GroupedPlan {
        window: windows[layer],
        ..attention.clone()
    })?;
    plan.rotary = rotary;
    Ok(plan)
}

/// Gemma 3: norms of queries and keys, and other rotary frequencies in the layers with a window.
pub(super) fn gemma3(keys: &Keys) -> Result<DecoderPlan, Error> {
    let shape = Shape::read(keys, Some(256), 1e-6)?;
    let pattern = match keys.optional_count("sliding_window_pattern")? {
        Some(pattern) => pattern,
        None => keys.count("_sliding_window_pattern", Some(6))?,
    };
    let windows = shape.windows(keys, |layer| (layer + 1) % pattern != 0)?;
    let attention = GroupedPlan {
        query_key_norm: QueryKeyNorm::Head,
        softcap: keys.optional_number("attn_logit_softcapping")?,
        ..attention(keys, &shape)?
    };
    let full = shape.rotary(keys, 1_000_000.0)?;
    // In the older form of the file, `rope_scaling` holds for the layers without a window only.
    let sliding = match keys.get("rope_parameters") {
        Some(_) => RotaryKeys::find(keys, "sliding_attention", 10_000.0)?,
        None => RotaryKeys::unscaled(keys, keys.number("rope_local_base_freq", 10_000.0)?),
    };
    let sliding = sliding.table(shape.head_dim, shape.context)?;
    let mut plan = decoder(keys, &shape, |layer| GroupedPlan {
        window: windows[layer],
        rotary: Some(usize::from(windows[layer].is_some())),
        ..attention.clone()
    })?;
    plan.rotary = vec![full, sliding];
    Ok(plan)
}

fn attention(keys: &Keys, shape: &Shape) -> Result<GroupedPlan, Error> {
    let bias = keys.flag("attention_bias", false)?;
    Ok(GroupedPlan {
        input_bias: bias,
        output_bias: bias,
        scale: keys.number("query_pre_attn_scalar", 256.0)?.powf(-0.5),
        ..shape.attention()
    })
}

fn decoder(
    keys: &Keys,
    shape: &Shape,
    attention: impl Fn(usize) -> GroupedPlan,
) -> Result<DecoderPlan, Error> {
    keys.only("use_bidirectional_attention", &[json!(false)])?;
    // The value of `hidden_act` in these files is not what the models use.
    let gated = GatedPlan {
        activation: keys.activation("hidden_activation", "gelu_pytorch_tanh")?,
        ..shape.gated()
    };
    let rotary = shape.rotary(keys, 10_000.0)?;
    let mut plan = shape.decoder(rotary, |layer| {
        (attention(layer), FeedForwardPlan::Gated(gated))
    });
    for layer in &mut plan.layers {
        layer.norms = LayerNorms::BEFORE_AND_AFTER;
    }
    Ok(DecoderPlan {
        norm: NormPlan {
            gain_offset: 1.0,
            ..shape.norm
        },
        embedding_scale: Some((shape.hidden as f64).sqrt()),
        final_softcap: keys.optional_number("final_logit_softcapping")?,
        ..plan
    })
}
