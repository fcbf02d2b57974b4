//! The optimizer: AdamW (Loshchilov and Hutter 2019) or Muon over parameters by name, f32 masters of parameters that are in
//! another type, and clipping by the global norm.

mod muon;
mod state;

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_kernels::{AdamStep, sum_of_squares};
use potstill_model::{
    Decoder, MapParameters, Parameter, ParameterName, StoredTensor, StoredValues, TensorOperation,
    map_parameters,
};

use crate::gradients::Gradients;
use crate::settings::TrainSettings;
use crate::trainable::fits;

use crate::optimizer_settings::{DecayedRole, MomentType, OptimizerKind};
use state::ParameterState;
pub(crate) use state::{EMA, FEW_NUMBERS};

/// Name of the number of steps among [`Optimizer::tensors`].
const STEP: &str = "step";
/// Prefix of the names of masters among [`Optimizer::part`].
const MASTER: &str = "master";

/// The optimizer of a training, with its state by parameter name. A parameter has a state once it had a gradient.
///
/// A parameter in bf16 or f16 has an f32 master: the update is made to the master, and the parameter is the master, rounded.
/// Otherwise the sum of thousands of small steps would be lost in the rounding of each.
#[derive(Debug, Clone)]
pub struct Optimizer {
    settings: UpdateSettings,
    /// Number of steps that were made.
    step: u64,
    states: BTreeMap<String, ParameterState>,
}

/// The settings that a parameter's update depends on.
#[derive(Debug, Clone)]
struct UpdateSettings {
    kind: OptimizerKind,
    moments: MomentType,
    weight_decay: f64,
    decay_on: Vec<DecayedRole>,
    /// Patterns of names with factors on the learning rate.
    rate_factors: BTreeMap<String, f64>,
    /// Decay of the mean of the weights.
    ema: Option<f64>,
}

impl Optimizer {
    /// Creates an optimizer. Its AdamW has β = (0.9, 0.999) and ε = 1e-8.
    #[must_use]
    pub fn new(settings: &TrainSettings) -> Self {
        Self {
            settings: UpdateSettings {
                kind: settings.optimizer,
                moments: settings.moments,
                weight_decay: settings.weight_decay,
                decay_on: settings.weight_decay_on.clone(),
                rate_factors: settings.rate_factors.clone(),
                ema: settings.ema,
            },
            step: 0,
            states: BTreeMap::new(),
        }
    }

    /// Takes the masters of parameters from `model`, which is in f32 and will be cast to another type before the first step.
    /// `is_trained` chooses the parameters by name. Without this call, a master begins as the parameter of the first step.
    ///
    /// The tensors are shared with `model`, not copied.
    pub fn begin(&mut self, model: &Decoder, is_trained: &dyn Fn(&str) -> bool) {
        for (ParameterName { name, .. }, parameter) in potstill_model::named_parameters(model) {
            if is_trained(&name) {
                self.states.entry(name).or_default().master = Some(parameter.apply(Plain));
            }
        }
    }

    /// Returns a model whose parameters are the masters, in f32; a parameter without a master is cast to f32.
    #[must_use]
    pub fn masters(&self, model: &Decoder) -> Decoder {
        map_parameters(self.trained(model), &mut Widen)
    }

    /// Returns a model without autodiff whose trained parameters are the masters, in f32; a parameter without a master has the
    /// type that it had. The tensors are shared.
    #[must_use]
    pub fn trained(&self, model: &Decoder) -> Decoder {
        self.replaced(model, &|state: &ParameterState| state.master.clone())
    }

    /// Returns a model in f32 whose trained parameters are running means of the weights, or `None` without `ema`: after each
    /// step, e ← ema · e + (1 − ema) · θ, from the weights before the first step on.
    #[must_use]
    pub fn mean_model(&self, model: &Decoder) -> Option<Decoder> {
        let values = |state: &ParameterState| state.mean().or(state.master.clone());
        let mean = || map_parameters(self.replaced(model, &values), &mut Widen);
        self.settings.ema.map(|_| mean())
    }

    /// Returns `model` without autodiff, with the values that the states have.
    fn replaced(
        &self,
        model: &Decoder,
        values: &dyn Fn(&ParameterState) -> Option<Parameter>,
    ) -> Decoder {
        let mut replacement = Replacement {
            states: &self.states,
            values,
        };
        map_parameters(model.valid(), &mut replacement)
    }

    /// Number of steps that were made.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Whether weight decay applies to a parameter.
    #[must_use]
    pub fn decays(&self, parameter: &ParameterName) -> bool {
        let decay_on = &self.settings.decay_on;
        decay_on.iter().any(|decayed| decayed.has(parameter.role))
    }

