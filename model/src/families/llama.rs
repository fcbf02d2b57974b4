//! Llama and the families that differ from it in a few places: Mistral, OLMo 2, SmolLM3.

use serde_json::{Value, json};

use super::Shape;
use crate::Error;
use crate::keys::Keys;
use crate::plan::{DecoderPlan, FeedForwardPlan, GatedPlan, GroupedPlan, LayerNorms, QueryKeyNorm};

/// Llama 1 to 3.3, SmolLM2, DeepSeek-R1-Distill-Llama.
pub(super) fn llama(keys: &Keys) -> Result<DecoderPlan, Error> {
    keys.only("pretraining_tp", &[json!(1)])?;
    let shape = Shape::read(keys, None, 1e-6)?;
    let bias = keys.flag("attention_bias", false)?;
    let attention = GroupedPlan {
        input_bias: bias,
        output_bias: bias,
        ..shape.attention()
    };
    let gated = GatedPlan {
        activation: keys.activation("hidden_act", "silu")?,
        bias: keys.flag("mlp_bias", false)?,
        ..shape.gated()
    };
    Ok(shape.decoder(shape.rotary(keys, 10_000.0)?, |_| {
        (attention.clone(), FeedForwardPlan::Gated(gated))
    }))
}

/// Mistral: a window on all layers, if there is one.
pub(super) fn mistral(keys: &Keys) -> Result<DecoderPlan, Error> {
    let shape = Shape::read(keys, None, 1e-6)?;
    let attention = GroupedPlan {
        window: keys.optional_count("sliding_window")?,
        ..shape.attention()
    };
    let gated = GatedPlan {
        activation: keys.activation("hidden_act", "silu")?,
        ..shape.gated()
    };
    Ok(shape.decoder(shape.rotary(keys, 10_000.0)?, |_| {
        (attention.clone(), FeedForwardPlan::Gated(gated))
    }))
}

/// OLMo 2: norms on the outputs of the blocks instead of their inputs, and on all query heads together.
pub(super) fn olmo2(keys: &Keys) -> Result<DecoderPlan, Error> {
    let shape = Shape::read(keys, None, 1e-5)?;
    let bias = keys.flag("attention_bias", false)?;
    let attention = GroupedPlan {
        input_bias: bias,
        output_bias: bias,
        query_key_norm: QueryKeyNorm::Row,
        ..shape.attention()
    };
    let gated = GatedPlan {
        activation: keys.activation("hidden_act", "silu")?,
        ..shape.gated()
    };
    let mut plan = shape.decoder(shape.rotary(keys, 10_000.0)?, |_| {
        (attention.clone(), FeedForwardPlan::Gated(gated))
    });
    for layer in &mut plan.layers {
        layer.norms = LayerNorms::AFTER;
    }
    Ok(plan)
}

/// SmolLM3: some layers have no positions.
pub(super) fn smollm3(keys: &Keys) -> Result<DecoderPlan, Error> {
    let shape = Shape::read(keys, None, 1e-6)?;
    let bias = keys.flag("attention_bias", false)?;
    let interval = keys.count("no_rope_layer_interval", Some(4))?;
    let listed = keys.per_layer("no_rope_layers", shape.layers)?;
    // The name notwithstanding, 1 stands for a layer with positions.
    let has_positions = |layer: usize| match listed.map(|listed| &listed[layer]) {
        None => Ok(!(layer + 1).is_multiple_of(interval)),
        Some(Value::Bool(listed)) => Ok(*listed),
        Some(value) => match value.as_u64() {
            Some(listed @ 0..=1) => Ok(listed == 1),
            _ => Err(keys.wrong("no_rope_layers", format!("entry {layer} must be 0 or 1"))),
        },
    };
    let has_positions = (0..shape.layers).map(has_positions);
    let has_positions = has_positions.collect::<Result<Vec<bool>, Error>>()?;
    let sliding = keys.flag("use_sliding_window", false)?;
    let windows = shape.windows(keys, |layer| sliding && !has_positions[layer])?;
    let gated = GatedPlan {
        activation: keys.activation("hidden_act", "silu")?,
        bias: keys.flag("mlp_bias", false)?,
        ..shape.gated()
    };
    Ok(shape.decoder(shape.rotary(keys, 2_000_000.0)?, |layer| {
        let attention = GroupedPlan {
            input_bias: bias,
            output_bias: bias,
            rotary: has_positions[layer].then_some(0),
            window: windows[layer],
            ..shape.attention()
        };
        (attention, FeedForwardPlan::Gated(gated))
    }))
}
