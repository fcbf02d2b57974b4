//! Low-rank adapters: gradients, agreement with merged weights, names, and PEFT's files.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_model::{
    AdapterLayers, AdapterPlan, BatchLimits, BlockType, Decoder, MapParameters, ParameterName,
    Role, Sampling, StopConditions, adapted_layers, generate, load, load_adapter, load_quantized,
    map_parameters, merged, named_parameters, save, save_adapter, with_adapter,
};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::gradients::check_finite_differences;
use crate::{Grow, host, ids, real, small, values};

fn plan(rank: usize) -> AdapterPlan {
    AdapterPlan {
        rank,
        alpha: 6.0,
        rslora: false,
        targets: AdapterLayers::AllLinear,
        rank_pattern: Vec::new(),
        alpha_pattern: Vec::new(),
    }
}

/// Fills every B, which starts at zero, with numbers.
struct FillB(f64);

impl MapParameters for FillB {
    fn map<const D: usize>(&mut self, parameter: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
        if !parameter.name.ends_with("lora_B.weight") {
            return tensor;
        }
        let shape = tensor.dims();
        let count = shape.iter().product::<usize>();
        let values: Vec<f64> = (0..count)
            .map(|index| self.0 * (index as f64 * 1.7 + parameter.name.len() as f64).sin())
            .collect();
        Tensor::from_data(
            TensorData::new(values, shape),
            (&tensor.device(), tensor.dtype()),
        )
    }
}

fn adapted(model: Decoder, plan: &AdapterPlan, b: f64) -> Decoder {
    map_parameters(with_adapter(model, plan, 3).unwrap(), &mut FillB(b))
}

fn logits(model: &Decoder, rows: &[&[u32]]) -> Vec<f64> {
    let hidden_btd = model.hidden(ids(rows, &model.device()));
    let [b, t, d] = hidden_btd.dims();
    host(model.logits(hidden_btd.reshape([b * t, d])))
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .fold(0.0, |most, (a, b)| most.max((a - b).abs()))
}

const ROWS: [&[u32]; 2] = [&[1, 5, 9, 5, 22, 0, 7], &[3, 3, 4, 17, 2, 11, 20]];

#[test]
fn gradients_of_an_adapter_equal_finite_differences() {
    let mut plan = plan(3);
    plan.rslora = true;
    plan.rank_pattern = vec![("down_proj".to_owned(), 2)];
    let model = map_parameters(small(false, DType::F64), &mut Grow(15.0));
    let model = adapted(model, &plan, 0.3);
    check_finite_differences(&model, "with adapters");
}

#[test]
fn a_new_adapter_changes_nothing_and_draws_what_peft_draws() {
    let plain = map_parameters(small(true, DType::F32), &mut Grow(15.0));
    let model = with_adapter(plain.clone(), &plan(5), 1).unwrap();
    assert_eq!(logits(&plain, &ROWS), logits(&model, &ROWS));
    assert_eq!(adapted_layers(&model).len(), 4 * 7);
    let parameters = values(&model);
    for (name, shape, values) in &parameters {
        if name.ends_with("lora_B.weight") {
            assert!(values.iter().all(|value| *value == 0.0));
        } else if name.ends_with("lora_A.weight") {
            let bound = 1.0 / (shape[1] as f64).sqrt();
            let largest = values
                .iter()
                .fold(0f64, |most, value| most.max(value.abs()));
            assert!(largest <= bound && largest > 0.8 * bound, "{name}");
        }
    }
    let again = with_adapter(plain.clone(), &plan(5), 1).unwrap();
    assert_eq!(self::values(&again), parameters);
    let other = with_adapter(plain, &plan(5), 2).unwrap();
    assert_ne!(self::values(&other), parameters);
}

#[test]
fn a_model_with_an_adapter_computes_what_its_merged_weights_compute() {
    let plain = map_parameters(small(false, DType::F64), &mut Grow(15.0));
    let model = adapted(plain.clone(), &plan(3), 0.4);
    let difference = largest_difference(&logits(&plain, &ROWS), &logits(&model, &ROWS));
    assert!(difference > 0.1, "the adapter has no effect: {difference}");
    let merged = merged(model.clone());
    assert!(adapted_layers(&merged).is_empty());
    let difference = largest_difference(&logits(&merged, &ROWS), &logits(&model, &ROWS));
    assert!(difference < 1e-9, "{difference}");

    let folder = tempfile::tempdir().unwrap();
    save(&model, folder.path(), DType::F64).unwrap();
    let saved = load(folder.path(), DType::F64, &Device::flex()).unwrap();
    assert_eq!(logits(&saved, &ROWS), logits(&merged, &ROWS));
}

