//! The gradient of a global batch: equal to finite differences, the same for every split, zero at masked positions.

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_datasets::Signal;
use potstill_kernels::LogitTransform;
use potstill_model::{Decoder, MapParameters, ParameterName, map_parameters};
use potstill_student::loss::Tail;
use potstill_student::{
    Arm, Form, GradientOptions, Gradients, MicroBatch, Objective, Target, TrainSettings,
    batch_gradient, hidden_gradient, micro_batch_gradient,
};

use crate::support::{flat, numbers, real, relative, settings, signals, tiny};

const ARMS: [Arm; 3] = [Arm::Student, Arm::Sft, Arm::Shuffled];

fn gradient(model: &Decoder, batch: &[Signal], arm: Arm, settings: &TrainSettings) -> Gradients {
    let model = model.clone().train();
    batch_gradient(&model, batch, arm, settings, 3)
        .unwrap()
        .gradients
}

fn loss(model: &Decoder, batch: &[Signal], arm: Arm) -> f64 {
    let model = model.clone().train();
    batch_gradient(&model, batch, arm, &settings(), 3)
        .unwrap()
        .loss
}

fn options(objective: &Objective, chunk_rows: usize) -> GradientOptions<'_> {
    GradientOptions {
        objective,
        row_weight: 1.0,
        chunk_rows,
        form: Form::Fused,
        transform: LogitTransform::default(),
        recompute: false,
        measures_terms: false,
    }
}

/// Adds `epsilon` to element `index` of parameter `name`.
struct Nudge<'a> {
    name: &'a str,
    index: usize,
    epsilon: f64,
}

impl MapParameters for Nudge<'_> {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        if parameter.name == self.name {
            self.nudge(tensor)
        } else {
            tensor
        }
    }
}

impl Nudge<'_> {
    fn nudge<const D: usize>(&self, tensor: Tensor<D>) -> Tensor<D> {
        let mut data = tensor.to_data().convert::<f64>();
        data.as_mut_slice::<f64>().unwrap()[self.index] += self.epsilon;
        Tensor::from_data(data, (&tensor.device(), DType::F64))
    }
}

fn check_finite_differences(model: &Decoder, vocab: u32, per_parameter: usize) {
    let epsilon = 1e-5;
    let mut worst: f64 = 0.0;
    for arm in ARMS {
        let batch = signals(4, vocab, 11);
        let gradients = gradient(model, &batch, arm, &settings());
        for (name, parameter) in &gradients {
            let values = numbers(parameter);
            let largest =
                (0..values.len()).max_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs()));
            let spread = (0..values.len()).step_by(values.len().div_ceil(per_parameter));
            for index in spread.chain(largest) {
                let at = |epsilon| {
                    let mut nudge = Nudge {
                        name,
                        index,
                        epsilon,
                    };
                    loss(&map_parameters(model.clone(), &mut nudge), &batch, arm)
                };
                let difference = (at(epsilon) - at(-epsilon)) / (2.0 * epsilon);
                let error = (difference - values[index]).abs() / values[index].abs().max(1e-2);
                worst = worst.max(error);
                assert!(
                    error < 1e-5,
                    "{arm:?} {name}[{index}]: {difference} against {}",
                    values[index]
                );
            }
        }
    }
    println!("finite differences: largest relative error {worst:.1e}");
}

