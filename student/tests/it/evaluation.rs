//! The values of `evaluate`, compared with a plain computation over whole distributions.

use std::ops::ControlFlow;

use burn::tensor::{DType, Device};
use potstill_datasets::{CONFIDENCE_BINS, SequenceValues, Signal};
use potstill_model::Llama;
use potstill_student::evaluate;

use crate::support::{log_probs, real, signals, tiny};

fn values(model: &Llama, signals: &[Signal], chunk_rows: usize) -> Vec<SequenceValues> {
    let mut row = |index: usize| Ok(signals[index].clone());
    let mut on_row = |_| ControlFlow::Continue(());
    evaluate(model, &mut row, signals.len(), chunk_rows, &mut on_row)
        .unwrap()
        .unwrap()
}

/// Computes the confidence bins of one sequence: positions, summed confidence, correct positions.
fn plain_bins(model: &Llama, signal: &Signal) -> [[f64; CONFIDENCE_BINS]; 3] {
    let log_p = log_probs(model, std::slice::from_ref(&signal.token_ids));
    let mut bins = [[0.0; CONFIDENCE_BINS]; 3];
    for position in signal.loss_positions() {
        let log_q = &log_p[position - 1];
        let best = (0..log_q.len()).max_by(|&a, &b| log_q[a].total_cmp(&log_q[b]));
        let confidence = log_q[best.unwrap()].exp();
        let bin = (confidence * 10.0).floor().min(9.0) as usize;
        bins[0][bin] += 1.0;
        bins[1][bin] += confidence;
        bins[2][bin] += f64::from(best == Some(signal.token_ids[position] as usize));
    }
    bins
}

fn check(model: &Llama, signals: &[Signal]) {
    let (mut used, mut correct) = ([0; CONFIDENCE_BINS], 0);
    for (values, signal) in values(model, signals, 5).iter().zip(signals) {
        let [tokens, confidence, right] = plain_bins(model, signal);
        assert_eq!(values.bin_tokens.iter().sum::<u32>(), values.tokens);
        for bin in 0..CONFIDENCE_BINS {
            assert_eq!(f64::from(values.bin_tokens[bin]), tokens[bin]);
            assert_eq!(f64::from(values.bin_correct[bin]), right[bin]);
            let error = (values.bin_confidence[bin] - confidence[bin]).abs();
            assert!(error < 1e-5 * confidence[bin].max(1.0), "{error}");
            used[bin] += values.bin_tokens[bin];
            correct += values.bin_correct[bin];
        }
    }
    println!("positions by bin {used:?}, {correct} correct");
    assert!(used.iter().filter(|count| **count > 0).count() >= 4 && correct > 0);
}

/// Replaces the last token of each text by the model's most likely token, so that some predictions are correct.
fn with_likeliest_last_token(model: &Llama, mut signals: Vec<Signal>) -> Vec<Signal> {
    for signal in &mut signals {
        let log_p = log_probs(model, std::slice::from_ref(&signal.token_ids));
        let end = signal.token_ids.len() - 1;
        let log_q = &log_p[end - 1];
        let best = (0..log_q.len()).max_by(|&a, &b| log_q[a].total_cmp(&log_q[b]));
        let best = best.unwrap() as u32;
        let support = &mut signal.rows.last_mut().unwrap().ids;
        if !support.contains(&best) {
            let target_token = signal.token_ids[end];
            let slot = support.iter().position(|id| *id == target_token).unwrap();
            support[slot] = best;
        }
        signal.token_ids[end] = best;
    }
    signals
}

#[test]
fn calibration_counts_equal_a_plain_computation() {
    let model = tiny(DType::F64);
    check(
        &model,
        &with_likeliest_last_token(&model, signals(12, 47, 51)),
    );
}

#[test]
fn calibration_counts_on_stories260k() {
    let Some(dir) = real("models/stories260K") else {
        return;
    };
    let model = potstill_model::load(&dir, DType::F32, &Device::flex()).unwrap();
    check(
        &model,
        &with_likeliest_last_token(&model, signals(40, 512, 53)),
    );
}

#[test]
fn a_sequence_without_loss_has_empty_bins() {
    let mut silent = signals(1, 47, 3);
    silent[0].loss_mask.fill(false);
    silent[0].rows.clear();
    let values = values(&tiny(DType::F32), &silent, 5).remove(0);
    assert_eq!(values.tokens, 0);
    assert_eq!(values.bin_tokens, [0; CONFIDENCE_BINS]);
    assert_eq!(values.bin_confidence, [0.0; CONFIDENCE_BINS]);
    assert_eq!(values.bin_correct, [0; CONFIDENCE_BINS]);
}
