//! Whether a loss is computed right: value and gradient of whole windows against the definition in f64,
//! the same under every split, and the same by every form.
//!
//! What is checked is a function from a model and a window to a loss and a gradient: the trainer's own,
//! or anybody's. The definition (`check/definition.rs`) shares nothing with it but the signals.

mod cases;
mod definition;

use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_datasets::{Arm, Signal};
use potstill_model::{Llama, MapParameters, Parameter, map_parameters};

use crate::error::Error;
use crate::gradient::{Gradients, WindowGradient, window_gradient};
use crate::head_loss::Form;
use crate::objective::Objective;
use crate::settings::Settings;
use definition::{Weights, window_loss};

pub use cases::Case;

/// Loss and gradient of a window: what is checked.
pub type Window<'a> = &'a dyn Fn(&Llama, &[Signal], &Settings) -> Result<WindowGradient, Error>;

/// One thing that was held against another.
#[derive(Debug, Clone, PartialEq)]
pub struct Check {
    /// What against what.
    pub what: String,
    /// The largest difference, relative.
    pub worst: f64,
    /// How large it may be.
    pub tolerance: f64,
}

impl Check {
    fn new(what: impl Into<String>, worst: f64, tolerance: f64) -> Self {
        Self {
            what: what.into(),
            worst,
            tolerance,
        }
    }

    /// Whether it is as it should be; what is no number is not.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.worst <= self.tolerance
    }
}

/// A step of finite differences.
const STEP: f64 = 1e-5;

/// The trainer's own window.
///
/// # Errors
/// As [`window_gradient`].
pub fn trainer(
    model: &Llama,
    signals: &[Signal],
    settings: &Settings,
) -> Result<WindowGradient, Error> {
    window_gradient(model, signals, Arm::Student, settings, 1)
}

/// Holds `window` with `objective` on a case to its definition, to finite differences of the definition,
/// to itself under other splits and forms, and its f32 on the case's device to its f64 on the CPU.
///
/// # Errors
/// [`Objective::check`]'s, and what `window` gives.
pub fn check_loss(
    objective: &Objective,
    case: &Case,
    window: Window<'_>,
) -> Result<Vec<Check>, Error> {
    objective.check()?;
    let model = as_f64(case.model.clone()).train();
    let signals = &case.signals;
    let whole = settings(objective, signals.len());
    let result = window(&model, signals, &whole)?;
    let exact = flat(&result.gradients);

    let plain = model.valid();
    let (value, weights) = defined(&plain, signals, objective, None);
    let off = (result.loss - value).abs() / value.abs().max(1.0);
    let mut checks = vec![Check::new(
        "value, against the definition in f64",
        off,
        1e-9,
    )];
    let steepest = slopes(&plain, &result.gradients, case, objective, &weights);
    checks.push(Check::new(
        "gradient, against finite differences of the definition",
        steepest,
        1e-5,
    ));
    checks.extend(splits(&model, signals, &whole, window, &exact)?);

    let device = case.on_device.clone().train();
    let result = window(&device, signals, &whole)?;
    let off = (result.loss - value).abs() / value.abs().max(1.0);
    let gradient = relative(&flat(&result.gradients), &exact);
    checks.push(Check::new("value in f32", off, 1e-4));
    checks.push(Check::new("gradient in f32", gradient, 1e-3));
    Ok(checks)
}

/// The same gradient, however the window is cut up and by whichever form.
fn splits(
    model: &Llama,
    signals: &[Signal],
    whole: &Settings,
    window: Window<'_>,
    exact: &[f64],
) -> Result<Vec<Check>, Error> {
    let n = signals.len();
    let packed = |max_length, micro_batch| Settings {
        packing: true,
        max_length,
        micro_batch,
        ..whole.clone()
    };
    let longest = signals.iter().map(|s| s.token_ids.len()).max().unwrap_or(1);
    let in_micro_batches = (1..n).map(|micro_batch| Settings {
        micro_batch,
        ..whole.clone()
    });
    let in_chunks = [1, 7].map(|chunk_rows| Settings {
        chunk_rows,
        ..whole.clone()
    });
    let in_rows = vec![
        packed(longest * 2, 1),
        packed(longest * n, n),
        packed(longest, 2),
    ];
    let form = Settings {
        form: Form::Plain,
        ..whole.clone()
    };
    let kinds = [
        (
            "gradient in micro-batches, against the whole window",
            in_micro_batches.collect(),
        ),
        ("gradient in chunks of 1 and 7 rows", in_chunks.to_vec()),
        ("gradient of packed sequences, against one a row", in_rows),
        (
            "gradient by tensor operations, against the kernels",
            vec![form],
        ),
    ];
    let mut checks = Vec::new();
    for (what, settings) in kinds {
        let mut worst = 0.0;
        for settings in settings {
            let result = window(model, signals, &settings)?;
            worst = larger(worst, relative(&flat(&result.gradients), exact));
        }
        checks.push(Check::new(what, worst, 1e-7));
    }
    Ok(checks)
}

