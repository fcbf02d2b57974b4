//! Layer pruning: a student with some of the layers of a larger model.

use crate::{Config, Decoder, Error};

/// Returns a model with the given layers of `model`, in this order, and with its embedding, final norm and head.
///
/// The tensors are shared until one of the two models changes them.
///
/// # Errors
/// Returns [`Error::PrunedLayers`] if `layers` is empty or names a layer that `model` does not have.
pub fn prune_layers(model: &Decoder, layers: &[usize]) -> Result<Decoder, Error> {
    let kept: Option<Vec<_>> = (layers.iter())
        .map(|&index| model.layers.get(index).cloned())
        .collect();
    let Some(kept) = kept.filter(|kept| !kept.is_empty()) else {
        return Err(Error::PrunedLayers {
            layers: layers.to_vec(),
            count: model.layers.len(),
        });
    };
    let config = Config {
        num_hidden_layers: kept.len(),
        ..model.config.clone()
    };
    Ok(Decoder {
        layers: kept,
        config,
        ..model.clone()
    })
}
