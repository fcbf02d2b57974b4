//! Replicas in threads: their gradient is that of one replica to rounding, equal numbers of replicas give equal bits, and a
//! training that is resumed ends in the same weights.

use std::path::Path;

use burn::tensor::DType;
use potstill_datasets::Signal;
use potstill_student::{Arm, Error, StepMetrics, TrainSettings, TrainingResult};

use crate::support::{bits, settings, signals, tiny, train_on};

/// Trains with replicas and returns the metrics of the steps, too.
fn run(
    dir: &Path,
    data: &[Signal],
    settings: &TrainSettings,
    stop_at: u64,
) -> (Result<TrainingResult, Error>, Vec<StepMetrics>) {
    train_on(tiny(DType::F32), data, Arm::Student, settings, dir, stop_at)
}

fn with_replicas(replicas: usize) -> TrainSettings {
    TrainSettings {
        steps: Some(20),
        batch: 5,
        micro_batch: 2,
        replicas,
        checkpoint_every: 6,
        ..settings()
    }
}

#[test]
fn numbers_of_replicas_agree_to_rounding_and_equal_ones_to_the_bit() {
    let data = signals(9, 47, 31);
    let trained = |replicas| {
        let dir = tempfile::tempdir().unwrap();
        let (result, steps) = run(dir.path(), &data, &with_replicas(replicas), 0);
        (bits(&result.unwrap().model()), steps)
    };
    let (_, one) = trained(1);
    assert_eq!(one.len(), 20);
    for replicas in [2, 4, 7] {
        let (weights, steps) = trained(replicas);
        let (again, _) = trained(replicas);
        assert_eq!(weights, again, "{replicas} replicas");
        for (step, expected) in steps.iter().zip(&one) {
            // The first step has the same weights, so its figures show the gradient alone.
            let tolerance = if step.step == 1 { 1e-6 } else { 1e-4 };
            for (found, expected) in [
                (step.loss, expected.loss),
                (step.gradient_norm, expected.gradient_norm),
                (step.cross_entropy, expected.cross_entropy),
                (step.forward_kl, expected.forward_kl),
            ] {
                let difference = (found - expected).abs() / expected.abs();
                assert!(
                    difference < tolerance,
                    "{replicas} replicas, step {}: {found}, not {expected}",
                    step.step
                );
            }
            assert_eq!(step.loss_tokens, expected.loss_tokens);
            assert_eq!(step.tokens, expected.tokens);
        }
    }
}

#[test]
fn a_training_with_replicas_is_resumed_to_the_bit() {
    let data = signals(9, 47, 31);
    let settings = with_replicas(3);
    let whole_dir = tempfile::tempdir().unwrap();
    let (whole, _) = run(whole_dir.path(), &data, &settings, 0);
    let whole = bits(&whole.unwrap().model());
    let optimizer = "checkpoints/step-00000020/optimizer.safetensors";
    for stop_at in [1, 7, 12, 19] {
        let dir = tempfile::tempdir().unwrap();
        let (part, _) = run(dir.path(), &data, &settings, stop_at);
        let part = part.unwrap();
        assert!(!part.finished && part.step == stop_at);
        let (rest, _) = run(dir.path(), &data, &settings, 0);
        assert_eq!(bits(&rest.unwrap().model()), whole);
        // The moments of all replicas are in the checkpoint.
        assert_eq!(
            std::fs::read(dir.path().join(optimizer)).unwrap(),
            std::fs::read(whole_dir.path().join(optimizer)).unwrap()
        );
    }
}

#[test]
fn a_checkpoint_of_another_number_of_replicas_is_refused() {
    let data = signals(9, 47, 31);
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &data, &with_replicas(2), 2).0.unwrap();
    let (other, _) = run(dir.path(), &data, &with_replicas(1), 0);
    let error = other.unwrap_err().to_string();
    assert!(error.contains("(replicas)"), "{error}");
}

#[test]
fn an_error_ends_all_replicas_and_is_the_one_reported() {
    let mut data = signals(9, 47, 31);
    data[4].token_ids[0] = 999;
    let dir = tempfile::tempdir().unwrap();
    let (trained, steps) = run(dir.path(), &data, &with_replicas(3), 0);
    assert!(matches!(
        trained,
        Err(Error::Vocabulary { id: 999, vocab: 47 })
    ));
    assert!(steps.len() < 3);
}