#[test]
fn gradient_norms_of_terms_are_those_of_the_logits() {
    let device = Device::flex();
    let v = 47;
    // With the identity as the head, the states are the logits, and so are their gradients.
    let identity = Tensor::<2>::eye(v, &device).cast(DType::F64);
    let data = signals(3, v as u32, 13);
    let borrowed: Vec<&Signal> = data.iter().collect();
    let target = |signal: &Signal| Target::new(signal, Tail::Bucket, 1.0).unwrap().0;
    let targets = data.iter().map(target).collect();
    let micro_batch = MicroBatch::new(&borrowed, targets, v).unwrap();
    let positions: usize = micro_batch.ids_bt(&device).dims().iter().product();
    let logits: Vec<f64> = (0..positions * v)
        .map(|i| (i as f64 * 0.71).sin())
        .collect();
    let logits = TensorData::new(logits, [positions, v]);
    let logits_nv = Tensor::<2>::from_data(logits, (&device, DType::F64));
    let both = Objective::mixed(0.7, 0.3);
    let mut measured = options(&both, 1000);
    measured.measures_terms = true;
    let found = hidden_gradient(&logits_nv, &identity, &micro_batch, &measured).sums;
    assert_eq!(found.term_norms.len(), 2);
    for (name, single) in [
        ("forward_kl", Objective::mixed(0.7, 0.0)),
        ("cross_entropy", Objective::mixed(0.0, 0.3)),
    ] {
        let alone = hidden_gradient(&logits_nv, &identity, &micro_batch, &options(&single, 5));
        let numbers: Vec<f64> = alone.hidden_nd.to_data().iter::<f64>().collect();
        let squares: f64 = numbers.iter().map(|number| number * number).sum();
        let expected = (squares / micro_batch.rows() as f64).sqrt();
        let found = found.term_norms[name];
        assert!(
            expected > 0.0 && (found / expected - 1.0).abs() < 1e-6,
            "{found} {expected}"
        );
        assert!(alone.sums.term_norms.is_empty());
    }
}

#[test]
fn equals_finite_differences_in_f64() {
    check_finite_differences(&tiny(DType::F64), 47, 3);
}

#[test]
fn equals_finite_differences_in_f64_on_stories260k() {
    let Some(dir) = real("models/stories260K") else {
        return;
    };
    let model = potstill_model::load(&dir, DType::F64, &Device::flex()).unwrap();
    check_finite_differences(&model, 512, 1);
}

fn check_splits(load: impl Fn(DType) -> Decoder, vocab: u32) {
    for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 1e-5)] {
        let model = load(dtype);
        for arm in ARMS {
            let batch = signals(6, vocab, 17);
            let with = |micro_batch, chunk_rows| {
                let settings = TrainSettings {
                    micro_batch,
                    chunk_rows,
                    ..settings()
                };
                flat(&gradient(&model, &batch, arm, &settings))
            };
            let whole = with(6, 4096);
            for (micro_batch, chunk_rows) in [
                (1, 4096),
                (2, 4096),
                (3, 4096),
                (4, 4096),
                (5, 4096),
                (6, 1),
                (4, 7),
            ] {
                let error = relative(&with(micro_batch, chunk_rows), &whole);
                println!(
                    "{dtype:?} {arm:?} micro-batch {micro_batch}, {chunk_rows} rows: {error:.1e}"
                );
                assert!(error <= tolerance, "{error:e}");
            }
        }
    }
}

#[test]
fn is_the_same_for_every_split() {
    check_splits(tiny, 47);
}

#[test]
fn is_the_same_for_every_split_on_stories260k() {
    let Some(dir) = real("models/stories260K") else {
        return;
    };
    check_splits(
        |dtype| potstill_model::load(&dir, dtype, &Device::flex()).unwrap(),
        512,
    );
}

/// Checks that packed and unpacked batches have the same gradient, for several numbers of packed rows in a
/// micro-batch.
fn check_packing(load: impl Fn(DType) -> Decoder, vocab: u32) {
    for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 1e-5)] {
        let model = load(dtype);
        for arm in ARMS {
            let batch = signals(9, vocab, 29);
            let with = |packing, max_length, micro_batch| {
                let settings = TrainSettings {
                    packing,
                    max_length,
                    micro_batch,
                    ..settings()
                };
                flat(&gradient(&model, &batch, arm, &settings))
            };
            let unpacked = with(false, 64, 2);
            for (max_length, packed_rows) in [(64, 1), (64, 2), (64, 9), (30, 2), (500, 1)] {
                let error = relative(&with(true, max_length, packed_rows), &unpacked);
                println!(
                    "{dtype:?} {arm:?} packed to {max_length}, {packed_rows} rows: {error:.1e}"
                );
                assert!(error <= tolerance, "{error:e}");
            }
        }
    }
}

#[test]
fn packing_does_not_change_it() {
    check_packing(tiny, 47);
}

#[test]
fn packing_does_not_change_it_on_stories260k() {
    let Some(dir) = real("models/stories260K") else {
        return;
    };
    check_packing(
        |dtype| potstill_model::load(&dir, dtype, &Device::flex()).unwrap(),
        512,
    );
}

