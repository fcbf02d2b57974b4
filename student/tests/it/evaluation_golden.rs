//! The figures of `evaluate` and `own_text_kl` against PyTorch: `tests/golden/evaluation.py` writes two small models and
//! what it measures of them to `tests/golden/evaluation/`.

use std::ops::ControlFlow;
use std::path::PathBuf;

use burn::tensor::{DType, Device};
use potstill_datasets::{Encoded, SequenceValues, Signal, SignalRow};
use potstill_model::Decoder;
use potstill_student::{SignalKind, evaluate, own_text_kl};
use serde_json::Value;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/evaluation")
}

fn golden() -> Value {
    let text = std::fs::read_to_string(folder().join("golden.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn model(name: &str) -> Decoder {
    potstill_model::load(&folder().join(name), DType::F32, &Device::flex()).unwrap()
}

fn list<T>(values: &Value, number: impl Fn(&Value) -> Option<T>) -> Vec<T> {
    let values = values.as_array().unwrap().iter();
    values.map(|value| number(value).unwrap()).collect()
}

fn encoded(text: &Value) -> Encoded {
    Encoded {
        token_ids: list(&text["token_ids"], |id| Some(id.as_u64()? as u32)),
        loss_mask: list(&text["loss_mask"], Value::as_bool),
    }
}

fn signal(index: usize, text: &Value) -> Signal {
    let row = |row: &Value| SignalRow {
        ids: list(&row["ids"], |id| Some(id.as_u64()? as u32)),
        logprobs: list(&row["logprobs"], |p| Some(p.as_f64()? as f32)),
        tail_logprob: row["tail_logprob"].as_f64().unwrap() as f32,
        entropy: row["entropy"].as_f64().unwrap() as f32,
        log_z_at: Vec::new(),
        draw_ids: Vec::new(),
        draw_counts: Vec::new(),
    };
    let Encoded {
        token_ids,
        loss_mask,
    } = encoded(text);
    Signal {
        prompt_id: format!("p{index}"),
        sample_index: 0,
        token_ids,
        loss_mask,
        rows: text["rows"].as_array().unwrap().iter().map(row).collect(),
        provenance: 0,
    }
}

fn check(name: &str, found: f64, expected: &Value) {
    let expected = expected.as_f64().unwrap();
    let error = (found - expected).abs() / expected.abs().max(1.0);
    assert!(error < 1e-5, "{name}: {found}, PyTorch has {expected}");
}

#[test]
fn the_values_of_each_text_equal_pytorchs() {
    let golden = golden();
    let texts = golden["texts"].as_array().unwrap();
    let signals: Vec<Signal> = (texts.iter().enumerate())
        .map(|(index, text)| signal(index, text))
        .collect();
    let student = model("student");
    for chunk_rows in [3, 256] {
        let mut row = |index: usize| Ok(signals[index].clone());
        let mut on_row = |_| ControlFlow::Continue(());
        let kind = SignalKind::Distributions;
        let len = signals.len();
        let values = evaluate(&student, &mut row, len, kind, chunk_rows, &mut on_row).unwrap();
        for (values, text) in values.unwrap().iter().zip(texts) {
            check_text(values, text);
        }
    }
}

fn check_text(values: &SequenceValues, text: &Value) {
    let rows = text["rows"].as_array().unwrap().len();
    assert_eq!(values.tokens as usize, rows);
    check("KL", values.kl_nats, &text["kl"]);
    check("NLL", values.nll_nats, &text["nll"]);
    check("agreement", f64::from(values.agree), &text["agree"]);
    check("teacher NLL", values.teacher_nll_nats, &text["teacher_nll"]);
    check(
        "teacher entropy",
        values.teacher_entropy_nats,
        &text["teacher_entropy"],
    );
    for (name, found) in [
        ("confidence", &values.confidence),
        ("expected", &values.expected),
    ] {
        let expected = text[name].as_array().unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            check(name, f64::from(*found), expected);
        }
    }
}

#[test]
fn the_reverse_kl_on_own_text_equals_pytorchs() {
    let golden = golden();
    let (student, teacher) = (model("student"), model("teacher"));
    for text in golden["texts"].as_array().unwrap() {
        let found = own_text_kl(&student, &teacher, encoded(text), 4).unwrap();
        check("reverse KL", found, &text["reverse_kl"]);
    }
}
