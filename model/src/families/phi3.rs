//! Phi-3, Phi-3.5 and Phi-4: fused projections, a part of each head rotated, `longrope`.

use super::Shape;
use crate::Error;
use crate::keys::Keys;
use crate::plan::{DecoderPlan, FeedForwardPlan, GatedPlan, GroupedPlan};

pub(super) fn phi3(keys: &Keys) -> Result<DecoderPlan, Error> {
    let shape = Shape::read(keys, None, 1e-5)?;
    let attention = GroupedPlan {
        fused: true,
        window: keys.optional_count("sliding_window")?,
        ..shape.attention()
    };
    let gated = GatedPlan {
        activation: keys.activation("hidden_act", "silu")?,
        fused: true,
        ..shape.gated()
    };
    Ok(shape.decoder(shape.rotary(keys, 10_000.0)?, |_| {
        (attention.clone(), FeedForwardPlan::Gated(gated))
    }))
}
