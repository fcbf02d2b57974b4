//! Layer pruning: a student with every n-th layer of a larger model.

use crate::{Config, Error, Llama};

/// Returns a model with layers 0, `every`, 2·`every`, … of `model`, and with its embedding, final norm and head.
///
/// The tensors are shared until one of the two models changes them.
///
/// # Errors
/// Returns [`Error::PruneInterval`] if `every` is 0.
pub fn prune_layers(model: &Llama, every: usize) -> Result<Llama, Error> {
    if every == 0 {
        return Err(Error::PruneInterval);
    }
    let layers: Vec<_> = model.layers.iter().step_by(every).cloned().collect();
    let config = Config {
        num_hidden_layers: layers.len(),
        ..model.config.clone()
    };
    Ok(Llama {
        layers,
        config,
        ..model.clone()
    })
}
