//! The training loop: a run that was interrupted ends in the same weights, bit for bit, and errors name their cause.

use std::ops::ControlFlow;
use std::path::Path;

use burn::tensor::{DType, Tensor};
use potstill_datasets::Signal;
use potstill_model::Decoder;
use potstill_student::loss::{CustomDivergence, Divergence, forward_kl};
use potstill_student::{
    Arm, Error, GuardSettings, Objective, Overlong, SequenceId, SignalKind, TrainSettings,
    TrainingResult, evaluate,
};

use crate::support::{bits, settings, signals, tiny, train_on};

/// Trains the tiny model, and breaks after the step `stop_at`.
pub(crate) fn run(
    dir: &Path,
    data: &[Signal],
    arm: Arm,
    settings: &TrainSettings,
    stop_at: u64,
) -> Result<TrainingResult, Error> {
    train_on(tiny(DType::F32), data, arm, settings, dir, stop_at).0
}

/// Reads the steps of an event file. A record is 8 bytes of length, 4 of checksum, the event (9 bytes of time, then
/// the step's key and number), and 4 of checksum. The first record is the file's version.
fn event_steps(dir: &Path) -> Vec<u64> {
    let bytes = std::fs::read(dir.join("tensorboard/events.out.tfevents.potstill")).unwrap();
    let mut steps = Vec::new();
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        let event = &rest[12..12 + length];
        if event[9] == 0x10 {
            // One byte holds the step, since no test makes 128 steps.
            steps.push(u64::from(event[10]));
        }
        rest = &rest[16 + length..];
    }
    steps
}

fn checkpoints(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir.join("checkpoints")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_run_that_is_stopped_and_resumed_ends_in_the_same_weights() {
    let data = signals(9, 47, 31);
    let packed = TrainSettings {
        packing: true,
        ..settings()
    };
    for (arm, settings) in [
        (Arm::Student, settings()),
        (Arm::Sft, settings()),
        (Arm::SameToken, settings()),
        (Arm::Smoothing, settings()),
        (Arm::Shuffled, settings()),
        (Arm::Student, packed),
    ] {
        let whole_dir = tempfile::tempdir().unwrap();
        let whole = run(whole_dir.path(), &data, arm, &settings, 0).unwrap();
        assert!(whole.finished && whole.step == 6);
        for stop_at in 1..6 {
            let dir = tempfile::tempdir().unwrap();
            let part = run(dir.path(), &data, arm, &settings, stop_at).unwrap();
            assert!(!part.finished && part.step == stop_at);
            let rest = run(dir.path(), &data, arm, &settings, 0).unwrap();
            assert!(rest.finished);
            assert_eq!(
                bits(&rest.model()),
                bits(&whole.model()),
                "{arm:?}, stopped after {stop_at}"
            );
            let lines = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
            assert_eq!(lines.lines().count(), 6);
            assert_eq!(event_steps(dir.path()), [1, 2, 3, 4, 5, 6]);
        }
    }
}

#[test]
fn steps_after_the_last_checkpoint_are_trained_again() {
    let data = signals(9, 47, 31);
    let whole_dir = tempfile::tempdir().unwrap();
    let whole = run(whole_dir.path(), &data, Arm::Student, &settings(), 0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &data, Arm::Student, &settings(), 3).unwrap();
    // The state after kill -9: the newest checkpoint is of step 2, metrics.jsonl has one line more, and a folder is
    // incomplete.
    std::fs::remove_dir_all(dir.path().join("checkpoints/step-00000003")).unwrap();
    std::fs::create_dir(dir.path().join("checkpoints/.step-00000004.tmp")).unwrap();
    std::fs::create_dir(dir.path().join("checkpoints/.step-00000001.old")).unwrap();
    let rest = run(dir.path(), &data, Arm::Student, &settings(), 0).unwrap();
    assert_eq!(bits(&rest.model()), bits(&whole.model()));
    assert_eq!(checkpoints(dir.path()), ["step-00000004", "step-00000006"]);
    // The state after kill -9 when all steps are made and an old checkpoint is not deleted yet.
    std::fs::create_dir(dir.path().join("checkpoints/step-00000002")).unwrap();
    let again = run(dir.path(), &data, Arm::Student, &settings(), 0).unwrap();
    assert_eq!(bits(&again.model()), bits(&whole.model()));
    assert_eq!(checkpoints(dir.path()), ["step-00000004", "step-00000006"]);
    let lines = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 6);
    assert_eq!(event_steps(dir.path()), [1, 2, 3, 4, 5, 6]);
}

