//! What is trained: the gradient with frozen parameters equals the full gradient on the rest, in f32 and bf16, with and
//! without recomputation, for several families.

use burn::module::Module;
use burn::tensor::{DType, Tensor};
use potstill_model::{Decoder, MapParameters, ParameterName, map_parameters, named_parameters};
use potstill_student::{Arm, Error, Gradients, TrainSettings, Trainable, batch_gradient, track};

use crate::families::student;
use crate::support::{numbers, relative, settings, signals, tiny};

/// Families with a tied and an untied head, experts, fused projections and latent attention.
const FAMILIES: [&str; 5] = ["llama", "gemma3_text", "phi3", "qwen3_moe", "deepseek_v3"];

fn cast(model: Decoder, dtype: DType) -> Decoder {
    struct Cast(DType);
    impl MapParameters for Cast {
        fn map<const D: usize>(&mut self, _: &ParameterName, tensor: Tensor<D>) -> Tensor<D> {
            tensor.cast(self.0)
        }
    }
    map_parameters(model, &mut Cast(dtype))
}

fn gradient(model: &Decoder, settings: &TrainSettings) -> Gradients {
    let trainable = Trainable::of(model, settings).unwrap();
    let model = track(model.clone(), &trainable);
    let vocab = model.token_count() as u32;
    let result = batch_gradient(&model, &signals(5, vocab, 3), Arm::Student, settings, 1);
    result.unwrap().gradients
}

#[test]
fn a_frozen_model_has_the_full_gradient_on_what_is_trained() {
    for family in FAMILIES {
        for dtype in [DType::F32, DType::BF16] {
            let model = cast(student(family), dtype);
            let full = gradient(&model, &settings());
            for freeze in [
                vec!["model.embed_tokens"],
                vec!["lm_head"],
                vec!["model.embed_tokens", "model.layers.0", "model.layers.1"],
                vec!["model.embed_tokens", "model.layers"],
                vec!["model"],
                vec!["model.layers.*.self_attn", "*norm*"],
            ] {
                let freeze: Vec<String> = freeze.into_iter().map(str::to_owned).collect();
                for recompute in [false, true] {
                    let frozen = TrainSettings {
                        freeze: freeze.clone(),
                        recompute,
                        ..settings()
                    };
                    let Ok(trainable) = Trainable::of(&model, &frozen) else {
                        // A tied head has no name, and a model may consist of what is frozen.
                        continue;
                    };
                    let found = gradient(&model, &frozen);
                    let at = format!("{family} {dtype:?} {freeze:?} {recompute}");
                    for (name, gradient) in &found {
                        assert!(trainable.contains(name), "{at}: {name}");
                        assert_eq!(numbers(gradient), numbers(&full[name]), "{at}: {name}");
                    }
                    for name in full.keys() {
                        let is_trained = trainable.contains(name);
                        assert_eq!(found.contains_key(name), is_trained, "{at}: {name}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_gradient_in_bf16_is_in_f32_and_near_that_in_f32_and_f64() {
    for family in FAMILIES {
        // All three models have the weights of the bf16 one.
        let narrow = cast(student(family), DType::BF16);
        let of = |dtype| gradient(&cast(narrow.clone(), dtype), &settings());
        let (bf16, f32, f64) = (of(DType::BF16), of(DType::F32), of(DType::F64));
        let values =
            |gradients: &Gradients| -> Vec<f64> { gradients.values().flat_map(numbers).collect() };
        let (exact, near) = (values(&f64), values(&f32));
        let error = relative(&near, &exact);
        assert!(error < 1e-4, "{family}: f32 {error:e}");
        let error = relative(&values(&bf16), &exact);
        println!("{family}: bf16 {error:.1e}");
        // Experts may be chosen otherwise in bf16.
        let limit = if family.contains("moe") || family.contains("deepseek") {
            0.5
        } else {
            0.05
        };
        assert!(error < limit, "{family}: bf16 {error:e}");
        for gradient in bf16.into_values() {
            let data = gradient.try_into_data().unwrap();
            assert_eq!(data.dtype(), DType::F32);
        }
    }
}

#[test]
fn a_pattern_that_fits_nothing_names_its_neighbours_and_all_frozen_is_an_error() {
    let model = tiny(DType::F32);
    let with = |freeze: &[&str]| TrainSettings {
        freeze: freeze.iter().map(|&pattern| pattern.to_owned()).collect(),
        ..settings()
    };
    let error = Trainable::of(&model, &with(&["model.embed_token"])).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("freeze = \"model.embed_token\" fits no parameter"),
        "{message}"
    );
    assert!(
        message.contains("hint: the nearest names are model.embed_tokens"),
        "{message}"
    );
    let error = Trainable::of(&model, &with(&["model"])).unwrap_err();
    assert!(matches!(error, Error::AllFrozen { .. }), "{error}");
    let half = Trainable::of(&model, &with(&["model.layers.*.mlp"])).unwrap();
    assert!(!half.is_whole() && !half.contains("model.layers.1.mlp.up_proj.weight"));
    let names: Vec<String> = (named_parameters(&model).into_iter())
        .map(|(name, _)| name.name)
        .filter(|name| !name.contains("mlp"))
        .collect();
    assert_eq!(half.names(), names);
}

#[test]
fn a_tracked_model_has_gradients_for_what_is_trained_alone() {
    let model = tiny(DType::F32);
    let settings = TrainSettings {
        freeze: vec!["model.layers.0".to_owned()],
        ..settings()
    };
    let trainable = Trainable::of(&model, &settings).unwrap();
    let tracked = track(model, &trainable);
    for (name, parameter) in named_parameters(&tracked) {
        let is_tracked = parameter.apply(IsTracked);
        assert_eq!(is_tracked, trainable.contains(&name.name), "{}", name.name);
    }
    let _plain = tracked.valid();
}

struct IsTracked;

impl potstill_model::TensorOperation for IsTracked {
    type Output = bool;
    fn apply<const D: usize>(self, tensor: Tensor<D>) -> bool {
        tensor.is_require_grad()
    }
}
