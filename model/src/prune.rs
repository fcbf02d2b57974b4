//! Layer pruning: a student with some of the layers of a larger model.

use crate::{Config, Error, Llama};

/// Returns a model with the given layers of `model`, in this order, and with its embedding, final norm and head.
///
/// The tensors are shared until one of the two models changes them.
///
/// # Errors
/// Returns [`Error::PrunedLayers`] if `layers` is empty or names a layer that `model` does not have.
pub fn prune_layers(model: &Llama, layers: &[usize]) -> Result<Llama, Error> {
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
    Ok(Llama {
        layers: kept,
        config,
        ..model.clone()
    })
}
