//! Low-rank adapters: gradients, agreement with merged weights, names, and PEFT's files.

use std::ops::ControlFlow;

use burn::tensor::{DType, Device, Tensor, TensorData};
use potstill_model::{
    AdapterLayers, AdapterPlan, BatchLimits, Decoder, MapParameters, ParameterName, Role, Sampling,
    StopConditions, adapted_layers, generate, load, load_adapter, map_parameters, merged,
    named_parameters, save, save_adapter, with_adapter,
};

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
