//! The head's transform (scale, softcap, padding of the vocabulary) in loss, gradient and evaluation, against loops in f64.

use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::{DType, Tensor};
use potstill_datasets::Signal;
use potstill_kernels::LogitTransform;
use potstill_student::check::{LossCase, check_loss, trainer};
use potstill_student::loss::Tail;
use potstill_student::{
    Arm, Error, Form, GradientOptions, MicroBatch, Objective, SignalKind, Target, TargetRow,
    batch_gradient, evaluate, hidden_gradient, own_text_kl, start_kl,
};

use crate::support::{flat, log_probs, relative, settings, signals, tiny};

/// Number of tokens; the model has six more rows, which are padding.
const TOKENS: usize = 41;
const ROWS: usize = 47;
const SMOOTHING: f64 = 0.1;
const CROSS_ENTROPY: f64 = 0.7;

fn numbers<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    tensor.to_data().iter::<f64>().collect()
}

/// Computes KL plus smoothed cross-entropy of one row of raw logits, and its gradient with respect to them.
fn row_by_loops(
    raw: &[f64],
    target: &TargetRow,
    token: usize,
    transform: &LogitTransform,
) -> (f64, Vec<f64>) {
    let tokens = transform.vocab.unwrap_or(raw.len());
    let mut softmax_logits = Vec::new();
    let mut slopes = Vec::new();
    for z in &raw[..tokens] {
        let y = transform.scale * z;
        let t = transform.softcap.map_or(0.0, |c| (y / c).tanh());
        softmax_logits.push(transform.softcap.map_or(y, |c| c * t));
        slopes.push(transform.scale * (1.0 - t * t));
    }
    let z: f64 = softmax_logits.iter().map(|s| s.exp()).sum();
    let q: Vec<f64> = softmax_logits.iter().map(|s| s.exp() / z).collect();
    let place = |id: usize| target.ids.iter().position(|i| *i as usize == id);
    let tail: f64 = (0..tokens)
        .filter(|i| place(*i).is_none())
        .map(|i| q[i])
        .sum();
    let mut value = target.tail * (target.tail / tail).ln();
    for (id, p) in target.ids.iter().zip(&target.p) {
        value += p * (p / q[*id as usize]).ln();
    }
    let uniform = q.iter().map(|q| -q.ln()).sum::<f64>() / tokens as f64;
    value += CROSS_ENTROPY * ((1.0 - SMOOTHING) * -q[token].ln() + SMOOTHING * uniform);
    let mut gradient = vec![0.0; raw.len()];
    for i in 0..tokens {
        let p = place(i).map_or(target.tail * q[i] / tail, |slot| target.p[slot]);
        let hit = if i == token { 1.0 - SMOOTHING } else { 0.0 };
        let wanted = hit + SMOOTHING / tokens as f64;
        gradient[i] = slopes[i] * (q[i] - p + CROSS_ENTROPY * (q[i] - wanted));
    }
    (value, gradient)
}

#[test]
fn the_gradient_of_a_transformed_head_is_that_of_loops() {
    let model = tiny(DType::F64).train();
    let signals = signals(3, TOKENS as u32, 7);
    let targets: Vec<Target> = signals
        .iter()
        .map(|signal| Target::new(signal, Tail::Bucket, 1.0).unwrap().0)
        .collect();
    let tokens: Vec<usize> = signals
        .iter()
        .flat_map(|s| s.loss_positions().map(|t| s.token_ids[t] as usize))
        .collect();
    let borrowed: Vec<&Signal> = signals.iter().collect();
    let micro_batch = MicroBatch::new(&borrowed, targets.clone(), model.token_count()).unwrap();
    let hidden_nd = micro_batch.hidden(&model.valid());
    let head_vd = model.valid().head();
    let states = numbers(&micro_batch.select(hidden_nd.clone()));
    let head = numbers(&head_vd);
    let d = hidden_nd.dims()[1];
    let mut objective = Objective::mixed(1.0, CROSS_ENTROPY);
    objective.label_smoothing = SMOOTHING;
    for (scale, softcap, vocab) in [
        (1.0, Some(2.0), None),
        (0.6, Some(4.0), Some(TOKENS)),
        (1.0, None, Some(TOKENS)),
    ] {
        let transform = LogitTransform {
            scale,
            softcap,
            vocab,
            ..LogitTransform::default()
        };
        let (mut sum, mut head_gradient, mut state_gradient) =
            (0.0, vec![0.0; ROWS * d], Vec::new());
        let rows = targets.iter().flat_map(|target| &target.rows);
        for ((state, target), token) in states.chunks(d).zip(rows).zip(&tokens) {
            let product = |w: &[f64]| w.iter().zip(state).map(|(a, b)| a * b).sum();
            let raw: Vec<f64> = head.chunks(d).map(product).collect();
            let (value, gradient) = row_by_loops(&raw, target, *token, &transform);
            sum += value;
            let column = |j| {
                (0..ROWS)
                    .map(|i| gradient[i] * head[i * d + j])
                    .sum::<f64>()
            };
            state_gradient.extend((0..d).map(column));
            for i in 0..ROWS {
                for j in 0..d {
                    head_gradient[i * d + j] += gradient[i] * state[j];
                }
            }
        }
        for form in [Form::Fused, Form::Plain] {
            let options = GradientOptions {
                objective: &objective,
                row_weight: 1.0,
                chunk_rows: 5,
                form,
                transform,
                recompute: false,
                measures_terms: false,
            };
            let found = hidden_gradient(&hidden_nd, &head_vd, &micro_batch, &options);
            assert!(
                (found.sums.loss - sum).abs() < 1e-9 * sum.abs(),
                "{transform:?}"
            );
            let states = numbers(&micro_batch.select(found.hidden_nd));
            assert!(relative(&states, &state_gradient) < 1e-9, "{transform:?}");
            let head = numbers(&found.head_vd.unwrap());
            assert!(relative(&head, &head_gradient) < 1e-9, "{transform:?}");
            let padding = &head[vocab.unwrap_or(ROWS) * d..];
            assert!(padding.iter().all(|gradient| *gradient == 0.0));
        }
    }
}