#[test]
fn adapters_of_every_family_equal_their_merged_weights_also_in_generation() {
    let Some(root) = real("tiny") else { return };
    let families = [
        "llama31", "qwen2", "qwen3", "gemma3", "olmo2", "phi3", "qwen3moe", "dsv2lite", "dsv3",
        "gptoss",
    ];
    for family in families {
        let plain = load(&root.join(family), DType::F64, &Device::flex()).unwrap();
        let model = adapted(plain.clone(), &plan(4), 0.2);
        let merged = merged(model.clone());
        let row: Vec<u32> = (0..30).map(|index| (index * 7 + 3) % 60).collect();
        let rows: [&[u32]; 1] = [&row];
        let (before, with) = (logits(&plain, &rows), logits(&model, &rows));
        assert!(largest_difference(&before, &with) > 1e-2, "{family}");
        let difference = largest_difference(&logits(&merged, &rows), &with);
        assert!(difference < 1e-9, "{family}: {difference}");
        let answer = |model: &Decoder| {
            let sampling = Sampling {
                max_new_tokens: 8,
                temperature: 0.0,
                ..Sampling::default()
            };
            let answers = generate(
                model,
                std::slice::from_ref(&row),
                &StopConditions::at(&[]),
                &sampling,
                &[1],
                &BatchLimits::default(),
                &mut |_| ControlFlow::Continue(()),
            );
            answers.unwrap().unwrap().remove(0).ids
        };
        assert_eq!(answer(&model), answer(&merged), "{family}");
    }
}

#[test]
fn names_that_fit_no_layer_are_refused_with_the_names_that_do() {
    let refused = |change: &dyn Fn(&mut AdapterPlan)| {
        let mut plan = plan(2);
        change(&mut plan);
        with_adapter(small(false, DType::F32), &plan, 0)
            .unwrap_err()
            .to_string()
    };
    let named = |name: &str| AdapterLayers::Named(vec!["q_proj".to_owned(), name.to_owned()]);
    let error = refused(&|plan| plan.targets = named("q_porj"));
    assert!(
        error.contains("`targets` names `q_porj`, but no linear layer"),
        "{error}"
    );
    assert!(
        error.contains("q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"),
        "{error}"
    );
    let error = refused(&|plan| plan.targets = named("lm_head"));
    assert!(
        error.contains("`lm_head` cannot have an adapter"),
        "{error}"
    );
    let error = refused(&|plan| plan.rank_pattern = vec![("x".to_owned(), 2)]);
    assert!(error.contains("`rank_pattern` names `x`"), "{error}");
    assert!(refused(&|plan| plan.rank = 0).contains("rank 0"));

    let mut two = plan(2);
    two.targets =
        AdapterLayers::Named(vec!["v_proj".to_owned(), "layers.1.mlp.up_proj".to_owned()]);
    let model = with_adapter(small(false, DType::F32), &two, 0).unwrap();
    let layers = adapted_layers(&model);
    assert_eq!(layers.len(), 5, "{layers:?}");
    assert!(layers.contains(&"model.layers.1.mlp.up_proj".to_owned()));
    let roles = named_parameters(&model);
    let adapters = roles.iter().filter(|(name, _)| name.role == Role::Adapter);
    assert_eq!(adapters.count(), 10);
}

#[test]
fn a_saved_adapter_is_loaded_again_with_its_ranks_and_scales() {
    let plain = map_parameters(small(true, DType::F32), &mut Grow(15.0));
    let mut plan = plan(4);
    plan.rslora = true;
    plan.rank_pattern = vec![("layers.2.self_attn.q_proj".to_owned(), 2)];
    plan.alpha_pattern = vec![("down_proj".to_owned(), 1.5)];
    let model = adapted(plain.clone(), &plan, 0.4);
    let folder = tempfile::tempdir().unwrap();
    save_adapter(&model, folder.path(), "some/model", Some("abc")).unwrap();
    let read = load_adapter(plain, folder.path()).unwrap();
    assert_eq!(values(&read), values(&model));
    assert_eq!(logits(&read, &ROWS), logits(&model, &ROWS));
}

/// A base and an adapter in `tests/golden/adapters`, which PEFT made; see `make_adapters.py` there.
const OF_PEFT: [&str; 5] = ["llama31", "qwen2", "phi3", "gemma3", "dsv2lite"];

