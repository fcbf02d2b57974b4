//! Rows are read ahead of the steps: once each, in their order, and errors arrive at their step.

use std::ops::ControlFlow;

use burn::tensor::DType;
use potstill_datasets::{Error as DataError, SequenceLength, Signal};
use potstill_student::{
    Arm, Error, SequenceOrder, TrainSettings, TrainingInputs, TrainingPlan, TrainingResult, train,
};

use crate::support::{bits, settings, signals, tiny};

/// Trains with `lengths`, and counts the reads of each row. Row `bad` is an error when it is read the second time.
fn run(
    data: &[Signal],
    settings: &TrainSettings,
    lengths: Option<&[SequenceLength]>,
    bad: Option<usize>,
) -> (Result<TrainingResult, Error>, Vec<u32>, Vec<u64>) {
    let mut reads = vec![0; data.len()];
    let mut steps = Vec::new();
    let dir = tempfile::tempdir().unwrap();
    let mut row = |index: usize| {
        reads[index] += 1;
        match bad == Some(index) && reads[index] == 2 {
            true => Err(DataError::NoRows),
            false => Ok(data[index].clone()),
        }
    };
    let trained = train(
        tiny(DType::F32),
        TrainingInputs {
            len: data.len(),
            row: &mut row,
            lengths,
            dev: None,
            collective: None,
            on_step: &mut |metrics| {
                assert!(metrics.stall_seconds >= 0.0);
                steps.push(metrics.step);
                ControlFlow::Continue(())
            },
        },
        &TrainingPlan {
            arm: Arm::Student,
            settings,
            schedule: settings.schedule(data.len(), 1e-2),
        },
        dir.path(),
    );
    (trained, reads, steps)
}

#[test]
fn known_lengths_spare_the_first_reading_and_change_nothing() {
    let data = signals(9, 47, 31);
    let lengths: Vec<SequenceLength> = data.iter().map(SequenceLength::of).collect();
    let longest = lengths.iter().map(|length| length.tokens).max().unwrap();
    for (max_length, order) in [
        (longest, SequenceOrder::Random),
        (longest - 3, SequenceOrder::Random),
        (longest - 3, SequenceOrder::ByLength),
    ] {
        let settings = TrainSettings {
            max_length,
            order,
            ..settings()
        };
        let (read, reads_with_pass, _) = run(&data, &settings, None, None);
        let (known, reads, _) = run(&data, &settings, Some(&lengths), None);
        let (read, known) = (read.unwrap(), known.unwrap());
        assert_eq!(bits(&read.model()), bits(&known.model()));
        assert_eq!(read.overlong, known.overlong);
        for (with_pass, without) in reads_with_pass.iter().zip(&reads) {
            assert_eq!(*with_pass, without + 1);
        }
    }
}

#[test]
fn an_error_of_a_row_arrives_at_its_step() {
    let data = signals(9, 47, 31);
    let lengths: Vec<SequenceLength> = data.iter().map(SequenceLength::of).collect();
    let settings = TrainSettings {
        steps: Some(9),
        batch: 2,
        micro_batch: 2,
        ..settings()
    };
    // Each row is read twice in 18 positions, for the second time in the steps 5 to 9.
    let mut at = Vec::new();
    for bad in 0..data.len() {
        let (trained, _, steps) = run(&data, &settings, Some(&lengths), Some(bad));
        assert!(matches!(trained, Err(Error::Data(DataError::NoRows))));
        assert!(steps.iter().copied().eq(1..=steps.len() as u64));
        at.push(steps.len() + 1);
    }
    at.sort_unstable();
    assert_eq!(at, [5, 6, 6, 7, 7, 8, 8, 9, 9]);
}
