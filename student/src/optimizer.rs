//! AdamW (Loshchilov and Hutter 2019) over parameters by name, and clipping by the global norm.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use potstill_kernels::{AdamStep, adamw, sum_of_squares};
use potstill_model::{Decoder, MapParameters, Parameter, map_parameters};

use crate::gradient::Gradients;

/// AdamW as PyTorch computes it, see [`potstill_kernels::adamw`].
///
/// Moments have the dtype of their parameter, which should be f32 or f64.
#[derive(Debug, Clone)]
pub struct AdamW {
    /// Decay rates β₁ and β₂ of the moments.
    pub betas: (f64, f64),
    /// Term ε in the denominator of the update.
    pub epsilon: f64,
    /// Weight decay λ.
    pub weight_decay: f64,
    /// Whether weight decay applies to the parameter of a name.
    pub decays: fn(&str) -> bool,
    pub(crate) step: u64,
    pub(crate) moments: BTreeMap<String, [Parameter; 2]>,
}

impl AdamW {
    /// Creates an optimizer with β = (0.9, 0.999) and ε = 1e-8, without weight decay on norms and embeddings.
    #[must_use]
    pub fn new(weight_decay: f64) -> Self {
        Self {
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay,
            decays: |name| !name.contains("norm") && !name.contains("embed_tokens"),
            step: 0,
            moments: BTreeMap::new(),
        }
    }

    /// Updates `model` by one step along `gradients` times `scale`. A parameter without a gradient does not
    /// change.
    #[must_use]
    pub fn step(
        &mut self,
        model: Decoder,
        gradients: Gradients,
        scale: f64,
        learning_rate: f64,
    ) -> Decoder {
        self.step += 1;
        let mut update = Update {
            adam: self,
            gradients,
            scale,
            learning_rate,
        };
        map_parameters(model, &mut update)
    }
}

struct Update<'a> {
    adam: &'a mut AdamW,
    gradients: Gradients,
    scale: f64,
    learning_rate: f64,
}

impl MapParameters for Update<'_> {
    fn matrix(&mut self, name: &str, tensor: Tensor<2>) -> Tensor<2> {
        let Some(Parameter::Matrix(gradient)) = self.gradients.remove(name) else {
            return tensor;
        };
        let moments = match self.adam.moments.remove(name) {
            Some([Parameter::Matrix(m), Parameter::Matrix(v)]) => Some([m, v]),
            _ => None,
        };
        let (tensor, [m, v]) = self.update(name, tensor.inner(), gradient, moments);
        let moments = [Parameter::Matrix(m), Parameter::Matrix(v)];
        self.adam.moments.insert(name.to_owned(), moments);
        tensor
    }

    fn vector(&mut self, name: &str, tensor: Tensor<1>) -> Tensor<1> {
        let Some(Parameter::Vector(gradient)) = self.gradients.remove(name) else {
            return tensor;
        };
        let moments = match self.adam.moments.remove(name) {
            Some([Parameter::Vector(m), Parameter::Vector(v)]) => Some([m, v]),
            _ => None,
        };
        let (tensor, [m, v]) = self.update(name, tensor.inner(), gradient, moments);
        let moments = [Parameter::Vector(m), Parameter::Vector(v)];
        self.adam.moments.insert(name.to_owned(), moments);
        tensor
    }
}

impl Update<'_> {
    fn update<const D: usize>(
        &self,
        name: &str,
        theta: Tensor<D>,
        gradient: Tensor<D>,
        moments: Option<[Tensor<D>; 2]>,
    ) -> (Tensor<D>, [Tensor<D>; 2]) {
        let adam = &*self.adam;
        let step = AdamStep {
            betas: adam.betas,
            epsilon: adam.epsilon,
            learning_rate: self.learning_rate,
            weight_decay: if (adam.decays)(name) {
                adam.weight_decay
            } else {
                0.0
            },
            step: adam.step,
            scale: self.scale,
        };
        let moments = moments.unwrap_or_else(|| [gradient.zeros_like(), gradient.zeros_like()]);
        adamw(theta, gradient, moments, &step)
    }
}

/// Computes the global norm of all gradients, and the factor that scales the norm down to `limit`: 1 if the
/// norm is below, or if `limit` is 0. The factor is PyTorch's, limit / (norm + 1e-6).
#[must_use]
pub fn clip_global_norm(gradients: &Gradients, limit: f64) -> (f64, f64) {
    let squares = gradients.values().map(|gradient| match gradient {
        Parameter::Matrix(tensor) => sum_of_squares(tensor.clone()),
        Parameter::Vector(tensor) => sum_of_squares(tensor.clone()),
    });
    let norm = squares.sum::<f64>().sqrt();
    let scale = if limit > 0.0 {
        (limit / (norm + 1e-6)).min(1.0)
    } else {
        1.0
    };
    (norm, scale)
}