#[test]
fn adapters_of_peft_give_its_logits_and_are_saved_as_it_saved_them() {
    let Some(tiny) = real("tiny") else { return };
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/adapters");
    for family in OF_PEFT {
        let folder = golden.join(family);
        let plain = load(&tiny.join(family), DType::F32, &Device::flex()).unwrap();
        let model = load_adapter(plain.clone(), &folder).unwrap();
        let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| -> Vec<[u8; 4]> {
            let data = tensors.tensor(name).unwrap().data();
            data.as_chunks().0.to_vec()
        };
        let row: Vec<u32> = words("ids").into_iter().map(u32::from_le_bytes).collect();
        let expected = words("logits").into_iter();
        let expected: Vec<f64> = expected.map(|b| f32::from_le_bytes(b).into()).collect();
        let last = |model: &Decoder| {
            let all = logits(model, &[&row]);
            all[all.len() - expected.len()..].to_vec()
        };
        let effect = largest_difference(&last(&plain), &expected);
        let difference = largest_difference(&last(&model), &expected);
        eprintln!("{family}: effect {effect:.2}, largest difference from PEFT {difference:.1e}");
        assert!(effect > 0.1 && difference < 1e-4, "{family}: {difference}");

        let out = tempfile::tempdir().unwrap();
        save_adapter(&model, out.path(), "base", None).unwrap();
        let tensors_of = |folder: &Path| {
            let bytes = std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let mut all: Vec<_> = (tensors.tensors().into_iter())
                .map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec()))
                .collect();
            all.sort();
            all
        };
        assert_eq!(tensors_of(out.path()), tensors_of(&folder), "{family}");
        let again = load_adapter(plain, out.path()).unwrap();
        assert_eq!(last(&again), last(&model), "{family}");
    }
}

#[test]
fn configurations_that_would_change_the_result_are_refused_by_name() {
    let plain = small(false, DType::F32);
    let model = with_adapter(plain.clone(), &plan(2), 0).unwrap();
    let folder = tempfile::tempdir().unwrap();
    save_adapter(&model, folder.path(), "base", None).unwrap();
    let file = folder.path().join("adapter_config.json");
    let saved: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for (key, value) in [
        ("use_dora", json!(true)),
        ("bias", json!("all")),
        ("fan_in_fan_out", json!(true)),
        ("target_parameters", json!(["mlp.experts.gate_up_proj"])),
        ("peft_type", json!("IA3")),
        ("modules_to_save", json!(["lm_head"])),
        ("init_lora_weights", json!("pissa")),
        ("r", json!(0)),
        ("lora_alpha", json!("x")),
        ("rank_pattern", json!({"q_proj|k_proj": 3})),
        ("rank_pattern", json!({"q_proj": 0})),
        ("target_modules", json!(3)),
    ] {
        let mut changed = saved.clone();
        changed[key] = value;
        std::fs::write(&file, changed.to_string()).unwrap();
        let error = load_adapter(plain.clone(), folder.path()).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(&format!("key `{key}`")), "{error}");
        assert!(error.contains("\nhint: "), "{error}");
    }
    let mut changed = saved.clone();
    changed["r"] = json!(3);
    std::fs::write(&file, changed.to_string()).unwrap();
    let error = load_adapter(plain.clone(), folder.path()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("lora_A.weight` has the shape [2, 12]"),
        "{error}"
    );

    std::fs::write(&file, saved.to_string()).unwrap();
    let other = potstill_model::prune_layers(&plain, &[0, 1]).unwrap();
    let error = load_adapter(other, folder.path()).unwrap_err().to_string();
    assert!(
        error.contains("layers.2") && error.contains("no layer for it"),
        "{error}"
    );
    let weights = folder.path().join("adapter_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 1]).unwrap();
    let error = load_adapter(plain, folder.path()).unwrap_err().to_string();
    assert!(error.contains("not a complete safetensors file"), "{error}");
}

#[test]
fn a_model_with_weights_in_blocks_computes_what_its_dequantised_weights_compute() {
    let Some(tiny) = real("tiny") else { return };
    for family in ["llama31", "phi3", "dsv2lite", "qwen3moe"] {
        let folder = tiny.join(family);
        let quantised = load_quantized(&folder, DType::F32, &Device::flex(), BlockType::Q8_0);
        let quantised = quantised.unwrap();
        let plain = load(&folder, DType::F32, &Device::flex()).unwrap();
        let at_once = potstill_model::quantized(plain.clone(), BlockType::Q8_0);
        let row: Vec<u32> = (0..20).map(|index| (index * 7 + 3) % 60).collect();
        let found = logits(&quantised, &[&row]);
        assert_eq!(found, logits(&at_once, &[&row]), "{family}");
        let model = adapted(quantised, &plan(2), 0.1);
        let names = |model: &Decoder| named_parameters(model).len();
        assert!(names(&model) < names(&with_adapter(plain.clone(), &plan(2), 0).unwrap()));
        let found = logits(&model, &[&row]);
        let merged = logits(&merged(model), &[&row]);
        assert!(largest_difference(&found, &merged) < 1e-3, "{family}");
        assert!(
            largest_difference(&found, &logits(&plain, &[&row])) > 1e-3,
            "{family}"
        );
    }
}
