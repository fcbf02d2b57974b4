//! The figures of a report against PyTorch: `student/tests/golden/evaluation.py` writes the values of each text and the
//! means over all tokens.

// Lints exempt test functions, but not the functions that tests share.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use potstill_datasets::{OwnText, RunModel, SequenceValues};
use potstill_eval::{Measurements, ModelFacts, ModelMeasurements, SeedMeasurements};
use serde_json::Value;

fn golden() -> Value {
    let path = "../student/tests/golden/evaluation/golden.json";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn probabilities(values: &Value) -> Vec<f32> {
    let values = values.as_array().unwrap().iter();
    values.map(|value| number(value) as f32).collect()
}

fn measurements(golden: &Value) -> SeedMeasurements {
    let texts = golden["texts"].as_array().unwrap();
    let tokens = |text: &Value| text["rows"].as_array().unwrap().len() as u32;
    let values = |(index, text): (usize, &Value)| SequenceValues {
        prompt_id: format!("p{index}"),
        sample_index: 0,
        tokens: tokens(text),
        kl_nats: number(&text["kl"]),
        nll_nats: number(&text["nll"]),
        agree: number(&text["agree"]) as u32,
        teacher_nll_nats: number(&text["teacher_nll"]),
        teacher_entropy_nats: number(&text["teacher_entropy"]),
        confidence: probabilities(&text["confidence"]),
        expected: probabilities(&text["expected"]),
    };
    let own_text = |(index, text): (usize, &Value)| OwnText {
        prompt_id: format!("p{index}"),
        sample_index: 0,
        tokens: tokens(text),
        reverse_kl_nats: number(&text["reverse_kl"]),
    };
    SeedMeasurements {
        seed: 0,
        values: texts.iter().enumerate().map(values).collect(),
        graded: None,
        own_text: Some(texts.iter().enumerate().map(own_text).collect()),
    }
}

#[test]
fn the_means_over_all_tokens_equal_pytorchs() {
    let golden = golden();
    let model = ModelMeasurements {
        model: RunModel::STUDENT,
        seeds: vec![measurements(&golden)],
    };
    let all = Measurements {
        models: vec![model.clone()],
        has_distributions: true,
        resamples: 50,
        seed: 1,
    };
    let facts = ModelFacts {
        learned_from: String::new(),
        parameters: None,
        steps: 1,
    };
    let result = all.student_result(&model, facts).unwrap();
    let teacher = all.teacher_result(String::new(), None, None).unwrap();
    let calibration = result.calibration.unwrap();
    for (name, found) in [
        ("kl", result.kl.unwrap().mean),
        ("nll", result.nll.mean),
        ("agree", result.agreement.unwrap().mean),
        ("reverse_kl", result.own_text_kl.unwrap().mean),
        ("teacher_nll", teacher.nll.mean),
        ("distance", calibration.distance.unwrap().mean),
        ("calibration_error", calibration.error.mean),
    ] {
        let expected = number(&golden["means"][name]);
        let error = (found - expected).abs();
        assert!(error < 1e-6, "{name}: {found}, PyTorch has {expected}");
    }
}
