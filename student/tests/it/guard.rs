//! Steps whose loss is not finite or whose gradient jumps: they are skipped, answered by a return to a checkpoint, and at
//! last by an error.

use std::path::Path;

use burn::tensor::{DType, Tensor};
use potstill_datasets::Signal;
use potstill_model::Decoder;
use potstill_student::loss::{CustomDivergence, Divergence, forward_kl};
use potstill_student::{Arm, Error, GuardSettings, Objective, StepMetrics, TrainSettings};

use crate::resume::not_finite_on_certain_rows;
use crate::support::{bits, settings, signals, tiny, train_on};

/// Trains up to a step, and returns the model and the metrics of the steps that were made.
fn run(
    dir: &Path,
    data: &[Signal],
    settings: &TrainSettings,
    stop_at: u64,
) -> Result<(Decoder, Vec<StepMetrics>), Error> {
    let (result, steps) = train_on(tiny(DType::F32), data, Arm::Student, settings, dir, stop_at);
    Ok((result?.model(), steps))
}

/// Makes the rows of a sequence certain of their target tokens.
fn make_certain(signal: &mut Signal) {
    let first = signal.token_ids.len() - signal.rows.len();
    signal.rows.change_rows(|index, row| {
        let token = signal.token_ids[first + index];
        (row.ids, row.logprobs, row.tail_logprob) = (vec![token], vec![0.0], -40.0);
    });
}

/// A forward KL whose gradient is large on rows whose most likely token has probability 1.
fn large_on_certain_rows(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
    let certain_n1 = log_p_nk.clone().narrow(1, 0, 1).greater_equal_elem(-1e-6);
    let factor_n = certain_n1.squeeze_dim::<1>(1).float() * 1e9 + 1.0;
    forward_kl(log_p_nk, log_q_nk) * factor_n
}

fn custom(function: fn(Tensor<2>, Tensor<2>) -> Tensor<1>) -> Objective {
    Objective::of(Divergence::Custom(CustomDivergence {
        name: "custom".to_owned(),
        function: Some(function),
    }))
}

fn fresh() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_row_that_is_not_finite_costs_its_steps_alone() {
    let mut data = signals(8, 47, 31);
    make_certain(&mut data[2]);
    let settings = TrainSettings {
        objective: custom(not_finite_on_certain_rows),
        batch: 2,
        micro_batch: 1,
        steps: Some(8),
        checkpoint_every: 100,
        ..settings()
    };
    let (whole, steps) = run(fresh().path(), &data, &settings, 0).unwrap();
    let bad: Vec<&StepMetrics> = steps.iter().filter(|step| step.skipped.is_some()).collect();
    assert_eq!((steps.len(), bad.len()), (8, 2));
    for step in &bad {
        let text = step.skipped.as_ref().unwrap();
        let expected = "the loss is NaN; not finite are 1 of the 2 rows of the global batch: prompt p2, sample 0; the step is skipped";
        assert!(text.ends_with(expected), "{text}");
    }
    // The skipped step changes no weight.
    let step = bad[1].step;
    let [before, after] = [step - 1, step].map(|stop| {
        let (model, _) = run(fresh().path(), &data, &settings, stop).unwrap();
        bits(&model)
    });
    assert_eq!(before, after);
    let dir = fresh();
    run(dir.path(), &data, &settings, bad[0].step).unwrap();
    let (resumed, _) = run(dir.path(), &data, &settings, 0).unwrap();
    assert_eq!(bits(&resumed), bits(&whole));
}

#[test]
fn a_gradient_that_jumps_is_skipped_and_named() {
    let mut data = signals(16, 47, 31);
    let calm = TrainSettings {
        objective: custom(large_on_certain_rows),
        batch: 2,
        micro_batch: 2,
        steps: Some(8),
        ..settings()
    };
    // A row of the last step of the pass.
    let quiet = run(fresh().path(), &data, &calm, 0).unwrap().1;
    assert!(quiet.iter().all(|step| step.skipped.is_none()));
    let mut found = false;
    for index in 0..16 {
        let row = data[index].clone();
        make_certain(&mut data[index]);
        let (_, steps) = run(fresh().path(), &data, &calm, 0).unwrap();
        data[index] = row;
        let skipped = steps.iter().find_map(|step| step.skipped.clone());
        let Some(text) = skipped else { continue };
        found = true;
        let expected = format!(
            "largest are the gradients of 1 of the 2 rows of the global batch: prompt p{index}, sample 0; the step is skipped"
        );
        assert!(
            text.contains("the gradient norm is") && text.ends_with(&expected),
            "{text}"
        );
        break;
    }
    assert!(found);
}

#[test]
fn an_interrupted_training_goes_back_as_one_that_is_not_interrupted() {
    let data = signals(12, 47, 31);
    // The lower the limit, the more steps jump; at some limits the training ends in an error.
    for spike in [1.15, 1.5, 1.8] {
        let settings = TrainSettings {
            batch: 2,
            micro_batch: 2,
            steps: Some(14),
            checkpoint_every: 2,
            warmup: 0.0,
            guard: GuardSettings {
                skips: 1,
                returns: 3,
                rate_factor: 0.5,
                spike,
            },
            ..settings()
        };
        let outcome = |dir: &Path| match run(dir, &data, &settings, 0) {
            Ok((model, _)) => Ok(bits(&model)),
            Err(error) => Err(error.to_string()),
        };
        let dir = fresh();
        let whole = outcome(dir.path());
        for stop in (1..14).step_by(3) {
            let dir = fresh();
            // A training that fails before it is stopped fails again.
            drop(run(dir.path(), &data, &settings, stop));
            assert_eq!(
                outcome(dir.path()),
                whole,
                "stopped after step {stop}, {spike}"
            );
        }
        let lines = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
        let returns = lines.matches("goes back to the checkpoint").count();
        let jumps = lines.matches("the gradient norm is").count();
        println!(
            "{spike}: {jumps} jumps, {returns} returns, finished: {}",
            whole.is_ok()
        );
        assert!(spike > 1.2 || returns == 3, "{returns} returns");
        let half_rates = lines.contains("0.5 times the learning rate");
        assert_eq!(half_rates, returns > 0);
    }
}

#[test]
fn after_the_last_return_the_error_names_rows_and_a_remedy() {
    let data = signals(8, 47, 31);
    let settings = TrainSettings {
        batch: 2,
        micro_batch: 2,
        steps: Some(20),
        checkpoint_every: 2,
        guard: GuardSettings {
            spike: 1e-6,
            ..GuardSettings::default()
        },
        ..settings()
    };
    let error = run(fresh().path(), &data, &settings, 0).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::GradientJump { .. }), "{message}");
    assert!(
        message.contains("prompt p") && message.contains("lower learning_rate"),
        "{message}"
    );
}
