//! A student cut from a larger model: every n-th layer, the rest as it is.

use crate::{Config, Error, Llama};

/// Layers 0, `every`, 2·`every`, … of `model`, with its embedding, final norm and head.
///
/// The tensors are shared until one of the two models changes them.
///
/// # Errors
/// [`Error::CutEvery`] for `every` = 0.
pub fn cut(model: &Llama, every: usize) -> Result<Llama, Error> {
    if every == 0 {
        return Err(Error::CutEvery);
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
