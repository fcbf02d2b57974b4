//! Agreement with transformers for a small checkpoint of every family: logits, greedy tokens, loss, gradients, saving.
//!
//! The checkpoints are in `tiny/` of the folder that `POTSTILL_REAL` names, with the expected values beside them.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_model::{
    BatchLimits, Decoder, ParameterName, Sampling, StopConditions, generate, load,
    named_parameters, prune_layers, save, save_sharded,
};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::{gradient_of, host, ids, real, values};

/// Folder, number of layers.
const TINY: [&str; 14] = [
    "llama31", "qwen2", "qwen3", "mistral", "gemma3", "gemma2", "olmo2", "smollm3", "phi3",
    "qwen3moe", "dsv2lite", "dsv3", "dsv3-fp8", "gptoss",
];

/// The expected values of a checkpoint.
struct Expected {
    ids: Vec<u32>,
    logits: Vec<f64>,
    greedy: Vec<u32>,
    loss: f64,
    gradient_norms: BTreeMap<String, f64>,
}

impl Expected {
    fn read(dir: &Path) -> Self {
        let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| -> Vec<[u8; 4]> {
            let data = tensors.tensor(name).unwrap().data().to_vec();
            data.chunks_exact(4)
                .map(|b| b.try_into().unwrap())
                .collect()
        };
        let tokens =
            |name: &str| -> Vec<u32> { words(name).into_iter().map(u32::from_le_bytes).collect() };
        let json = std::fs::read_to_string(dir.join("expected.json")).unwrap();
        let json: Value = serde_json::from_str(&json).unwrap();
        let norms = json["gradient_norms"].as_object().unwrap();
        Self {
            ids: tokens("ids"),
            logits: words("logits")
                .into_iter()
                .map(|b| f64::from(f32::from_le_bytes(b)))
                .collect(),
            greedy: tokens("greedy"),
            loss: json["loss"].as_f64().unwrap(),
            gradient_norms: (norms.iter())
                .map(|(name, norm)| (name.clone(), norm.as_f64().unwrap()))
                .collect(),
        }
    }
}

/// Runs a test on every tiny checkpoint.
fn for_each_tiny(test: impl Fn(&str, &Path, &Decoder, &Expected)) {
    let Some(root) = real("tiny") else {
        return;
    };
    for name in TINY {
        let dir = root.join(name);
        let model = load(&dir, DType::F32, &Device::flex()).unwrap();
        test(name, &dir, &model, &Expected::read(&dir));
    }
}

fn logits(model: &Decoder, text: &[u32]) -> Tensor<2> {
    let hidden = model.hidden(ids(&[text], &model.device()));
    let [_, t, d] = hidden.dims();
    model.logits(hidden.reshape([t, d]))
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f64::max)
}

#[test]
fn logits_equal_those_of_transformers() {
    for_each_tiny(|name, _, model, expected| {
        let found = host(logits(model, &expected.ids));
        let largest = largest_difference(&found, &expected.logits);
        eprintln!("{name}: largest difference of logits {largest:.2e}");
        assert!(largest < 1e-4, "{name}: {largest}");
    });
}

#[test]
fn greedy_tokens_equal_those_of_transformers() {
    for_each_tiny(|name, _, model, expected| {
        let sampling = Sampling {
            temperature: 0.0,
            max_new_tokens: expected.greedy.len(),
            ..Sampling::default()
        };
        for page_size in [3, 16] {
            let limits = BatchLimits {
                page_size,
                prefill_rows: 7,
                ..BatchLimits::default()
            };
            let answers = generate(
                model,
                &[expected.ids[..16].to_vec()],
                &StopConditions::at(&[]),
                &sampling,
                &[1],
                &limits,
                &mut |_| ControlFlow::Continue(()),
            );
            let answers = answers.unwrap().unwrap();
            assert_eq!(
                answers[0].ids, expected.greedy,
                "{name}, pages of {page_size}"
            );
        }
    });
}

