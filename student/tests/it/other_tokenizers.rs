//! A teacher with another tokenizer: conversion of rows to the student's ids, and KL over spans.

use std::ops::Range;

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Tensor};
use potstill_datasets::align;
use potstill_student::TargetRow;
use potstill_student::spans::{in_student_ids, span_kl, span_log_p, span_log_q};

use crate::plain::{
    Rows, check, constant, log_softmax as log_softmax_f64, log_softmaxes, near, numbers, random,
    tensor, value_and_gradient,
};

const FLOOR: f64 = -60.0 * std::f64::consts::LN_2;

#[test]
fn rows_are_converted_to_the_students_ids() {
    let row = TargetRow {
        ids: vec![4, 0, 2, 1, 9],
        p: vec![0.4, 0.2, 0.15, 0.1, 0.05],
        tail: 0.1,
        entropy: 0.0,
    };
    // Teacher's token 2 has no student's token, 1 and 4 have the same one, and 9 is beyond the map.
    let map = [Some(70), Some(30), None, None, Some(30)];
    let found = in_student_ids(&row, &map);
    assert_eq!(found.ids, [30, 70]);
    near("p", &found.p, &[0.5, 0.2], 1e-15);
    near("tail", &[found.tail], &[0.3], 1e-15);

    let nothing = in_student_ids(&row, &[None; 5]);
    assert!(nothing.ids.is_empty() && (nothing.tail - 1.0).abs() < 1e-15);
}

#[test]
fn the_teachers_buckets_keep_their_digits() {
    for (log_p, expected) in [
        (vec![-1e-10], [-1e-10, (1e-10f64).ln() - 0.5e-10]),
        (vec![-1e-14, -3e-14], [-4e-14, (4e-14f64).ln()]),
        (vec![-20.0, -25.0], [-45.0, -(-45.0f64).exp()]),
        (vec![-0.5, -0.25], [-0.75, (1.0 - (-0.75f64).exp()).ln()]),
        (vec![0.0], [0.0, FLOOR]),
        (vec![1e-9], [0.0, FLOOR]),
        (vec![f64::NEG_INFINITY], [-1e4, 0.0]),
    ] {
        let found = span_log_p(&log_p);
        for (found, expected) in found.iter().zip(expected) {
            let bound = 1e-12 * f64::abs(expected).max(1e-30);
            assert!(
                (found - expected).abs() <= bound,
                "{log_p:?}: {found} {expected}"
            );
        }
    }
}

/// Computes [log Q, log(1 − Q)] of rows [log q, log(1 − q)].
fn buckets(rows: &[Vec<f64>]) -> [f64; 2] {
    let (mut log_q, mut rest) = (0.0, 0.0);
    for row in rows {
        rest += (log_q + row[1]).exp();
        log_q += row[0];
    }
    [log_q, rest.ln()]
}

fn kl(log_p: &Rows, log_q: &Rows, spans: &[Range<usize>]) -> Vec<f64> {
    let span = |(p, span): (&Vec<f64>, &Range<usize>)| {
        let q = buckets(&log_q[span.clone()]);
        p[0].exp() * (p[0] - q[0]) + p[1].exp() * (p[1] - q[1])
    };
    log_p.iter().zip(spans).map(span).collect()
}

fn teacher(log_p: &[f64]) -> Rows {
    log_p
        .iter()
        .map(|&log_p| span_log_p(&[log_p]).to_vec())
        .collect()
}

fn loss(log_p: &Rows, log_q_n2: Tensor<2>, spans: &[Range<usize>]) -> Tensor<1> {
    let log_p_m2 = tensor(log_p, log_q_n2.dtype(), &log_q_n2.device());
    span_kl(log_p_m2, log_q_n2, spans)
}

#[test]
fn kl_of_ragged_spans() {
    // Rows 3 and 8 belong to no span.
    let spans = [0..3, 4..5, 5..8, 9..11];
    let log_p = teacher(&[-0.2, -3.0, -1e-7, -30.0]);
    let log_q = log_softmaxes(&random(11, 2, 3.0, 20));
    check(
        "span kl",
        &log_q,
        |q| loss(&log_p, q, &spans),
        |q| kl(&log_p, q, &spans),
    );
    let (_, gradient) = value_and_gradient(&log_q, DType::F64, &|q| loss(&log_p, q, &spans));
    assert_eq!([&gradient[6..8], &gradient[16..18]].concat(), [0.0; 4]);
    assert!(gradient[..6].iter().all(|&g| g != 0.0));
}

