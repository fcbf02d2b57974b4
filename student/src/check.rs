//! Checks that a loss is computed correctly: value and gradient of a global batch must equal the definition in
//! f64, and must be the same for every split into micro-batches and for every implementation.
//!
//! The checked function maps a model and a global batch to a loss and a gradient. It is the trainer's own, or one
//! that a program brings. The definition (`check/definition.rs`) shares only the signals with it.

mod cases;
mod definition;

use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_datasets::{Arm, Signal};
use potstill_model::{
    Decoder, MapParameters, Parameter, ParameterName, TensorOperation, map_parameters,
};

use crate::error::Error;
use crate::gradient::{BatchGradient, batch_gradient};
use crate::gradients::Gradients;
use crate::head_loss::Form;
use crate::objective::Objective;
use crate::settings::TrainSettings;
use definition::{Weights, batch_loss_by_definition};

pub use cases::LossCase;

/// A function that computes loss and gradient of a global batch.
pub type BatchLoss<'a> =
    &'a dyn Fn(&Decoder, &[Signal], &TrainSettings) -> Result<BatchGradient, Error>;

/// Result of one comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct LossCheck {
    /// Names of the two sides that were compared.
    pub comparison: String,
    /// Largest relative difference.
    pub difference: f64,
    /// Largest relative difference that passes.
    pub tolerance: f64,
}

impl LossCheck {
    fn new(comparison: impl Into<String>, difference: f64, tolerance: f64) -> Self {
        Self {
            comparison: comparison.into(),
            difference,
            tolerance,
        }
    }

    /// Whether the difference is within the tolerance. NaN is not.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.difference <= self.tolerance
    }
}

/// Step of the finite differences.
const STEP: f64 = 1e-5;

/// The trainer's own loss and gradient, for [`check_loss`].
///
/// # Errors
/// As [`batch_gradient`].
pub fn trainer(
    model: &Decoder,
    signals: &[Signal],
    settings: &TrainSettings,
) -> Result<BatchGradient, Error> {
    batch_gradient(model, signals, Arm::Student, settings, 1)
}

/// Compares `batch_loss` with `objective` on a case to the definition, to finite differences of the definition, to
/// itself with other splits and implementations, and its values in f32 on the case's device to those in f64 on the
/// CPU.
///
/// # Errors
/// Errors of [`Objective::check`] and of `batch_loss`.
pub fn check_loss(
    objective: &Objective,
    case: &LossCase,
    batch_loss: BatchLoss<'_>,
) -> Result<Vec<LossCheck>, Error> {
    objective.check()?;
    let model = as_f64(case.model.clone()).train();
    let signals = &case.signals;
    let whole = settings(objective, signals.len());
    let result = batch_loss(&model, signals, &whole)?;
    let exact = flat(&result.gradients);

    let plain = model.valid();
    let (value, weights) = definition_value(&plain, signals, objective, None);
    let difference = (result.loss - value).abs() / value.abs().max(1.0);
    let mut checks = vec![LossCheck::new(
        "value, against the definition in f64",
        difference,
        1e-9,
    )];
    let difference = slope_difference(&plain, &result.gradients, case, objective, &weights);
    checks.push(LossCheck::new(
        "gradient, against finite differences of the definition",
        difference,
        1e-5,
    ));
    checks.extend(splits(&model, signals, &whole, batch_loss, &exact)?);

    let device = case.on_device.clone().train();
    let result = batch_loss(&device, signals, &whole)?;
    let difference = (result.loss - value).abs() / value.abs().max(1.0);
    let gradient = relative(&flat(&result.gradients), &exact);
    checks.push(LossCheck::new("value in f32", difference, 1e-4));
    checks.push(LossCheck::new("gradient in f32", gradient, 1e-3));
    Ok(checks)
}

/// Compares the gradient with other splits, packings, chunk sizes and implementations.
fn splits(
    model: &Decoder,
    signals: &[Signal],
    whole: &TrainSettings,
    batch_loss: BatchLoss<'_>,
    exact: &[f64],
) -> Result<Vec<LossCheck>, Error> {
    let n = signals.len();
    let packed = |max_length, micro_batch| TrainSettings {
        packing: true,
        max_length,
        micro_batch,
        ..whole.clone()
    };
    let longest = signals.iter().map(|s| s.token_ids.len()).max().unwrap_or(1);
    let in_micro_batches = (1..n).map(|micro_batch| TrainSettings {
        micro_batch,
        ..whole.clone()
    });
    let in_chunks = [1, 7].map(|chunk_rows| TrainSettings {
        chunk_rows,
        ..whole.clone()
    });
    let in_packed_rows = vec![
        packed(longest * 2, 1),
        packed(longest * n, n),
        packed(longest, 2),
    ];
    let by_tensor_operations = TrainSettings {
        form: Form::Plain,
        ..whole.clone()
    };
    let comparisons = [
        (
            "gradient in micro-batches, against the whole batch",
            in_micro_batches.collect(),
        ),
        ("gradient in chunks of 1 and 7 rows", in_chunks.to_vec()),
        (
            "gradient of packed sequences, against one sequence in each row",
            in_packed_rows,
        ),
        (
            "gradient by tensor operations, against the kernels",
            vec![by_tensor_operations],
        ),
    ];
    let mut checks = Vec::new();
    for (comparison, settings) in comparisons {
        let mut worst = 0.0;
        for settings in settings {
            let result = batch_loss(model, signals, &settings)?;
            worst = larger(worst, relative(&flat(&result.gradients), exact));
        }
        checks.push(LossCheck::new(comparison, worst, 1e-7));
    }
    Ok(checks)
}

