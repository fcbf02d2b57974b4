//! The values of `evaluate`, compared with a plain computation over whole distributions.

use std::ops::ControlFlow;

use burn::tensor::{DType, Device};
use potstill_datasets::{SequenceValues, Signal};
use potstill_model::Decoder;
use potstill_student::{SignalKind, evaluate};

use crate::support::{log_probs, real, signals, tiny};

fn values(model: &Decoder, signals: &[Signal], kind: SignalKind) -> Vec<SequenceValues> {
    let mut row = |index: usize| Ok(signals[index].clone());
    let mut on_row = |_| ControlFlow::Continue(());
    evaluate(model, &mut row, signals.len(), kind, 5, &mut on_row)
        .unwrap()
        .unwrap()
}

/// Compares the probabilities of each sequence with those of the whole distributions.
fn check(model: &Decoder, signals: &[Signal]) {
    let with_distributions = values(model, signals, SignalKind::Distributions);
    let text_only = values(model, signals, SignalKind::Text);
    let (mut correct, mut wrong) = (0, 0);
    for (i, signal) in signals.iter().enumerate() {
        let log_q = log_probs(model, std::slice::from_ref(&signal.token_ids));
        let near = |found: f32, expected: f64| {
            assert!(
                (f64::from(found) - expected).abs() < 1e-5,
                "{found} {expected}"
            );
        };
        let positions = signal.loss_positions().zip(&signal.rows).enumerate();
        let mut entropy = 0.0;
        for (n, (position, row)) in positions {
            let log_q = &log_q[position - 1];
            let likeliest = (0..row.ids.len())
                .max_by(|&a, &b| row.logprobs[a].total_cmp(&row.logprobs[b]))
                .unwrap();
            let teacher = &with_distributions[i];
            near(
                teacher.confidence[n],
                log_q[row.ids[likeliest] as usize].exp(),
            );
            near(
                teacher.expected[n],
                f64::from(row.logprobs[likeliest]).exp(),
            );
            entropy += f64::from(row.entropy);

            let best = (0..log_q.len()).max_by(|&a, &b| log_q[a].total_cmp(&log_q[b]));
            let is_target = best == Some(signal.token_ids[position] as usize);
            near(text_only[i].confidence[n], log_q[best.unwrap()].exp());
            near(text_only[i].expected[n], f64::from(u8::from(is_target)));
            correct += usize::from(is_target);
            wrong += usize::from(!is_target);
        }
        for values in [&with_distributions[i], &text_only[i]] {
            assert_eq!(values.confidence.len(), values.tokens as usize);
            assert_eq!(values.expected.len(), values.tokens as usize);
            assert!((values.teacher_entropy_nats - entropy).abs() < 1e-9);
        }
    }
    assert!(correct > 0 && wrong > 0, "{correct} {wrong}");
}

/// Replaces the last token of each text by the model's most likely token, so that some predictions are correct.
fn with_likeliest_last_token(model: &Decoder, mut signals: Vec<Signal>) -> Vec<Signal> {
    for signal in &mut signals {
        let log_p = log_probs(model, std::slice::from_ref(&signal.token_ids));
        let end = signal.token_ids.len() - 1;
        let log_q = &log_p[end - 1];
        let best = (0..log_q.len()).max_by(|&a, &b| log_q[a].total_cmp(&log_q[b]));
        let best = best.unwrap() as u32;
        let (last, target_token) = (signal.rows.len() - 1, signal.token_ids[end]);
        signal.rows.change_rows(|index, row| {
            if index == last && !row.ids.contains(&best) {
                let slot = row.ids.iter().position(|id| *id == target_token).unwrap();
                row.ids[slot] = best;
            }
        });
        signal.token_ids[end] = best;
    }
    signals
}

#[test]
fn probabilities_equal_those_of_whole_distributions() {
    let model = tiny(DType::F64);
    check(
        &model,
        &with_likeliest_last_token(&model, signals(12, 47, 51)),
    );
}

#[test]
fn probabilities_on_stories260k() {
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
fn a_sequence_without_loss_has_no_probabilities() {
    let mut silent = signals(1, 47, 3);
    silent[0].loss_mask.fill(false);
    silent[0].rows.truncate(0);
    for kind in [SignalKind::Distributions, SignalKind::Text] {
        let values = values(&tiny(DType::F32), &silent, kind).remove(0);
        assert_eq!(values.tokens, 0);
        assert!(values.confidence.is_empty() && values.expected.is_empty());
    }
}