/// Checks that the gradient of a sequence does not depend on its neighbours in a packed row, which carry no loss.
fn check_isolation(model: &Decoder, vocab: u32) {
    let model = model.clone().train();
    let objective = Objective::mixed(0.1, 0.1);
    let options = options(&objective, 7);
    let with_loss = signals(1, vocab, 41).remove(0);
    let with_neighbours = |seed| {
        let mut masked = signals(2, vocab, seed);
        for signal in &mut masked {
            // The lengths do not depend on the seed, so that only ids change.
            signal.token_ids = (0..11).map(|t| (t * 5 + seed as u32) % vocab).collect();
            signal.loss_mask = vec![false; 11];
            signal.rows.truncate(0);
        }
        let sequences = [&masked[0], &with_loss, &masked[1]];
        let packed_row =
            sequences.map(|signal| (signal, Target::new(signal, Tail::Bucket, 1.0).unwrap().0));
        let micro_batch = MicroBatch::packed(vec![packed_row.into()], model.token_count()).unwrap();
        let mut gradients = Gradients::new();
        let sums = micro_batch_gradient(&model, &micro_batch, &options, &mut gradients);
        (flat(&gradients), sums)
    };
    let (gradient, sums) = with_neighbours(3);
    assert_eq!(sums.rows, with_loss.rows.len());
    assert!(gradient.iter().any(|g| *g != 0.0));
    assert_eq!(with_neighbours(8), (gradient, sums));
}

#[test]
fn packed_sequences_do_not_depend_on_each_other() {
    check_isolation(&tiny(DType::F32), 47);
    check_isolation(&tiny(DType::F64), 47);
    let Some(dir) = real("models/stories260K") else {
        return;
    };
    let model = potstill_model::load(&dir, DType::F32, &Device::flex()).unwrap();
    check_isolation(&model, 512);
}

/// Checks that ∂L/∂hidden of a micro-batch is exactly 0 at positions without loss, and not 0 at the others.
pub(crate) fn check_masked(model: &Decoder, signals: &[Signal]) {
    let model = model.clone().train();
    let targets = signals
        .iter()
        .map(|signal| Target::new(signal, Tail::Bucket, 1.0).unwrap().0)
        .collect();
    let borrowed: Vec<&Signal> = signals.iter().collect();
    let micro_batch = MicroBatch::new(&borrowed, targets, model.token_count()).unwrap();
    let ids_bt = micro_batch.ids_bt(&model.device());
    let [_, t] = ids_bt.dims();
    let hidden_nd = micro_batch.hidden(&model);
    let [_, d] = hidden_nd.dims();
    let objective = Objective::mixed(0.01, 0.01);
    let options = options(&objective, 64);
    let gradient = hidden_gradient(&hidden_nd, &model.head(), &micro_batch, &options);
    let gradient: Vec<f64> = gradient.hidden_nd.into_data().iter::<f64>().collect();
    let (mut zero, mut nonzero) = (0, 0);
    for (b, signal) in signals.iter().enumerate() {
        for position in 0..t {
            let has_loss = signal.loss_mask.get(position + 1) == Some(&true);
            let row = &gradient[(b * t + position) * d..(b * t + position + 1) * d];
            assert_eq!(
                row.iter().any(|&g| g != 0.0),
                has_loss,
                "sequence {b}, position {position}"
            );
            *if has_loss { &mut nonzero } else { &mut zero } += 1;
        }
    }
    println!("gradient is exactly 0 at {zero} masked positions, not 0 at {nonzero} loss positions");
}

#[test]
fn masked_positions_get_a_gradient_of_exactly_zero() {
    check_masked(&tiny(DType::F32), &signals(5, 47, 23));
}

#[test]
fn no_rows_and_no_weights_give_no_gradient() {
    let model = tiny(DType::F32).train();
    let signal = signals(1, 47, 1).remove(0);
    let (target, _) = Target::new(&signal, Tail::Bucket, 1.0).unwrap();
    let micro_batch = MicroBatch::new(&[&signal], vec![target], model.token_count()).unwrap();
    let objective = Objective::mixed(0.0, 0.0);
    let mut gradients = Gradients::new();
    micro_batch_gradient(
        &model,
        &micro_batch,
        &options(&objective, 8),
        &mut gradients,
    );
    assert!(gradients.is_empty());
}