/// The largest difference between the gradient and the slope of the definition, at the steepest numbers
/// and at others of some parameters; relative to the largest gradient of all.
fn slopes(
    model: &Llama,
    gradients: &Gradients,
    case: &Case,
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
                defined(&moved, &case.signals, objective, Some(weights)).0
            };
            let slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            worst = larger(worst, (slope - values[index]).abs() / largest);
        }
    }
    worst
}

/// The definition's value on a model, each sequence by itself.
fn defined(
    model: &Llama,
    signals: &[Signal],
    objective: &Objective,
    weights: Option<&Weights>,
) -> (f64, Weights) {
    let logits: Vec<Vec<Vec<f64>>> = signals.iter().map(|signal| logits(model, signal)).collect();
    window_loss(signals, &logits, objective, weights)
}

fn logits(model: &Llama, signal: &Signal) -> Vec<Vec<f64>> {
    let ids: Vec<i32> = signal.token_ids.iter().map(|id| *id as i32).collect();
    let t = ids.len();
    let at = (&model.device(), DType::I32);
    let ids_bt = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, t]), at);
    let hidden_btd = model.hidden(ids_bt);
    let [_, _, d] = hidden_btd.dims();
    let logits_nv = model.logits(hidden_btd.reshape([t, d]));
    let [_, v] = logits_nv.dims();
    let values: Vec<f64> = logits_nv.into_data().iter::<f64>().collect();
    values.chunks(v).map(<[f64]>::to_vec).collect()
}

fn settings(objective: &Objective, sequences: usize) -> Settings {
    Settings {
        batch: sequences,
        micro_batch: sequences,
        objective: objective.clone(),
        max_length: usize::MAX,
        chunk_rows: 4096,
        ..Settings::default()
    }
}

fn numbers(parameter: &Parameter) -> Vec<f64> {
    match parameter {
        Parameter::Matrix(tensor) => tensor.to_data().iter::<f64>().collect(),
        Parameter::Vector(tensor) => tensor.to_data().iter::<f64>().collect(),
    }
}

fn flat(gradients: &Gradients) -> Vec<f64> {
    gradients.values().flat_map(numbers).collect()
}

/// ‖a − b‖ / ‖b‖; NaN where the two have not as many numbers.
fn relative(a: &[f64], b: &[f64]) -> f64 {
    if a.len() != b.len() {
        return f64::NAN;
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(x, y)| x - y));
    difference / norm(&mut b.iter().copied()).max(f64::MIN_POSITIVE)
}

/// NaN counts as larger than any number.
fn larger(a: f64, b: f64) -> f64 {
    if b.is_nan() || b > a { b } else { a }
}

/// The model in f64, on the CPU.
fn as_f64(model: Llama) -> Llama {
    struct Wide;
    impl Wide {
        fn wide<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
            let data = tensor.into_data().convert::<f64>();
            Tensor::from_data(data, (&Device::flex(), DType::F64))
        }
    }
    impl MapParameters for Wide {
        fn matrix(&mut self, _: &str, tensor: Tensor<2>) -> Tensor<2> {
            Self::wide(tensor)
        }
        fn vector(&mut self, _: &str, tensor: Tensor<1>) -> Tensor<1> {
            Self::wide(tensor)
        }
    }
    map_parameters(model, &mut Wide)
}

/// Adds to one number of a parameter.
struct Nudge<'a> {
    name: &'a str,
    index: usize,
    by: f64,
}

impl Nudge<'_> {
    fn nudge<const D: usize>(&self, name: &str, tensor: Tensor<D>) -> Tensor<D> {
        if name != self.name {
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

impl MapParameters for Nudge<'_> {
    fn matrix(&mut self, name: &str, tensor: Tensor<2>) -> Tensor<2> {
        self.nudge(name, tensor)
    }
    fn vector(&mut self, name: &str, tensor: Tensor<1>) -> Tensor<1> {
        self.nudge(name, tensor)
    }
}
