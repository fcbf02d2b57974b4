//! The parameters that are trained, by name.

use std::collections::BTreeSet;

use burn::tensor::Tensor;
use potstill_model::{
    Decoder, MapParameters, ParameterName, Role, map_parameters, named_parameters,
};

use crate::error::Error;
use crate::settings::TrainSettings;

/// Number of names that an error about a pattern lists.
const NEAR_NAMES: usize = 3;

/// The names of the parameters that are trained, in the order of [`named_parameters`]. Only these have gradients, master
/// weights and optimizer state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trainable {
    names: Vec<String>,
    set: BTreeSet<String>,
    /// Whether these are all parameters but routers and their corrections.
    is_whole: bool,
}

impl Trainable {
    /// Selects what `settings` train of `model`: with an adapter its matrices, and otherwise every parameter but those that
    /// `freeze` names and the routers of experts, which would send all rows to a few experts without the losses that
    /// balance them.
    ///
    /// # Errors
    /// [`Error::UnknownParameter`] for a pattern of `freeze` that fits no parameter, and [`Error::AllFrozen`] if nothing is
    /// left to train.
    pub fn of(model: &Decoder, settings: &TrainSettings) -> Result<Self, Error> {
        let all: Vec<ParameterName> = named_parameters(model).into_iter().map(|p| p.0).collect();
        check_patterns("freeze", settings.freeze.iter(), &all)?;
        check_patterns("rate_factors", settings.rate_factors.keys(), &all)?;
        let is_frozen = |name: &str| settings.freeze.iter().any(|pattern| fits(pattern, name));
        let can_train = |role: Role| match settings.adapter {
            Some(_) => role == Role::Adapter,
            None => !matches!(role, Role::Router | Role::Correction),
        };
        let is_trained = |p: &&ParameterName| can_train(p.role) && !is_frozen(&p.name);
        let trained = all.iter().filter(is_trained);
        let names: Vec<String> = trained.map(|p| p.name.clone()).collect();
        if names.is_empty() {
            return Err(Error::AllFrozen {
                freeze: settings.freeze.clone(),
            });
        }
        Ok(Self {
            set: names.iter().cloned().collect(),
            names,
            is_whole: settings.adapter.is_none() && settings.freeze.is_empty(),
        })
    }

    /// Returns the names in the order of [`named_parameters`].
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Returns whether the parameter with this name is trained.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.set.contains(name)
    }

    /// Returns whether all parameters but the routers of experts are trained.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }
}

/// Puts a model on the autodiff device with gradients for what is trained alone. Frozen parameters are constants there: no
/// gradient of theirs is computed or stored, and no graph is built below the first parameter that is trained.
#[must_use]
pub fn track(model: Decoder, trainable: &Trainable) -> Decoder {
    struct Track<'a>(&'a Trainable);
    impl MapParameters for Track<'_> {
        fn map<const D: usize>(&mut self, name: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
            let tensor = Tensor::from_inner(tensor.without_autodiff());
            match self.0.contains(&name.name) {
                true => tensor.require_grad(),
                false => tensor,
            }
        }
    }
    map_parameters(model, &mut Track(trainable))
}

/// Checks that each pattern of a key fits a parameter.
///
/// # Errors
/// [`Error::UnknownParameter`] with the nearest names.
pub(crate) fn check_patterns<'a>(
    key: &'static str,
    patterns: impl IntoIterator<Item = &'a String>,
    parameters: &[ParameterName],
) -> Result<(), Error> {
    for pattern in patterns {
        if !parameters.iter().any(|p| fits(pattern, &p.name)) {
            return Err(Error::UnknownParameter {
                key,
                pattern: pattern.clone(),
                near: near_names(pattern, parameters),
            });
        }
    }
    Ok(())
}

/// Returns whether a pattern fits the whole name of a parameter, or the name up to a dot. `*` fits any characters.
pub(crate) fn fits(pattern: &str, name: &str) -> bool {
    let ends = name.match_indices('.').map(|(end, _)| end);
    ends.chain([name.len()])
        .any(|end| fits_whole(pattern.as_bytes(), &name.as_bytes()[..end]))
}

/// Returns whether a pattern with `*` for any characters fits a text.
fn fits_whole(pattern: &[u8], text: &[u8]) -> bool {
    // The position behind the last `*` and the first text that it has not yet swallowed.
    let (mut p, mut t, mut star) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
            }
            Some(byte) if *byte == text[t] => (p, t) = (p + 1, t + 1),
            _ => match star {
                Some((after, from)) => {
                    star = Some((after, from + 1));
                    (p, t) = (after, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// Returns the names, and the parts of names up to a dot, that are nearest to a pattern by edit distance.
fn near_names(pattern: &str, parameters: &[ParameterName]) -> Vec<String> {
    let mut near = BTreeSet::new();
    for ParameterName { name, .. } in parameters {
        let ends = name.match_indices('.').map(|(end, _)| end);
        for end in ends.chain([name.len()]) {
            near.insert(&name[..end]);
        }
    }
    let mut near: Vec<(usize, &str)> = near
        .into_iter()
        .map(|name| (edit_distance(pattern, name), name))
        .collect();
    near.sort();
    let names = near.into_iter().take(NEAR_NAMES);
    names.map(|(_, name)| name.to_owned()).collect()
}

/// Computes the number of bytes to insert, delete or replace between two texts (Levenshtein 1966).
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_fits_a_name_whole_or_up_to_a_dot() {
        let name = "model.layers.12.mlp.down_proj.weight";
        for pattern in [
            name,
            "model",
            "model.layers.12",
            "model.layers.*.mlp",
            "model.layers.1*",
            "*.down_proj",
            "*",
            "*weight",
            "m*l.*.12.*.weight",
        ] {
            assert!(fits(pattern, name), "{pattern}");
        }
        for pattern in [
            "",
            "mode",
            "model.layers.1",
            "model.layers.12.",
            "mlp",
            "model.layers.*.self_attn",
            "*.down_proj.bias",
            "model.layers.12.mlp.down_proj.weight.x",
        ] {
            assert!(!fits(pattern, name), "{pattern}");
        }
    }

    #[test]
    fn the_edit_distance_is_levenshteins() {
        for (a, b, distance) in [
            ("", "", 0),
            ("", "abc", 3),
            ("kitten", "sitting", 3),
            ("flaw", "lawn", 2),
            ("same", "same", 0),
        ] {
            assert_eq!(edit_distance(a, b), distance);
            assert_eq!(edit_distance(b, a), distance);
        }
    }
}