#[test]
fn a_checkpoint_of_other_settings_and_a_damaged_one_are_errors() {
    let data = signals(5, 47, 31);
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &data, Arm::Student, &settings(), 2).unwrap();
    let other = TrainSettings {
        learning_rate: Some(1.0),
        ..settings()
    };
    let error = run(dir.path(), &data, Arm::Student, &other, 0)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("schedule") && error.contains("state.json"),
        "{error}"
    );
    // `packing` is stored only if it is on, so it is absent on one side of the comparison.
    let packed = TrainSettings {
        packing: true,
        ..settings()
    };
    let packed_dir = tempfile::tempdir().unwrap();
    run(packed_dir.path(), &data, Arm::Student, &packed, 2).unwrap();
    for (dir, other) in [(&dir, &packed), (&packed_dir, &settings())] {
        let error = run(dir.path(), &data, Arm::Student, other, 0)
            .unwrap_err()
            .to_string();
        assert!(error.contains("(packing)"), "{error}");
    }
    let error = run(dir.path(), &data, Arm::Sft, &settings(), 0)
        .unwrap_err()
        .to_string();
    assert!(error.contains("method"), "{error}");
    let moments = dir
        .path()
        .join("checkpoints/step-00000002/optimizer.safetensors");
    let bytes = std::fs::read(&moments).unwrap();
    std::fs::write(&moments, &bytes[..bytes.len() / 2]).unwrap();
    let error = run(dir.path(), &data, Arm::Student, &settings(), 0)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("optimizer.safetensors") && error.contains("the checkpoint before it"),
        "{error}"
    );
}

/// Bits that are flipped at positions all over each file of a checkpoint are named, and without that checkpoint the
/// training ends in the same weights.
#[test]
fn a_flipped_bit_in_a_checkpoint_is_named_and_training_resumes_from_the_one_before() {
    let data = signals(9, 47, 31);
    let whole_dir = tempfile::tempdir().unwrap();
    let whole = run(whole_dir.path(), &data, Arm::Student, &settings(), 0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &data, Arm::Student, &settings(), 3).unwrap();
    let newest = dir.path().join("checkpoints/step-00000003");
    let resume = || run(dir.path(), &data, Arm::Student, &settings(), 0);
    let refused = |name: &str| {
        let error = resume().unwrap_err().to_string();
        assert!(error.contains(&format!("step-00000003/{name}")), "{error}");
        assert!(error.contains("hint: remove the folder "), "{error}");
    };
    let mut files = 0;
    for entry in std::fs::read_dir(&newest).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let bytes = std::fs::read(&path).unwrap();
        let bits = bytes.len() * 8;
        for position in 0..12 {
            // Bits of white space in `files.json` change nothing, so its positions are those of letters.
            let bit = (position * bits / 12 + 37 * position) % bits;
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            if name == "files.json" && bytes[bit / 8].is_ascii_whitespace() {
                continue;
            }
            std::fs::write(&path, damaged).unwrap();
            refused(&name);
        }
        std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        refused(&name);
        std::fs::remove_file(&path).unwrap();
        refused(&name);
        std::fs::write(&path, bytes).unwrap();
        files += 1;
    }
    assert!(files >= 5, "{files}");
    std::fs::write(newest.join("model.safetensors.index.json"), "{}").unwrap();
    refused("model.safetensors.index.json");
    std::fs::remove_dir_all(&newest).unwrap();
    assert_eq!(bits(&resume().unwrap().model()), bits(&whole.model()));
}

#[test]
fn a_flipped_bit_in_the_metrics_of_earlier_steps_is_named() {
    let data = signals(9, 47, 31);
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &data, Arm::Student, &settings(), 3).unwrap();
    let path = dir.path().join("metrics.jsonl");
    let bytes = std::fs::read(&path).unwrap();
    for bit in (0..bytes.len() * 8).step_by(101) {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, damaged).unwrap();
        let error = run(dir.path(), &data, Arm::Student, &settings(), 0).unwrap_err();
        assert!(error.to_string().contains("metrics.jsonl:"), "{error}");
    }
    std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    let error = run(dir.path(), &data, Arm::Student, &settings(), 0).unwrap_err();
    assert!(
        error.to_string().contains("metrics.jsonl was cut short"),
        "{error}"
    );
}

#[test]
fn overlong_rows_are_dropped_or_cut_and_counted() {
    let data = signals(12, 47, 31);
    let dir = tempfile::tempdir().unwrap();
    let over = data
        .iter()
        .filter(|signal| signal.token_ids.len() > 12)
        .count() as u64;
    assert!(over > 0 && over < 12);
    let short = TrainSettings {
        max_length: 12,
        steps: Some(1),
        ..settings()
    };
    let trained = run(dir.path(), &data, Arm::Student, &short, 0).unwrap();
    assert_eq!((trained.overlong.dropped, trained.overlong.cut), (over, 0));
    let dir = tempfile::tempdir().unwrap();
    let short = TrainSettings {
        overlong: Overlong::Cut,
        ..short
    };
    let trained = run(dir.path(), &data, Arm::Student, &short, 0).unwrap();
    assert_eq!(trained.overlong.dropped + trained.overlong.cut, over);
    let none = TrainSettings {
        max_length: 1,
        overlong: Overlong::Drop,
        ..short
    };
    let dir = tempfile::tempdir().unwrap();
    let error = run(dir.path(), &data, Arm::Student, &none, 0)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("12 rows") && error.contains("max_length"),
        "{error}"
    );
}

