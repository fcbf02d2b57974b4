//! Layer pruning: a student with some of the layers of a larger model.

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
