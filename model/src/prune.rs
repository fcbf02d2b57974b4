//! Pruning: a student with some of the layers of a larger model, or with narrower feed-forward blocks.

use serde_json::json;

use crate::plan::FeedForwardPlan;
use crate::{Decoder, Error};

/// Returns a model with the given layers of `model`, in this order, and with its embedding, final norm and head.
///
/// The tensors are shared until one of the two models changes them.
///
/// # Errors
/// Returns the errors of [`crate::Config::with_layers`].
pub fn prune_layers(model: &Decoder, layers: &[usize]) -> Result<Decoder, Error> {
    let config = model.config.with_layers(layers)?;
    let kept = layers.iter().filter_map(|&layer| model.layers.get(layer));
    Ok(Decoder {
        layers: kept.cloned().collect(),
        config,
        ..model.clone()
    })
}

/// Returns a model whose feed-forward blocks have `width` neurons of `model` each, in their order: those with the largest
/// product of the norms of gate row, up row and down column. Of equal neurons, the first is kept.
///
/// # Errors
/// Returns [`Error::PrunedWidth`] for a width of 0 or above the model's, and for a model with experts.
pub fn prune_width(model: &Decoder, width: usize) -> Result<Decoder, Error> {
    let mut layers = Vec::with_capacity(model.layers.len());
    for plan in &model.config.plan.layers {
        let why = match &plan.feed_forward {
            FeedForwardPlan::Experts(_) => "the model has experts".to_owned(),
            FeedForwardPlan::Gated(plan) if width == 0 || width > plan.width => {
                format!("the model's width is {}", plan.width)
            }
            FeedForwardPlan::Gated(_) => continue,
        };
        return Err(Error::PrunedWidth { width, why });
    }
    let config = model.config.with_key("intermediate_size", json!(width))?;
    for (layer, plan) in model.layers.iter().zip(&config.plan.layers) {
        layers.push(layer.clone().narrowed(plan, width));
    }
    Ok(Decoder {
        layers,
        config,
        ..model.clone()
    })
}