#[test]
fn the_loss_check_passes_on_a_padded_vocabulary() {
    let objective = Objective {
        label_smoothing: SMOOTHING,
        ..Objective::mixed(1.0, CROSS_ENTROPY)
    };
    let model = tiny(DType::F32).with_token_count(TOKENS);
    let case = LossCase {
        on_device: model.clone(),
        model,
        signals: signals(3, TOKENS as u32, 7),
        parameters: usize::MAX,
    };
    let checks = check_loss(&objective, &case, &trainer).unwrap();
    assert!(checks.iter().all(|check| check.passed()), "{checks:?}");
}

/// Two models with the same tokens and another padding have the same distributions, so that all figures are the same.
#[test]
fn padding_changes_no_figure() {
    let unpadded = tiny(DType::F64);
    let larger = crate::support::tiny_with_rows(DType::F64, ROWS + 10);
    let padded = crate::support::with_parameters_of(larger, &unpadded).with_token_count(ROWS);
    let signals = signals(4, ROWS as u32, 12);
    let ids: Vec<u32> = (0..ROWS as u32).collect();
    let [a, b] = [&unpadded, &padded].map(|model| log_probs(model, std::slice::from_ref(&ids)));
    assert_eq!(a, b);
    let values = |model| {
        let mut row = |i: usize| Ok(signals[i].clone());
        let mut on_row = |_| ControlFlow::Continue(());
        let kind = SignalKind::Distributions;
        let values = evaluate(model, &mut row, 4, kind, 5, &mut on_row).unwrap();
        let figures =
            |v: potstill_datasets::SequenceValues| [v.kl_nats, v.nll_nats, f64::from(v.agree)];
        values
            .unwrap()
            .into_iter()
            .flat_map(figures)
            .collect::<Vec<_>>()
    };
    // Sums over other widths are rounded differently.
    let same = |a: &[f64], b: &[f64]| relative(a, b) < 1e-13;
    assert!(same(&values(&unpadded), &values(&padded)));
    let text = potstill_datasets::Encoded {
        loss_mask: (0..ids.len()).map(|t| t > 3).collect(),
        token_ids: ids.clone(),
    };
    let teacher = crate::support::scaled(unpadded.clone(), 0.8);
    let kl = |student| own_text_kl(student, &teacher, text.clone(), 6).unwrap();
    assert!(same(&[kl(&unpadded)], &[kl(&padded)]));
    let texts = [ids];
    let start = |student| start_kl(student, &teacher, &texts).map(|kl| [kl.start, kl.uniform]);
    assert!(same(&start(&unpadded).unwrap(), &start(&padded).unwrap()));
    let gradient = |model: &potstill_model::Decoder| {
        let result = batch_gradient(
            &model.clone().train(),
            &signals,
            Arm::Student,
            &settings(),
            1,
        );
        let mut gradients = result.unwrap().gradients;
        let embedding = gradients.remove("model.embed_tokens.weight").unwrap();
        let potstill_model::Parameter::Matrix(embedding_vd) = embedding else {
            panic!("an embedding is a matrix")
        };
        (flat(&gradients), numbers(&embedding_vd))
    };
    let ((rest, embedding), (padded_rest, padded_embedding)) =
        (gradient(&unpadded), gradient(&padded));
    assert!(same(&rest, &padded_rest));
    let (tokens, padding) = padded_embedding.split_at(embedding.len());
    assert!(same(tokens, &embedding));
    assert!(padding.iter().all(|gradient| *gradient == 0.0));
}

#[test]
fn a_row_of_padding_is_not_a_token() {
    let model = tiny(DType::F32).with_token_count(TOKENS);
    let mut signal = signals(1, TOKENS as u32, 3).remove(0);
    signal.token_ids[0] = TOKENS as u32;
    let (target, _) = Target::new(&signal, Tail::Bucket, 1.0).unwrap();
    let error = MicroBatch::new(&[&signal], vec![target], model.token_count()).unwrap_err();
    assert!(matches!(error, Error::Vocabulary { id: 41, vocab: 41 }));
}