/// Computes the largest difference between the gradient and finite differences of the definition, relative to the
/// largest entry of the gradient. Tests two entries of some parameters: one with the largest gradient, and one other.
fn slope_difference(
    model: &Decoder,
    gradients: &Gradients,
    case: &LossCase,
    objective: &Objective,
    weights: &Weights,
) -> f64 {
    let all = flat(gradients);
    let largest = all.iter().fold(0.0, |m: f64, g| m.max(g.abs()));
    let mut worst = 0.0;
    let stride = gradients.len().div_ceil(case.parameters.max(1)).max(1);
    for (name, parameter) in gradients.iter().step_by(stride) {
        let values = numbers(parameter);
        let by_size = |a: &usize, b: &usize| values[*a].abs().total_cmp(&values[*b].abs());
        let steepest = (0..values.len()).max_by(by_size);
        for index in [Some(values.len() / 3), steepest].into_iter().flatten() {
            let at = |by: f64| {
                let mut nudge = Nudge { name, index, by };
                let moved = map_parameters(model.clone(), &mut nudge);
                definition_value(&moved, &case.signals, objective, Some(weights)).0
            };
            let slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            worst = larger(worst, (slope - values[index]).abs() / largest);
        }
    }
    worst
}

/// Computes the definition's value on a model, with one forward pass for each sequence.
fn definition_value(
    model: &Decoder,
    signals: &[Signal],
    objective: &Objective,
    weights: Option<&Weights>,
) -> (f64, Weights) {
    let logits: Vec<Vec<Vec<f64>>> = signals.iter().map(|signal| logits(model, signal)).collect();
    let transform = model.logit_transform();
    batch_loss_by_definition(signals, &logits, &transform, objective, weights)
}

/// Computes the raw logits at each position.
fn logits(model: &Decoder, signal: &Signal) -> Vec<Vec<f64>> {
    let ids: Vec<i32> = signal.token_ids.iter().map(|id| *id as i32).collect();
    let t = ids.len();
    let at = (&model.device(), DType::I32);
    let ids_bt = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, t]), at);
    let hidden_btd = model.hidden(ids_bt);
    let [_, _, d] = hidden_btd.dims();
    let logits_nv = model.raw_logits(hidden_btd.reshape([t, d]));
    let [_, v] = logits_nv.dims();
    let values: Vec<f64> = logits_nv.into_data().iter::<f64>().collect();
    values.chunks(v).map(<[f64]>::to_vec).collect()
}

fn settings(objective: &Objective, sequences: usize) -> TrainSettings {
    TrainSettings {
        batch: sequences,
        micro_batch: sequences,
        objective: objective.clone(),
        max_length: usize::MAX,
        chunk_rows: 4096,
        ..TrainSettings::default()
    }
}

fn numbers(parameter: &Parameter) -> Vec<f64> {
    struct Numbers;
    impl TensorOperation for Numbers {
        type Output = Vec<f64>;
        fn apply<const D: usize>(self, tensor: Tensor<D>) -> Vec<f64> {
            tensor.into_data().iter::<f64>().collect()
        }
    }
    parameter.clone().apply(Numbers)
}

fn flat(gradients: &Gradients) -> Vec<f64> {
    gradients.values().flat_map(numbers).collect()
}

/// Computes ‖a − b‖ / ‖b‖; NaN if the lengths differ.
fn relative(a: &[f64], b: &[f64]) -> f64 {
    if a.len() != b.len() {
        return f64::NAN;
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(x, y)| x - y));
    difference / norm(&mut b.iter().copied()).max(f64::MIN_POSITIVE)
}

/// Returns the larger of the two; NaN counts as larger than any number.
fn larger(a: f64, b: f64) -> f64 {
    if b.is_nan() || b > a { b } else { a }
}

/// Converts the model to f64 on the CPU.
fn as_f64(model: Decoder) -> Decoder {
    struct ToF64;
    impl MapParameters for ToF64 {
        fn map<const D: usize>(&mut self, _: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
            let data = tensor.into_data().convert::<f64>();
            Tensor::from_data(data, (&Device::flex(), DType::F64))
        }
    }
    map_parameters(model, &mut ToF64)
}

/// Adds `by` to one entry of a parameter.
struct Nudge<'a> {
    name: &'a str,
    index: usize,
    by: f64,
}

impl MapParameters for Nudge<'_> {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        if parameter.name != self.name {
            return tensor;
        }
        let (device, shape) = (tensor.device(), tensor.shape());
        let mut values: Vec<f64> = tensor.into_data().iter::<f64>().collect();
        if let Some(value) = values.get_mut(self.index) {
            *value += self.by;
        }
        Tensor::from_data(TensorData::new(values, shape), (&device, DType::F64))
    }
}
