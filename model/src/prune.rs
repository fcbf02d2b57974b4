//! Pruning: a student with some of the layers of a larger model, or with narrower feed-forward blocks.

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
/// Returns the errors of [`crate::Config::with_width`].
pub fn prune_width(model: &Decoder, width: usize) -> Result<Decoder, Error> {
    let config = model.config.with_width(width)?;
    let layers = model.layers.iter().zip(&config.plan.layers);
    Ok(Decoder {
        layers: layers
            .map(|(layer, plan)| layer.clone().narrowed(plan, width))
            .collect(),
        config,
        ..model.clone()
    })
}
