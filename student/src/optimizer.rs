//! AdamW (Loshchilov and Hutter 2019) over parameters by name, and clipping by the global norm.

mod settings;

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use potstill_kernels::{AdamStep, adamw, sum_of_squares};
use potstill_model::{
    Decoder, MapParameters, Parameter, ParameterName, Role, TensorOperation, map_parameters,
};

use crate::gradient::Gradients;

pub use settings::{MomentType, OptimizerKind};

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
    /// Whether weight decay applies to a parameter.
    pub decays: fn(&ParameterName) -> bool,
    pub(crate) step: u64,
    pub(crate) moments: BTreeMap<String, [Parameter; 2]>,
}

impl AdamW {
    /// Creates an optimizer with β = (0.9, 0.999) and ε = 1e-8, with weight decay on projections and
    /// an untied head only.
    #[must_use]
    pub fn new(weight_decay: f64) -> Self {
        Self {
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay,
            decays: |parameter| matches!(parameter.role, Role::Projection | Role::Head),
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
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        let name = &parameter.name;
        let gradient = self.gradients.remove(name).and_then(Parameter::tensor);
        let Some(gradient) = gradient else {
            return tensor;
        };
        let adam = &mut *self.adam;
        let step = AdamStep {
            betas: adam.betas,
            epsilon: adam.epsilon,
            learning_rate: self.learning_rate,
            weight_decay: match (adam.decays)(parameter) {
                true => adam.weight_decay,
                false => 0.0,
            },
            step: adam.step,
            scale: self.scale,
        };
        let moments = adam.moments.remove(name);
        let moments = moments.and_then(|[m, v]| Some([m.tensor()?, v.tensor()?]));
        let moments = moments.unwrap_or_else(|| [gradient.zeros_like(), gradient.zeros_like()]);
        let (tensor, moments) = adamw(tensor.inner(), gradient, moments, &step);
        let moments = moments.map(Parameter::new);
        adam.moments.insert(name.clone(), moments);
        tensor
    }
}

/// Computes the global norm of all gradients, and the factor that scales the norm down to `limit`: 1 if the
/// norm is below, or if `limit` is 0. The factor is PyTorch's, limit / (norm + 1e-6).
#[must_use]
pub fn clip_global_norm(gradients: &Gradients, limit: f64) -> (f64, f64) {
    struct Squares;
    impl TensorOperation for Squares {
        type Output = f64;
        fn apply<const D: usize>(self, tensor: Tensor<D>) -> f64 {
            sum_of_squares(tensor)
        }
    }
    let squares = gradients
        .values()
        .map(|gradient| gradient.clone().apply(Squares));
    let norm = squares.sum::<f64>().sqrt();
    let scale = if limit > 0.0 {
        (limit / (norm + 1e-6)).min(1.0)
    } else {
        1.0
    };
    (norm, scale)
}
