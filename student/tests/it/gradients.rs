//! The step's gradient: against finite differences, under every split, zero where masked.

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};
use potstill_datasets::Signal;
use potstill_model::{Llama, MapParameters, Parameter, map_parameters};
use potstill_student::loss::Tail;
use potstill_student::{
    Arm, Block, Form, Gradients, How, Objective, Settings, Target, block_gradient, hidden_gradient,
    window_gradient,
};

use crate::support::{flat, real, relative, settings, signals, tiny};

const ARMS: [Arm; 3] = [Arm::Student, Arm::Sft, Arm::Shuffled];

fn gradient(model: &Llama, window: &[Signal], arm: Arm, settings: &Settings) -> Gradients {
    let model = model.clone().train();
    window_gradient(&model, window, arm, settings, 3)
        .unwrap()
        .gradients
}

fn loss(model: &Llama, window: &[Signal], arm: Arm) -> f64 {
    let model = model.clone().train();
    window_gradient(&model, window, arm, &settings(), 3)
        .unwrap()
        .loss
}

fn how(objective: &Objective, chunk_rows: usize) -> How<'_> {
    How {
        objective,
        per_row: 1.0,
        chunk_rows,
        form: Form::Fused,
    }
}

/// Adds `epsilon` to element `index` of parameter `name`.
struct Nudge<'a> {
    name: &'a str,
    index: usize,
    epsilon: f64,
}

impl MapParameters for Nudge<'_> {
    fn matrix(&mut self, name: &str, tensor: Tensor<2>) -> Tensor<2> {
        if name == self.name {
            self.nudge(tensor)
        } else {
            tensor
        }
    }
    fn vector(&mut self, name: &str, tensor: Tensor<1>) -> Tensor<1> {
        if name == self.name {
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

fn check_finite_differences(model: &Llama, vocab: u32, per_parameter: usize) {
    let epsilon = 1e-5;
    let mut worst: f64 = 0.0;
    for arm in ARMS {
        let window = signals(4, vocab, 11);
        let gradients = gradient(model, &window, arm, &settings());
        for (name, parameter) in &gradients {
            let values = match parameter {
                Parameter::Matrix(tensor) => tensor.to_data().iter::<f64>().collect::<Vec<_>>(),
                Parameter::Vector(tensor) => tensor.to_data().iter::<f64>().collect(),
            };
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
                    loss(&map_parameters(model.clone(), &mut nudge), &window, arm)
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

fn check_splits(load: impl Fn(DType) -> Llama, vocab: u32) {
    for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 1e-5)] {
        let model = load(dtype);
        for arm in ARMS {
            let window = signals(6, vocab, 17);
            let with = |micro_batch, chunk_rows| {
                let settings = Settings {
                    micro_batch,
                    chunk_rows,
                    ..settings()
                };
                flat(&gradient(&model, &window, arm, &settings))
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

/// Packed and unpacked windows have one gradient, whatever the lines a forward pass.
fn check_packing(load: impl Fn(DType) -> Llama, vocab: u32) {
    for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 1e-5)] {
        let model = load(dtype);
        for arm in ARMS {
            let window = signals(9, vocab, 29);
            let with = |packing, max_length, micro_batch| {
                let settings = Settings {
                    packing,
                    max_length,
                    micro_batch,
                    ..settings()
                };
                flat(&gradient(&model, &window, arm, &settings))
            };
            let unpacked = with(false, 64, 2);
            for (room, lines) in [(64, 1), (64, 2), (64, 9), (30, 2), (500, 1)] {
                let error = relative(&with(true, room, lines), &unpacked);
                println!("{dtype:?} {arm:?} packed to {room}, {lines} lines: {error:.1e}");
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

/// The gradient of one sequence's loss, packed between two that carry none, does not see them.
fn check_isolation(model: &Llama, vocab: u32) {
    let model = model.clone().train();
    let objective = Objective::mixed(0.1, 0.1);
    let how = how(&objective, 7);
    let learned = signals(1, vocab, 41).remove(0);
    let with_neighbours = |seed| {
        let mut silent = signals(2, vocab, seed);
        for signal in &mut silent {
            // Of the same lengths whatever the seed, so that only ids change.
            signal.token_ids = (0..11).map(|t| (t * 5 + seed as u32) % vocab).collect();
            signal.loss_mask = vec![false; 11];
            signal.rows.clear();
        }
        let sequences = [&silent[0], &learned, &silent[1]];
        let line =
            sequences.map(|signal| (signal, Target::new(signal, Tail::Bucket, 1.0).unwrap().0));
        let block = Block::packed(vec![line.into()], &model).unwrap();
        let mut gradients = Gradients::new();
        let terms = block_gradient(&model, &block, &how, &mut gradients);
        (flat(&gradients), terms)
    };
    let (gradient, terms) = with_neighbours(3);
    assert_eq!(terms.rows, learned.rows.len());
    assert!(gradient.iter().any(|g| *g != 0.0));
    assert_eq!(with_neighbours(8), (gradient, terms));
}

#[test]
fn packed_sequences_do_not_see_one_another() {
    check_isolation(&tiny(DType::F32), 47);
    check_isolation(&tiny(DType::F64), 47);
    let Some(dir) = real("models/stories260K") else {
        return;
    };
    let model = potstill_model::load(&dir, DType::F32, &Device::flex()).unwrap();
    check_isolation(&model, 512);
}

/// ∂L/∂hidden of a block is exactly 0 where nothing is learned and not 0 where something is.
pub(crate) fn check_masked(model: &Llama, signals: &[Signal]) {
    let model = model.clone().train();
    let targets = signals
        .iter()
        .map(|signal| Target::new(signal, Tail::Bucket, 1.0).unwrap().0)
        .collect();
    let borrowed: Vec<&Signal> = signals.iter().collect();
    let block = Block::new(&borrowed, targets, &model).unwrap();
    let ids_bt = block.ids_bt(&model.device());
    let [_, t] = ids_bt.dims();
    let hidden_nd = block.hidden(&model);
    let [_, d] = hidden_nd.dims();
    let objective = Objective::mixed(0.01, 0.01);
    let how = how(&objective, 64);
    let gradient = hidden_gradient(&hidden_nd, &model.head(), &block, &how);
    let gradient: Vec<f64> = gradient.hidden_nd.into_data().iter::<f64>().collect();
    let (mut zero, mut learned) = (0, 0);
    for (b, signal) in signals.iter().enumerate() {
        for position in 0..t {
            let carries = signal.loss_mask.get(position + 1) == Some(&true);
            let row = &gradient[(b * t + position) * d..(b * t + position + 1) * d];
            assert_eq!(
                row.iter().any(|&g| g != 0.0),
                carries,
                "sequence {b}, position {position}"
            );
            *if carries { &mut learned } else { &mut zero } += 1;
        }
    }
    println!("gradient is exactly 0 at {zero} masked positions, not 0 at {learned} learned ones");
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
    let block = Block::new(&[&signal], vec![target], &model).unwrap();
    let objective = Objective::mixed(0.0, 0.0);
    let mut gradients = Gradients::new();
    block_gradient(&model, &block, &how(&objective, 8), &mut gradients);
    assert!(gradients.is_empty());
}
