//! gpt-oss: sinks, biases everywhere, stacked experts with a clamped gate.

use potstill_kernels::GateActivation;
use serde_json::json;

use super::Shape;
use crate::Error;
use crate::keys::Keys;
use crate::plan::{
    DecoderPlan, ExpertsPlan, FeedForwardPlan, GatedPlan, GroupedPlan, RouterPlan, Scoring,
};
use crate::rotary_table::RotaryKeys;

pub(super) fn gpt_oss(keys: &Keys) -> Result<DecoderPlan, Error> {
    keys.only("hidden_act", &[json!("silu")])?;
    let shape = Shape::read(keys, Some(64), 1e-5)?;
    let windows = shape.windows(keys, |layer| layer % 2 == 0)?;
    let bias = keys.flag("attention_bias", true)?;
    let experts = FeedForwardPlan::Experts(ExpertsPlan {
        count: keys.count("num_local_experts", Some(128))?,
        chosen: keys.count("num_experts_per_tok", Some(4))?,
        expert: GatedPlan {
            activation: GateActivation::ClampedSwish {
                alpha: keys.number("swiglu_alpha", 1.702)?,
                limit: keys.number("swiglu_limit", 7.0)?,
            },
            bias: true,
            ..shape.gated()
        },
        shared_width: None,
        stacked: true,
        router: RouterPlan {
            name: "router",
            scoring: Scoring::SoftmaxOfChosen,
            bias: true,
            correction_bias: false,
            groups: None,
            normalised: false,
            scale: 1.0,
        },
    });
    // Without a table, transformers has that of the published models.
    let published = json!({
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
        "original_max_position_embeddings": 4096,
    });
    let rotary = RotaryKeys::find(keys, "full_attention", 150_000.0)?.or(published.as_object());
    let rotary = rotary.table(rotary.width(shape.head_dim)?, shape.context)?;
    Ok(shape.decoder(rotary, |layer| {
        let attention = GroupedPlan {
            input_bias: bias,
            output_bias: bias,
            window: windows[layer],
            sinks: true,
            ..shape.attention()
        };
        (attention, experts.clone())
    }))
}
