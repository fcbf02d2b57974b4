//! The controls `same_token` and `smoothing` against trainings that must equal them.

use std::collections::BTreeMap;

use potstill_datasets::{Signal, SignalRow};
use potstill_model::Decoder;
use potstill_student::{Arm, TrainSettings, TrainingResult};

use crate::resume;
use crate::support::{bits, settings, signals};

fn run(data: &[Signal], arm: Arm, settings: &TrainSettings) -> TrainingResult {
    let dir = tempfile::tempdir().unwrap();
    resume::run(dir.path(), data, arm, settings, u64::MAX).unwrap()
}

/// Gives every sequence a twin with another first token, so that each target token occurs in two contexts.
fn with_twins(mut data: Vec<Signal>) -> Vec<Signal> {
    let twins: Vec<Signal> = (data.iter().cloned())
        .map(|mut signal| {
            signal.token_ids[0] = (signal.token_ids[0] + 1) % 47;
            signal
        })
        .collect();
    data.extend(twins);
    data
}

#[test]
fn same_token_equals_the_student_if_distributions_ignore_the_context() {
    let mut data = with_twins(signals(6, 47, 31));
    let mut by_token: BTreeMap<u32, SignalRow> = BTreeMap::new();
    for signal in &mut data {
        let positions: Vec<usize> = signal.loss_positions().collect();
        signal.rows.change_rows(|index, row| {
            let same = by_token.entry(signal.token_ids[positions[index]]);
            *row = same.or_insert_with(|| row.clone()).clone();
        });
    }
    let student = run(&data, Arm::Student, &settings());
    let control = run(&data, Arm::SameToken, &settings());
    assert_eq!(bits(&control.model()), bits(&student.model()));
    assert_eq!(control.unique_positions, 0);
}

#[test]
fn same_token_differs_from_the_student_if_distributions_depend_on_the_context() {
    let data = with_twins(signals(6, 47, 31));
    let student = run(&data, Arm::Student, &settings());
    let control = run(&data, Arm::SameToken, &settings());
    assert_ne!(bits(&control.model()), bits(&student.model()));
}

/// If every token occurs once, the targets are point masses, and forward KL to a point mass is cross-entropy.
#[test]
fn same_token_learns_unique_tokens_as_sft_does() {
    let mut next = 0;
    let data: Vec<Signal> = (signals(9, 47, 31).into_iter())
        .map(|mut signal| {
            let positions: Vec<usize> = signal.loss_positions().take(3).collect();
            signal.token_ids.truncate(positions[2] + 1);
            signal.loss_mask.truncate(positions[2] + 1);
            signal.rows.truncate(3);
            signal.rows.change_rows(|index, row| {
                (row.ids, row.logprobs) = (vec![next], vec![0.5f32.ln()]);
                row.tail_logprob = 0.5f32.ln();
                signal.token_ids[positions[index]] = next;
                next += 1;
            });
            signal
        })
        .collect();
    let control = run(&data, Arm::SameToken, &settings());
    assert_eq!(control.unique_positions, u64::from(next));
    let sft = run(&data, Arm::Sft, &settings());
    let largest = (numbers(&control.model()).iter().zip(numbers(&sft.model())))
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(largest < 1e-4, "{largest}");
}

fn numbers(model: &Decoder) -> Vec<f32> {
    bits(model).into_iter().map(f32::from_bits).collect()
}

#[test]
fn smoothing_is_sft_with_label_smoothing_of_the_mean_entropy() {
    let mut data = signals(6, 47, 31);
    let mut i = 0;
    for signal in &mut data {
        signal.rows.change_rows(|_, row| {
            row.entropy = 0.1 * (i % 7) as f32;
            i += 1;
        });
    }
    let control = run(&data, Arm::Smoothing, &settings());
    let smoothing = control.label_smoothing.unwrap();
    let mut smoothed = settings();
    smoothed.objective.label_smoothing = smoothing;
    let sft = run(&data, Arm::Sft, &smoothed);
    assert_eq!(bits(&control.model()), bits(&sft.model()));

    let rows: Vec<f64> = (data.iter().flat_map(|s| &s.rows))
        .map(|row| f64::from(row.entropy))
        .collect();
    let mean = rows.iter().sum::<f64>() / rows.len() as f64;
    let p = |id: usize| smoothing / 47.0 + if id == 3 { 1.0 - smoothing } else { 0.0 };
    let entropy: f64 = (0..47).map(|id| -p(id) * p(id).ln()).sum();
    assert!((entropy - mean).abs() < 1e-9, "{entropy} and {mean}");
}
