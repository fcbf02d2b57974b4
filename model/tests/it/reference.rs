//! Agreement with transformers in f32 on real models. The expected results are `ref/*.json` in the folder that
//! `POTSTILL_REAL` names.

use std::ops::ControlFlow;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{DType, Device};
use potstill_model::{BatchLimits, Config, Decoder, Sampling, StopConditions, generate, load};
use serde_json::Value;

use crate::{host, ids, real, values};

#[test]
fn stories260k_agrees_with_transformers() {
    check_agreement("stories260K", "stories260k.json");
}

#[test]
fn smollm2_agrees_with_transformers() {
    check_agreement("SmolLM2-135M-Instruct", "smollm2.json");
}

#[test]
fn qwen2_5_agrees_with_transformers() {
    check_agreement("Qwen2.5-Coder-0.5B-Instruct", "qwen-0.5b.json");
}

#[test]
fn gemma_3_agrees_with_transformers() {
    check_agreement("gemma-3-270m", "gemma-270m.json");
}

/// The reference is made on demand, by the script that made the others.
#[test]
fn qwen2_5_with_1_5_billion_parameters_agrees_with_transformers() {
    check_agreement("Qwen2.5-Coder-1.5B-Instruct", "qwen-1.5b.json");
}

#[test]
fn both_forms_of_a_configuration_are_read_equally() {
    let Some(dir) = real("models/SmolLM2-135M-Instruct") else {
        return;
    };
    let config = Config::from_dir(&dir).unwrap();
    let legacy = Config::from_file(&dir.join("config.legacy.json")).unwrap();
    let read = |config: &Config| {
        (
            config.vocab_size,
            config.parameters(),
            config.eos_token_id.clone(),
        )
    };
    assert_eq!(read(&config), read(&legacy));
    assert_eq!(config.vocab_size, 49_152);
}

#[test]
fn a_tracked_model_has_the_same_states() {
    let Some(dir) = real("models/stories260K") else {
        return;
    };
    let model = load(&dir, DType::F32, &Device::flex()).unwrap();
    let text: Vec<u32> = (0..200).map(|at| 3 + at * 37 % 500).collect();
    let plain = host(model.hidden(ids(&[&text], &model.device())));
    let tracked = model.clone().train();
    let tracked = host(tracked.hidden(ids(&[&text], &tracked.device())));
    let largest = largest_difference(&plain, &tracked);
    assert!(largest < 1e-4, "{largest}");
    assert_eq!(values(&model.clone().train()), values(&model));
}

fn check_agreement(model: &str, reference: &str) {
    let folders = real(&format!("models/{model}/model.safetensors"))
        .and(real(&format!("models/{model}")))
        .zip(real(&format!("ref/{reference}")));
    let Some((dir, reference)) = folders else {
        return;
    };
    let model = load(&dir, DType::F32, &Device::flex()).unwrap();
    let reference: Value = serde_json::from_str(&read(&reference)).unwrap();
    let items = reference["items"].as_array().unwrap();
    let mut largest = [0f64; 3];
    for item in items {
        let found = differences(&model, item);
        for (largest, found) in largest.iter_mut().zip(found) {
            *largest = largest.max(found);
        }
        check_greedy(&model, item);
    }
    let [logprob, lse, nll] = largest;
    eprintln!(
        "{} items; largest difference: top-20 logprob {logprob:.2e}, log-sum-exp {lse:.2e}, next-token NLL {nll:.2e}; all greedy continuations equal",
        items.len()
    );
    assert!(logprob <= 1e-3 && lse <= 1e-3 && nll <= 1e-3);
}

/// Computes the largest differences over one text: in top-20 logprobs, log-sum-exp of the logits, and NLL of the next
/// token.
fn differences(model: &Decoder, item: &Value) -> [f64; 3] {
    let text = numbers(&item["ids"]);
    let hidden_btd = model.hidden(ids(&[&as_ids(&text)], &model.device()));
    let [_, t, d] = hidden_btd.dims();
    let logits = host(model.logits(hidden_btd.reshape([t, d])));
    let mut largest = [0f64; 3];
    for (at, row) in logits.chunks(model.config().vocab_size).enumerate() {
        let max = row.iter().fold(f64::MIN, |max, z| max.max(*z));
        let lse = max + row.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
        let top_ids = numbers(&item["top20_ids"][at]);
        let top = numbers(&item["top20_logprobs"][at]);
        for (id, logprob) in top_ids.iter().zip(&top) {
            largest[0] = largest[0].max((row[*id as usize] - lse - logprob).abs());
        }
        largest[1] = largest[1].max((lse - item["logsumexp"][at].as_f64().unwrap()).abs());
        if let Some(next) = text.get(at + 1) {
            let nll = item["next_token_nll"][at].as_f64().unwrap();
            largest[2] = largest[2].max((lse - row[*next as usize] - nll).abs());
        }
    }
    largest
}

fn check_greedy(model: &Decoder, item: &Value) {
    let expected = as_ids(&numbers(&item["greedy32_ids"]));
    let sampling = Sampling {
        max_new_tokens: 32,
        temperature: 0.0,
        ..Sampling::default()
    };
    let eos = model.config().eos_token_id.clone();
    let prompt = as_ids(&numbers(&item["ids"]));
    let mut progress = |_| ControlFlow::Continue(());
    let (stop, limits) = (StopConditions::at(&eos), BatchLimits::default());
    let found = generate(
        model,
        &[prompt],
        &stop,
        &sampling,
        &[0],
        &limits,
        &mut progress,
    )
    .unwrap()
    .unwrap()
    .remove(0);
    assert_eq!(found.ids, expected, "{}", item["text"]);
    let logprobs: Vec<f64> = found.logprobs.iter().map(|x| f64::from(*x)).collect();
    let largest = largest_difference(&logprobs, &numbers(&item["greedy32_logprobs"]));
    assert!(largest < 2e-3, "{largest}");
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    let pairs = a.iter().zip(b);
    pairs.fold(0f64, |max, (a, b)| max.max((a - b).abs()))
}

fn numbers(values: &Value) -> Vec<f64> {
    let values = values.as_array().unwrap();
    values.iter().map(|value| value.as_f64().unwrap()).collect()
}

fn as_ids(numbers: &[f64]) -> Vec<u32> {
    numbers.iter().map(|id| *id as u32).collect()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}
