//! Random students of all families: they learn, are resumed bit for bit, are saved and loaded again, and experts keep their
//! router.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use burn::module::Module;
use burn::tensor::{DType, Device};
use potstill_datasets::Signal;
use potstill_model::{Config, Decoder, Role, named_parameters};
use potstill_student::{
    Arm, Gradients, Optimizer, RandomShape, RandomShapeError, SignalKind, TrainSettings,
    TrainingResult, batch_gradient, evaluate,
};
use serde_json::{Value, json};

use crate::support::{bits, real, settings, signals, train_on};

/// Number of token ids of the tokenizer of stories260K.
const TOKENS: usize = 512;
const STEPS: u64 = 14;

/// The configuration of stories260K, whose tokenizer the students have.
fn checkpoint() -> Config {
    if let Some(dir) = real("models/stories260K") {
        return Config::from_dir(&dir).unwrap();
    }
    let keys = json!({
        "model_type": "llama", "vocab_size": TOKENS, "hidden_size": 64, "intermediate_size": 172,
        "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8,
        "max_position_embeddings": 512, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32",
    });
    Config::from_json(&keys).unwrap()
}

/// `random` of a run file for a family.
fn table(family: &str) -> Value {
    let mut table = json!({
        "family": family, "hidden_size": 32, "intermediate_size": 48, "layers": 3, "heads": 4,
    });
    if !family.starts_with("deepseek") {
        table["key_value_heads"] = json!(2);
    }
    let more = match family {
        "gemma2" => {
            json!({"sliding_window": 8, "final_logit_softcapping": 20.0, "attn_logit_softcapping": 10.0})
        }
        "gemma3_text" => json!({"sliding_window": 8, "sliding_window_pattern": 2}),
        "qwen2" => json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1}),
        "qwen3" => json!({"head_dim": 16}),
        "mistral" => json!({"sliding_window": 8}),
        "phi3" => json!({"partial_rotary_factor": 0.5}),
        "smollm3" => json!({"no_rope_layer_interval": 2}),
        "qwen3_moe" => {
            json!({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": true, "mlp_only_layers": [0]})
        }
        "gpt_oss" => json!({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
        "deepseek_v2" | "deepseek_v3" => json!({
            "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        }),
        _ => json!({}),
    };
    let groups = match family {
        "deepseek_v2" => json!({"topk_method": "greedy"}),
        "deepseek_v3" => json!({"n_group": 2, "topk_group": 1}),
        _ => json!({}),
    };
    for more in [more, groups] {
        for (key, value) in more.as_object().unwrap() {
            table[key] = value.clone();
        }
    }
    table
}

fn config_of(table: Value) -> Result<Config, RandomShapeError> {
    let shape: RandomShape = serde_json::from_value(table).unwrap();
    shape.config(&checkpoint(), TOKENS)
}

pub(crate) fn student(family: &str) -> Decoder {
    let config = config_of(table(family)).unwrap();
    let model = Decoder::init(&config, 7, DType::F32, &Device::flex()).unwrap();
    model.with_token_count(TOKENS)
}

fn trained(family: &str, data: &[Signal], dir: &Path, stop_at: u64) -> TrainingResult {
    let settings = TrainSettings {
        steps: Some(STEPS),
        checkpoint_every: 4,
        ..settings()
    };
    let start = student(family);
    let (trained, _) = train_on(start, data, Arm::Student, &settings, dir, stop_at);
    trained.unwrap()
}

/// Forward KL per token on the training data.
fn kl(model: &Decoder, data: &[Signal]) -> f64 {
    let mut row = |index: usize| Ok(data[index].clone());
    let mut on_row = |_| ControlFlow::Continue(());
    let kind = SignalKind::Distributions;
    let values = evaluate(model, &mut row, data.len(), kind, 64, &mut on_row).unwrap();
    let values = values.unwrap();
    let tokens: f64 = values.iter().map(|v| f64::from(v.tokens)).sum();
    values.iter().map(|v| v.kl_nats).sum::<f64>() / tokens
}

/// The bits of the parameters of a role, by name.
fn of_role(model: &Decoder, role: Role) -> BTreeMap<String, Vec<f32>> {
    let parameters = named_parameters(model).into_iter();
    parameters
        .filter(|(name, _)| name.role == role)
        .map(|(name, parameter)| {
            let data = parameter.try_into_data().unwrap();
            (name.name, data.iter::<f32>().collect())
        })
        .collect()
}

#[test]
fn students_of_all_families_learn_are_resumed_saved_and_loaded() {
    let data = signals(4, TOKENS as u32, 31);
    for family in Config::families() {
        let (whole_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let start = student(family);
        assert_eq!(start.config().model_type(), family);
        let whole = trained(family, &data, whole_dir.path(), 0);
        assert!(whole.finished && whole.step == STEPS);
        let (before, after) = (kl(&start, &data), kl(&whole.model(), &data));
        println!(
            "{family}: {} parameters, KL {before:.3} to {after:.3}",
            start.config().parameters()
        );
        assert!(after < 0.8 * before, "{family}: {before} to {after}");

        let part = trained(family, &data, dir.path(), 6);
        assert!(!part.finished && part.step == 6);
        let rest = trained(family, &data, dir.path(), 0);
        assert_eq!(bits(&rest.model()), bits(&whole.model()), "{family}");

        let export = tempfile::tempdir().unwrap();
        potstill_model::save(&whole.model(), export.path(), DType::F32).unwrap();
        let loaded = potstill_model::load(export.path(), DType::F32, &Device::flex()).unwrap();
        assert_eq!(bits(&loaded), bits(&whole.model()), "{family}");
        assert_eq!(
            kl(&loaded.with_token_count(TOKENS), &data),
            after,
            "{family}"
        );

        let has_experts = start.config().has_experts();
        let [routers, trained_routers] = [&start, &whole.model()].map(|m| of_role(m, Role::Router));
        assert_eq!(routers.is_empty(), !has_experts, "{family}");
        assert_eq!(routers, trained_routers, "{family}");
        for role in [
            Role::Projection,
            Role::Norm,
            Role::Bias,
            Role::Embedding,
            Role::Head,
        ] {
            let [before, after] = [&start, &whole.model()].map(|m| of_role(m, role));
            // An expert that no row chose has no gradient.
            let unchanged =
                |name: &&String| before[*name] == after[*name] && !name.contains(".experts.");
            assert_eq!(before.keys().find(unchanged), None, "{family}");
        }
    }
}

#[test]
fn layers_that_are_computed_again_have_the_same_gradient() {
    let data = signals(4, TOKENS as u32, 31);
    for family in Config::families() {
        for dtype in [DType::F32, DType::BF16] {
            let model = Decoder::init(
                &config_of(table(family)).unwrap(),
                7,
                dtype,
                &Device::flex(),
            );
            let model = model.unwrap().with_token_count(TOKENS).train();
            let gradient = |recompute, packing| {
                let settings = TrainSettings {
                    recompute,
                    packing,
                    ..settings()
                };
                batch_gradient(&model, &data, Arm::Student, &settings, 1).unwrap()
            };
            for packing in [false, true] {
                let (kept, again) = (gradient(false, packing), gradient(true, packing));
                assert_eq!(kept.sums, again.sums, "{family}");
                let names = |gradients: &Gradients| gradients.keys().cloned().collect::<Vec<_>>();
                assert_eq!(names(&kept.gradients), names(&again.gradients), "{family}");
                for (name, gradient) in kept.gradients {
                    let [kept, again] = [gradient, again.gradients[&name].clone()]
                        .map(|gradient| gradient.try_into_data().unwrap());
                    assert!(
                        kept.as_bytes() == again.as_bytes(),
                        "{family} {dtype:?} {name}"
                    );
                }
            }
        }
    }
}

#[test]
fn weight_decay_is_for_projections_and_the_head() {
    let optimizer = Optimizer::new(&TrainSettings::default());
    for family in Config::families() {
        for (name, _) in named_parameters(&student(family)) {
            let is_matrix_of_a_layer = name.name.ends_with("_proj.weight")
                || name.name.ends_with("_a_proj_with_mqa.weight")
                || name.name.ends_with("experts.gate_up_proj")
                || name.name.ends_with("experts.down_proj");
            let expected = is_matrix_of_a_layer || name.name == "lm_head.weight";
            assert_eq!(optimizer.decays(&name), expected, "{name:?}");
        }
    }
}

#[test]
fn a_random_student_has_the_tokens_of_the_tokenizer_and_the_rest_of_its_family() {
    let own =
        config_of(json!({"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 4}))
            .unwrap();
    let checkpoint = checkpoint();
    assert_eq!(own.model_type(), "llama");
    assert_eq!((own.vocab_size, own.num_hidden_layers()), (TOKENS, 2));
    assert_eq!(
        own.max_position_embeddings,
        checkpoint.max_position_embeddings
    );
    assert_eq!(own.tie_word_embeddings, checkpoint.tie_word_embeddings);
    assert_eq!(own.keys()["head_dim"], 16);
    assert_eq!(
        own.keys()["rms_norm_eps"],
        checkpoint.keys()["rms_norm_eps"]
    );
    assert!(!own.keys().contains_key("num_key_value_heads"));
    let other = config_of(table("qwen3")).unwrap();
    assert_eq!(other.keys()["head_dim"], 16);
    assert_eq!(other.eos_token_id, checkpoint.eos_token_id);
    // transformers would take the published models' padding, which is outside of this vocabulary.
    assert_eq!(
        config_of(table("phi3")).unwrap().keys()["pad_token_id"],
        Value::Null
    );
    assert_eq!(other.keys()["architectures"], json!(["Qwen3ForCausalLM"]));
    assert!(!other.keys().contains_key("rms_norm_eps"));
    // Rows of padding are allowed.
    let mut padded = table("gemma2");
    padded["vocab_size"] = json!(TOKENS + 64);
    assert_eq!(config_of(padded).unwrap().vocab_size, TOKENS + 64);
}

#[test]
fn keys_of_random_students_that_cannot_be_used_are_named() {
    let with = |family: &str, key: &str, value: Value| {
        let mut table = table(family);
        table[key] = value;
        config_of(table).unwrap_err()
    };
    let cases = [
        (
            with("mamba", "layers", json!(2)),
            "family",
            "\"mamba\" is not supported, only llama, ",
        ),
        (
            with("llama", "family", json!(4)),
            "family",
            "4 is not the name of a family",
        ),
        (
            with("llama", "hiden_size", json!(4)),
            "hiden_size",
            "this key changes nothing in a model of the family llama\nhint: ",
        ),
        (
            with("llama", "sliding_window", json!(4)),
            "sliding_window",
            "this key changes nothing",
        ),
        (
            with("llama", "heads", json!(3)),
            "heads",
            "`hidden_size` 32 is not 3 heads times an even number\nhint: ",
        ),
        (
            with("llama", "layers", json!(0)),
            "layers",
            "0 must be a whole number above 0",
        ),
        (
            with("llama", "layers", json!(2.5)),
            "layers",
            "2.5 must be a whole number above 0",
        ),
        (
            with("llama", "hidden_size", json!(1u64 << 40)),
            "hidden_size",
            "1099511627776 is larger than any model",
        ),
        (
            with("qwen2", "key_value_heads", json!(3)),
            "key_value_heads",
            "3 does not divide num_attention_heads, 4",
        ),
        (
            with("qwen2", "vocab_size", json!(511)),
            "vocab_size",
            "511 rows are too few for the 512 token ids of the tokenizer\nhint: ",
        ),
        (
            with("qwen2", "eos_token_id", json!([])),
            "eos_token_id",
            "[] names no token",
        ),
        (
            with("deepseek_v3", "n_group", json!(3)),
            "n_group",
            "4 experts cannot be divided into 3 groups",
        ),
        (
            with("qwen2", "hidden_size", Value::Null),
            "hidden_size",
            "absent, must be a whole number above 0",
        ),
    ];
    for (RandomShapeError { key, why }, expected, start) in cases {
        assert_eq!(key, expected, "{why}");
        assert!(why.starts_with(start), "{why}");
    }
}