#[test]
fn an_id_outside_the_vocabulary_is_an_error() {
    let data = signals(4, 60, 31);
    let dir = tempfile::tempdir().unwrap();
    let error = run(dir.path(), &data, Arm::Student, &settings(), 0)
        .unwrap_err()
        .to_string();
    assert!(error.contains("vocabulary of 47"), "{error}");
}

/// A divergence that is NaN on rows whose most likely token has probability 1.
pub(crate) fn not_finite_on_certain_rows(log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> Tensor<1> {
    let certain_n1 = log_p_nk.clone().narrow(1, 0, 1).greater_equal_elem(-1e-6);
    let kl_n = forward_kl(log_p_nk, log_q_nk);
    kl_n.mask_fill(certain_n1.squeeze_dim::<1>(1), f64::NAN)
}

#[test]
fn a_loss_that_is_not_finite_names_its_rows() {
    let mut data = signals(4, 47, 31);
    let signal = &mut data[2];
    let first = signal.token_ids.len() - signal.rows.len();
    signal.rows.change_rows(|position, row| {
        let target_token = signal.token_ids[first + position];
        (row.ids, row.logprobs, row.tail_logprob) = (vec![target_token], vec![0.0], -40.0);
    });
    let settings = TrainSettings {
        objective: Objective::of(Divergence::Custom(CustomDivergence {
            name: "custom".to_owned(),
            function: Some(not_finite_on_certain_rows),
        })),
        guard: GuardSettings {
            skips: 0,
            ..GuardSettings::default()
        },
        ..settings()
    };
    let dir = tempfile::tempdir().unwrap();
    let error = run(dir.path(), &data, Arm::Student, &settings, 0).unwrap_err();
    let message = error.to_string();
    let Error::NotFinite { step, rows, .. } = error else {
        panic!("{message}");
    };
    let named = SequenceId {
        prompt_id: "p2".to_owned(),
        sample_index: 0,
    };
    assert_eq!((step, rows), (1, vec![named]));
    assert!(
        message.contains("the loss is NaN") && message.contains("1 of the 4 rows"),
        "{message}"
    );
    assert!(message.contains("prompt p2, sample 0\nhint: "), "{message}");
}

#[test]
fn weights_that_are_not_finite_name_all_rows() {
    let data = signals(4, 47, 31);
    let far = TrainSettings {
        learning_rate: Some(1e30),
        warmup: 0.0,
        clip: 0.0,
        ..settings()
    };
    let dir = tempfile::tempdir().unwrap();
    let message = run(dir.path(), &data, Arm::Student, &far, 0)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("4 of the 4 rows") && message.contains("lower learning_rate"),
        "{message}"
    );
}

#[test]
fn metrics_have_the_norms_of_terms_and_the_utilisation_where_they_are_measured() {
    let data = signals(8, 47, 31);
    let metrics = |settings: &TrainSettings| {
        let dir = tempfile::tempdir().unwrap();
        let (result, steps) = train_on(
            tiny(DType::F32),
            &data,
            Arm::Student,
            settings,
            dir.path(),
            0,
        );
        result.unwrap();
        steps
    };
    let long = TrainSettings {
        steps: Some(12),
        ..settings()
    };
    for step in metrics(&long) {
        let names: Vec<&String> = step.term_gradient_norms.keys().collect();
        match step.step % 10 {
            1 => assert_eq!(names, ["cross_entropy", "forward_kl"]),
            _ => assert!(names.is_empty()),
        }
        assert!(step.term_gradient_norms.values().all(|norm| *norm > 0.0));
        assert_eq!(step.mfu, None);
    }
    let single = TrainSettings {
        objective: Objective::default(),
        peak_flops: Some(1e18),
        ..settings()
    };
    for step in metrics(&single) {
        assert!(step.term_gradient_norms.is_empty());
        assert!(step.mfu.unwrap() > 0.0 && step.mfu.unwrap() < 1.0);
    }
}

#[test]
fn training_lowers_the_held_out_kl() {
    let data = signals(8, 47, 31);
    let values = |model: &Decoder| {
        let mut row = |index: usize| Ok(data[index].clone());
        let mut on_row = |_| ControlFlow::Continue(());
        let kind = SignalKind::Distributions;
        let values = evaluate(model, &mut row, data.len(), kind, 5, &mut on_row)
            .unwrap()
            .unwrap();
        values.iter().map(|v| v.kl_nats).sum::<f64>()
            / values.iter().map(|v| f64::from(v.tokens)).sum::<f64>()
    };
    let dir = tempfile::tempdir().unwrap();
    let long = TrainSettings {
        steps: Some(40),
        checkpoint_every: 100,
        ..settings()
    };
    let trained = run(dir.path(), &data, Arm::Student, &long, 0).unwrap();
    let (before, after) = (values(&tiny(DType::F32)), values(&trained.model()));
    println!("KL {before:.3} → {after:.3} nats per token");
    assert!(after < 0.7 * before);
}