#[test]
fn loss_and_gradients_equal_those_of_transformers() {
    for_each_tiny(|name, _, model, expected| {
        let model = model.clone().train();
        let t = expected.ids.len();
        let log_p_tv = log_softmax(logits(&model, &expected.ids), 1);
        let next: Vec<i32> = expected.ids[1..].iter().map(|id| *id as i32).collect();
        let next = TensorData::new(next, [t - 1, 1]);
        let next = Tensor::<2, Int>::from_data(next, &model.device());
        let loss = -log_p_tv.narrow(0, 0, t - 1).gather(1, next).mean();
        let value = host(loss.clone())[0];
        assert!(
            (value - expected.loss).abs() < 1e-5,
            "{name}: {value} {}",
            expected.loss
        );
        let gradients = loss.backward();
        let mut squares: BTreeMap<String, f64> = BTreeMap::new();
        for (ParameterName { name, .. }, parameter) in named_parameters(&model) {
            if name.ends_with("e_score_correction_bias") {
                continue;
            }
            let gradient = gradient_or_zero(&parameter, &gradients);
            let square: f64 = gradient.iter().map(|g| g * g).sum();
            *squares.entry(in_transformers(&name)).or_default() += square;
        }
        let names: Vec<_> = squares.keys().collect();
        assert_eq!(
            names,
            expected.gradient_norms.keys().collect::<Vec<_>>(),
            "{name}"
        );
        let mut largest = 0f64;
        for (parameter, square) in &squares {
            let expected = expected.gradient_norms[parameter];
            let relative = (square.sqrt() - expected).abs() / expected;
            largest = largest.max(relative);
            assert!(
                relative < 1e-3,
                "{name}, {parameter}: {} {expected}",
                square.sqrt()
            );
        }
        eprintln!("{name}: loss {value:.6}, largest relative difference of norms {largest:.1e}");
    });
}

/// Experts that no row chose have no gradient.
fn gradient_or_zero(
    parameter: &potstill_model::Parameter,
    gradients: &burn::tensor::Gradients,
) -> Vec<f64> {
    use potstill_model::Parameter;
    let is_used = match parameter {
        Parameter::Matrix(tensor) => tensor.grad(gradients).is_some(),
        _ => true,
    };
    match is_used {
        true => gradient_of(parameter, gradients),
        false => vec![0.0],
    }
}

/// transformers joins the projections of all experts in memory, though not in files.
fn in_transformers(name: &str) -> String {
    let Some((prefix, rest)) = name.split_once(".experts.") else {
        return name.to_owned();
    };
    match rest.rsplit('.').nth(1) {
        Some("gate_proj" | "up_proj") => format!("{prefix}.experts.gate_up_proj"),
        Some("down_proj") => format!("{prefix}.experts.down_proj"),
        _ => name.to_owned(),
    }
}

#[test]
fn packed_documents_have_the_logits_that_they_have_alone() {
    for_each_tiny(|name, _, model, expected| {
        let lengths = [37, 1, 50, 12];
        let mut alone = Vec::new();
        let mut start = 0;
        for length in lengths {
            alone.extend(host(logits(model, &expected.ids[start..start + length])));
            start += length;
        }
        let packed = ids(&[&expected.ids[..start]], &model.device());
        let hidden = model.hidden_packed(packed, &[lengths.to_vec()]);
        let [_, t, d] = hidden.dims();
        let packed = host(model.logits(hidden.reshape([t, d])));
        let largest = largest_difference(&packed, &alone);
        assert!(largest < 1e-5, "{name}: {largest}");
    });
}

#[test]
fn saved_checkpoints_are_loaded_again_unchanged() {
    for_each_tiny(|name, dir, model, _| {
        let saved = tempfile::tempdir().unwrap();
        save(model, saved.path(), DType::F32).unwrap();
        let again = load(saved.path(), DType::F32, &Device::flex()).unwrap();
        assert_eq!(values(&again), values(model), "{name}");
        let read = |dir: &Path| -> Value {
            let text = std::fs::read_to_string(dir.join("config.json")).unwrap();
            serde_json::from_str(&text).unwrap()
        };
        let (mut before, after) = (read(dir), read(saved.path()));
        // Stored weights are plain, and the layers that predict further tokens are not stored.
        let changed = ["dtype", "quantization_config", "num_nextn_predict_layers"];
        for key in changed {
            before.as_object_mut().unwrap().remove(key);
        }
        for (key, value) in before.as_object().unwrap() {
            assert_eq!(&after[key], value, "{name}, {key}");
        }
        let shards = tempfile::tempdir().unwrap();
        save_sharded(model, shards.path(), DType::F32, 100_000).unwrap();
        let again = load(shards.path(), DType::F32, &Device::flex()).unwrap();
        assert_eq!(values(&again), values(model), "{name} in shards");
    });
}

#[test]
fn pruned_models_of_every_family_are_saved_and_loaded() {
    for_each_tiny(|name, _, model, expected| {
        let layers = model.config().num_hidden_layers();
        let kept = [0, layers - 1];
        let pruned = prune_layers(model, &kept).unwrap();
        let saved: PathBuf = tempfile::tempdir().unwrap().keep();
        save(&pruned, &saved, DType::F32).unwrap();
        let again = load(&saved, DType::F32, &Device::flex()).unwrap();
        std::fs::remove_dir_all(&saved).unwrap();
        let text = &expected.ids[..40];
        assert_eq!(
            host(logits(&pruned, text)),
            host(logits(&again, text)),
            "{name}"
        );
    });
}