    /// Factor on the learning rate of a parameter.
    fn rate_factor(&self, name: &str) -> f64 {
        let mut factors = self.settings.rate_factors.iter();
        let found = factors.find(|(pattern, _)| fits(pattern, name));
        found.map_or(1.0, |(_, factor)| *factor)
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
            optimizer: self,
            gradients,
            scale,
            learning_rate,
        };
        map_parameters(model, &mut update)
    }

    /// Returns the state without the masters, for a checkpoint that has the masters as its model. The tensors are shared, not
    /// copied. Those of larger numbers come first, then they are in the order of their names, as in other safetensors files.
    ///
    /// # Errors
    /// A type that files do not hold.
    pub fn tensors(&self) -> Result<Vec<StoredTensor>, potstill_model::Error> {
        let step = TensorData::new(vec![self.step as f64], [1]);
        let step = (STEP.to_owned(), StoredValues::Host(step));
        let states = self.states.iter();
        let states = states.flat_map(|(name, state)| state.tensors(name));
        let all = [step].into_iter().chain(states);
        let all = all.map(|(name, values)| StoredTensor::new(name, values));
        let mut tensors = all.collect::<Result<Vec<_>, _>>()?;
        tensors.sort_by(|a, b| {
            let size = |tensor: &StoredTensor| tensor.dtype().size();
            (size(b).cmp(&size(a))).then_with(|| a.name.cmp(&b.name))
        });
        Ok(tensors)
    }

    /// Returns the whole state, masters included, for another replica.
    pub(crate) fn part(&self) -> Result<Vec<(String, TensorData)>, String> {
        let mut tensors = Vec::new();
        for tensor in self.tensors().map_err(|why| why.to_string())? {
            let data = tensor.data().map_err(|why| why.to_string())?;
            tensors.push((tensor.name, data));
        }
        for (name, state) in &self.states {
            if let Some(master) = state.master.clone() {
                let data = master.try_into_data().map_err(|why| why.to_string())?;
                tensors.push((format!("{MASTER}.{name}"), data));
            }
        }
        Ok(tensors)
    }

    /// Drops the states of parameters that another replica updates.
    pub(crate) fn keep(&mut self, is_own: impl Fn(&str) -> bool) {
        self.states.retain(|name, _| is_own(name));
    }

    /// Restores a tensor of [`Self::tensors`], to the bit.
    ///
    /// # Errors
    /// A name or a type that no state has.
    pub fn restore(&mut self, name: &str, data: TensorData, device: &Device) -> Result<(), String> {
        if name == STEP {
            self.step = data.iter::<f64>().next().unwrap_or_default() as u64;
            return Ok(());
        }
        let (kind, parameter) = (name.split_once('.')).ok_or("it is no tensor of an optimizer")?;
        let state = self.states.entry(parameter.to_owned()).or_default();
        state.restore(kind, data, device)
    }
}

/// The update of each parameter that has a gradient.
struct Update<'a> {
    optimizer: &'a mut Optimizer,
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
        let optimizer = &mut *self.optimizer;
        let step = AdamStep {
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            learning_rate: self.learning_rate * optimizer.rate_factor(name),
            weight_decay: match optimizer.decays(parameter) {
                true => optimizer.settings.weight_decay,
                false => 0.0,
            },
            step: optimizer.step,
            scale: self.scale,
        };
        let mut state = optimizer.states.remove(name).unwrap_or_default();
        let settings = &optimizer.settings;
        let tensor = state.update(
            parameter,
            tensor.without_autodiff(),
            gradient,
            &step,
            settings,
        );
        optimizer.states.insert(name.clone(), state);
        tensor
    }
}

/// Puts values of the states in place of parameters.
struct Replacement<'a> {
    states: &'a BTreeMap<String, ParameterState>,
    values: &'a dyn Fn(&ParameterState) -> Option<Parameter>,
}

impl MapParameters for Replacement<'_> {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        let state = self.states.get(&parameter.name);
        let value = state.and_then(|state| (self.values)(state));
        let value = value.and_then(Parameter::tensor);
        value.unwrap_or(tensor)
    }
}

/// Casts half precisions to f32.
struct Widen;

impl MapParameters for Widen {
    fn map<const D: usize>(&mut self, _: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        widened(tensor)
    }
}

/// Casts half precisions to f32.
fn widened<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    match is_narrow(&tensor) {
        true => tensor.cast(DType::F32),
        false => tensor,
    }
}

/// Whether a tensor is in a half precision, so that its parameter needs a master.
fn is_narrow<const D: usize>(tensor: &Tensor<D>) -> bool {
    matches!(tensor.dtype(), DType::BF16 | DType::F16)
}

/// Removes autodiff from a tensor.
pub(crate) struct Plain;

impl TensorOperation for Plain {
    type Output = Parameter;
    fn apply<const D: usize>(self, tensor: Tensor<D>) -> Parameter {
        Parameter::new(tensor.without_autodiff())
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