/// The gradients are at logits [token, everything else]. In f32 the student's log q is 0 in most of these rows, so
/// 1 − exp(log q) would be 0 too.
#[test]
fn certain_and_impossible_spans_keep_their_gradient_in_f32() {
    let logits: Rows = [25.0, 30.0, 28.0, -40.0, 3.0, 20.0, 20.0, 60.0]
        .iter()
        .map(|&z| vec![z, 0.0])
        .collect();
    let spans = [0..1, 1..3, 3..4, 4..6, 6..7, 7..8];
    let log_p = teacher(&[-0.5, -0.7, -1.0, -2000.0, -1e-8, 0.0]);
    let of_logits = |z: Tensor<2>| loss(&log_p, log_softmax(z, 1), &spans);
    let (value, gradient) = value_and_gradient(&logits, DType::F32, &of_logits);
    let exact = |z: &Rows| kl(&log_p, &log_softmaxes(z), &spans);
    near("value", &value, &exact(&logits), 1e-5);

    // ∂D/∂z of a span of one token is Q − P, here multiplied by the row's weight.
    let q = |row: usize| log_softmax_f64(&logits[row])[0].exp();
    for (row, weight, p) in [
        (0, 1.0, -0.5f64),
        (3, 3.0, -1.0),
        (6, 5.0, -1e-8),
        (7, 6.0, 0.0),
    ] {
        let expected = weight * (q(row) - p.exp());
        assert!(
            (gradient[2 * row] - expected).abs() < 1e-5,
            "{row}: {}",
            gradient[2 * row]
        );
        assert!((gradient[2 * row + 1] + expected).abs() < 1e-5);
    }
    // In a span of several tokens, the gradient is shared by the tokens with q below 1.
    let (_, in_f64) = value_and_gradient(&logits, DType::F64, &of_logits);
    near("gradient", &gradient, &in_f64, 1e-5);
    assert!(gradient[4] > 0.5 && gradient[2] > 0.01, "{gradient:?}");
}

#[test]
fn a_certain_teacher_and_equal_distributions() {
    let log_q = log_softmaxes(&random(5, 2, 2.0, 21));
    let spans = [0..2, 2..5];
    let (value, gradient) = value_and_gradient(&log_q, DType::F64, &|q| {
        loss(&teacher(&[0.0, 0.0]), q, &spans)
    });
    let expected: Vec<f64> = spans
        .iter()
        .map(|span| -buckets(&log_q[span.clone()])[0])
        .collect();
    near("P = 1", &value, &expected, 1e-12);
    near(
        "P = 1",
        &gradient,
        &[-1.0, 0.0, -1.0, 0.0, -2.0, 0.0, -2.0, 0.0, -2.0, 0.0],
        1e-12,
    );

    let equal: Vec<f64> = expected.iter().map(|nats| -nats).collect();
    let value = span_kl(constant(&teacher(&equal)), constant(&log_q), &spans);
    near("equal", &numbers(value), &[0.0; 2], 1e-14);
}

/// Texts of two letters: the teacher's tokens are letters, the student's are pairs of letters. No token crosses the
/// end of the span, so the bound holds.
#[test]
fn at_most_the_kl_of_the_texts() {
    for seed in 0..50 {
        let (first, second) = (random(1, 3, 2.0, 300 + seed), random(3, 3, 2.0, 400 + seed));
        let (first, second) = (log_softmaxes(&first), log_softmaxes(&second));
        let student = log_softmaxes(&random(1, 9, 2.0, 500 + seed));
        let text = |a: usize, b: usize| [first[0][a], second[a][b]];
        let texts: Vec<[usize; 2]> = (0..9).map(|i| [i / 3, i % 3]).collect();
        let log_p: Vec<f64> = texts
            .iter()
            .map(|&[a, b]| text(a, b).iter().sum())
            .collect();
        let terms = log_p.iter().zip(&student[0]);
        let full: f64 = terms.map(|(p, q)| p.exp() * (p - q)).sum();

        let log_q: Rows = student[0]
            .iter()
            .map(|&q| vec![q, (-q.exp()).ln_1p()])
            .collect();
        let rows: Rows = texts
            .iter()
            .map(|&[a, b]| span_log_p(&text(a, b)).to_vec())
            .collect();
        let spans: Vec<Range<usize>> = (0..9).map(|row| row..row + 1).collect();
        let value = numbers(span_kl(constant(&rows), constant(&log_q), &spans));
        assert!(
            value.iter().all(|&d| (-1e-12..=full + 1e-12).contains(&d)),
            "{value:?} {full}"
        );
        assert!(value.iter().any(|&d| d > 1e-4));
    }
}

/// Computes both kinds of terms from two tokenisations of a text.
#[test]
fn spans_of_a_text() {
    let spans = align(&["the", " c", "at", " sat"], &["th", "e", " cat", " sat"]).unwrap();
    let kinds: Vec<bool> = spans.iter().map(|span| span.is_one_token()).collect();
    assert_eq!(kinds, [false, false, true]);
    let rows: Vec<Range<usize>> = spans[..2].iter().map(|span| span.student.clone()).collect();
    assert_eq!(rows, [0..2, 2..3]);

    let teacher = log_softmaxes(&random(4, 2, 2.0, 22));
    let student = log_softmaxes(&random(4, 2, 2.0, 23));
    let log_q = span_log_q(constant(&student), &rows);
    let q = |row: usize| student[row][0].exp();
    let expected = [q(0) * q(1), 1.0 - q(0) * q(1), q(2), 1.0 - q(2)];
    near("q", &numbers(log_q.exp()), &expected, 1e-14);

    let log_p: Rows = spans[..2]
        .iter()
        .map(|span| {
            span.teacher
                .clone()
                .map(|token| teacher[token][0])
                .collect::<Vec<_>>()
        })
        .map(|log_p| span_log_p(&log_p).to_vec())
        .collect();
    let value = numbers(span_kl(constant(&log_p), constant(&student), &rows));
    near("kl", &value, &kl(&log_p, &student, &rows), 1e-14);
}
