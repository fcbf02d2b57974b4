//! Configurations and weight files that are wrong: each is an error that names the file and the key or the tensor, and says
//! what to do. Nothing of an absurd size is allocated.

use std::path::Path;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device};
use potstill_model::{Config, Error, load, save, save_sharded, weight_files};
use serde_json::{Map, Value, json};

use crate::small;

/// Required keys of a family, of a tiny size.
pub(crate) fn keys(family: &str) -> Map<String, Value> {
    let mut keys = Map::new();
    let base = json!({
        "model_type": family, "vocab_size": 23, "hidden_size": 12, "intermediate_size": 20,
        "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4,
        "max_position_embeddings": 64, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": [2],
    });
    merge(&mut keys, &base);
    if family.starts_with("deepseek") {
        let latent = json!({
            "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "kv_lora_rank": 8,
            "q_lora_rank": null, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
            "moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
        });
        merge(&mut keys, &latent);
    }
    if matches!(family, "qwen3_moe" | "gpt_oss") {
        let experts = json!({
            "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "sliding_window": 8,
        });
        merge(&mut keys, &experts);
    }
    if family.starts_with("gemma") {
        merge(&mut keys, &json!({ "sliding_window": 8 }));
    }
    keys
}

fn merge(keys: &mut Map<String, Value>, more: &Value) {
    keys.extend(more.as_object().unwrap().clone());
}

/// The error of a configuration of a family with other values of some keys.
fn error_of(family: &str, change: Value) -> String {
    let mut keys = keys(family);
    merge(&mut keys, &change);
    let error = Config::from_json(&Value::Object(keys)).unwrap_err();
    assert!(matches!(error, Error::Config { .. }), "{error:?}");
    error.to_string()
}

#[test]
fn values_that_are_not_supported_are_named_with_a_way_out() {
    let cases = [
        (
            "llama",
            json!({"model_type": "mamba"}),
            "key `model_type`: \"mamba\" is not supported, only llama,",
        ),
        (
            "llama",
            json!({"model_type": null}),
            "key `model_type`: absent",
        ),
        (
            "llama",
            json!({"model_type": 7}),
            "key `model_type`: absent",
        ),
        (
            "qwen2",
            json!({"hidden_act": "relu"}),
            "key `hidden_act`: \"relu\" is not supported",
        ),
        (
            "qwen2",
            json!({"hidden_act": 3}),
            "key `hidden_act`: 3 is not supported",
        ),
        (
            "gemma3_text",
            json!({"hidden_activation": "gelu"}),
            "key `hidden_activation`: \"gelu\" is not supported",
        ),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "ntk"}}),
            "key `rope_scaling`: rope_type \"ntk\" is not supported",
        ),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": 4}}),
            "key `rope_scaling`: rope_type 4 must be a text",
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "llama3"}}),
            "key `rope_scaling`: factor is absent",
        ),
        (
            "llama",
            json!({"rope_scaling": 4}),
            "key `rope_scaling`: 4 is not a table",
        ),
        (
            "llama",
            json!({"quantization_config": {"quant_method": "awq", "bits": 4}}),
            "key `quantization_config`: quant_method \"awq\" is not supported",
        ),
        (
            "gpt_oss",
            json!({"quantization_config": {"quant_method": "mxfp4"}}),
            "key `quantization_config`: quant_method \"mxfp4\" is not supported",
        ),
        (
            "llama",
            json!({"quantization_config": 4}),
            "key `quantization_config`: 4 is not supported",
        ),
        (
            "llama",
            json!({"pretraining_tp": 2}),
            "key `pretraining_tp`: 2 is not supported, only 1",
        ),
        (
            "gemma2",
            json!({"use_bidirectional_attention": true}),
            "key `use_bidirectional_attention`: true is not supported",
        ),
        (
            "gemma3_text",
            json!({"layer_types": ["full_attention", "x", "full_attention", "full_attention"]}),
            "key `layer_types`: entry 1 is not supported",
        ),
        (
            "gemma3_text",
            json!({"layer_types": ["full_attention"]}),
            "key `layer_types`: 1 entries, but num_hidden_layers is 4",
        ),
        (
            "smollm3",
            json!({"no_rope_layers": [1, 0, "x", 1]}),
            "key `no_rope_layers`: entry 2 must be 0 or 1",
        ),
        (
            "qwen3_moe",
            json!({"mlp_only_layers": [0.5]}),
            "key `mlp_only_layers`: 0.5 must be the index of a layer",
        ),
        (
            "qwen3_moe",
            json!({"num_experts_per_tok": 5}),
            "key `num_experts_per_tok`: 5 of 4 experts cannot be chosen",
        ),
        (
            "deepseek_v3",
            json!({"n_group": 3}),
            "key `n_group`: 4 experts cannot be divided into 3 groups",
        ),
        (
            "deepseek_v3",
            json!({"scoring_func": "softmax"}),
            "key `scoring_func`: \"softmax\" is not supported",
        ),
        (
            "deepseek_v2",
            json!({"topk_method": "noaux_tc"}),
            "key `topk_method`: \"noaux_tc\" is not supported",
        ),
        (
            "llama",
            json!({"eos_token_id": []}),
            "key `eos_token_id`: [] names no token",
        ),
        (
            "llama",
            json!({"eos_token_id": 23}),
            "key `eos_token_id`: 23 is not below vocab_size, 23",
        ),
        (
            "llama",
            json!({"eos_token_id": [2, 4_294_967_295u64]}),
            "key `eos_token_id`: 4294967295 is not below vocab_size, 23",
        ),
        (
            "llama",
            json!({"eos_token_id": "</s>"}),
            "key `eos_token_id`: \"</s>\" must be a token id",
        ),
        (
            "llama",
            json!({"bos_token_id": 500}),
            "key `bos_token_id`: 500 is not below vocab_size, 23",
        ),
        (
            "llama",
            json!({"num_key_value_heads": 4}),
            "key `num_key_value_heads`: 4 does not divide num_attention_heads, 6",
        ),
        (
            "llama",
            json!({"rms_norm_eps": -1.0}),
            "key `rms_norm_eps`: -1.0 must be a number above 0",
        ),
        (
            "llama",
            json!({"tie_word_embeddings": "yes"}),
            "key `tie_word_embeddings`: \"yes\" must be true or false",
        ),
    ];
    for (family, change, start) in cases {
        let message = error_of(family, change);
        assert!(
            message.starts_with(&format!("`config.json`, {start}")),
            "{message}"
        );
        assert_eq!(message.matches("\nhint: ").count(), 1, "{message}");
    }
}

/// Each size of each family, from 0 to 2⁶³ and beyond, gives an error or a configuration, and no panic.
#[test]
fn absurd_sizes_neither_panic_nor_allocate() {
    let sizes = [
        json!(0),
        json!(-1),
        json!(1.5),
        json!(1_000_000_000u64),
        json!(1u64 << 32),
        json!(u64::MAX),
        json!(1u64 << 63),
        json!(1e300),
        json!((1u64 << 28) - 2),
        json!(9999),
        json!("12"),
        json!([]),
        json!({}),
    ];
    let began = Instant::now();
    let mut read = 0;
    for family in Config::families() {
        let base = keys(family);
        let names = Config::keys_read(&base);
        assert!(names.len() > 12, "{family}: {names:?}");
        for name in &names {
            for size in &sizes {
                let mut keys = base.clone();
                keys.insert(name.clone(), size.clone());
                match Config::from_json(&Value::Object(keys)) {
                    Ok(config) => {
                        read += 1;
                        assert!(config.parameters() > 0);
                    }
                    Err(error) => {
                        let message = error.to_string();
                        assert!(message.contains("`config.json`, key `"), "{message}");
                        assert!(message.contains("\nhint: "), "{message}");
                    }
                }
            }
        }
    }
    let large = json!({"vocab_size": 1 << 28, "hidden_size": 1 << 28, "num_attention_heads": 1 << 28,
                       "num_key_value_heads": 1 << 28, "intermediate_size": 1 << 28});
    assert!(
        error_of("llama", json!({"hidden_size": 1u64 << 63})).contains("is larger than any model")
    );
    let mut keys = keys("llama");
    merge(&mut keys, &large);
    assert!(
        Config::from_json(&Value::Object(keys))
            .unwrap()
            .parameters()
            > 1 << 56
    );
    assert!(
        read > 100 && began.elapsed() < Duration::from_secs(60),
        "{read} read, {:?}",
        began.elapsed()
    );
}

/// A checkpoint of the small model in a folder, whose `config.json` has other values of some keys.
fn load_with(change: Value) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let model = small(true, DType::F32);
    save(&model, dir.path(), DType::F32).unwrap();
    let mut keys = model.config().keys().clone();
    merge(&mut keys, &change);
    let text = Value::Object(keys).to_string();
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    load_from(dir.path())
}

fn load_from(dir: &Path) -> Result<(), String> {
    let loaded = load(dir, DType::F32, &Device::flex());
    let message = |error: Error| error.to_string().replace(dir.to_str().unwrap(), "DIR");
    loaded.map(|_| ()).map_err(message)
}

#[test]
fn a_configuration_that_does_not_fit_the_weights_is_refused_before_memory_is_taken() {
    assert_eq!(load_with(json!({})), Ok(()));
    let cases = [
        (
            json!({"vocab_size": 1 << 28, "hidden_size": 1 << 28, "head_dim": 4}),
            "tensor `model.embed_tokens.weight` has the shape [23, 12]",
        ),
        (
            json!({"intermediate_size": 1 << 28}),
            "tensor `model.layers.0.mlp.gate_proj.weight` has the shape [20, 12]",
        ),
        (
            json!({"num_hidden_layers": 9999}),
            "has no tensor `model.layers.4.input_layernorm.weight`",
        ),
        (
            json!({"num_hidden_layers": 3}),
            "has no place for 9 of the stored tensors, among them `model.layers.3.",
        ),
        (
            json!({"num_key_value_heads": 3}),
            "tensor `model.layers.0.self_attn.k_proj.weight` has the shape [8, 12]",
        ),
        (
            json!({"attention_bias": true}),
            "has no tensor `model.layers.0.self_attn.q_proj.bias`",
        ),
        (
            json!({"tie_word_embeddings": false}),
            "has no tensor `lm_head.weight`",
        ),
        (
            json!({"model_type": "qwen3"}),
            "has no tensor `model.layers.0.self_attn.q_norm.weight`",
        ),
        (
            json!({"model_type": "olmo2"}),
            "has no tensor `model.layers.0.",
        ),
    ];
    for (change, part) in cases {
        let message = load_with(change).unwrap_err();
        assert!(message.starts_with("`DIR/model.safetensors`"), "{message}");
        assert!(message.contains(part), "{message}");
        assert!(message.contains("\nhint: "), "{message}");
    }
}

/// Writes a safetensors file with a header of this text.
fn write_header(path: &Path, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_header_that_contradicts_itself_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    save(&small(true, DType::F32), dir.path(), DType::F32).unwrap();
    let path = dir.path().join("model.safetensors");
    let tensor = |shape: &str, end: u64| {
        format!(
            r#"{{"model.embed_tokens.weight": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, {end}]}}}}"#
        )
    };
    let headers = [
        tensor("[23, 12]", 8),
        tensor("[9223372036854775807, 4]", 16),
        tensor("[-1, 4]", 16),
        tensor("[2, 2]", u64::MAX),
        "{".to_owned(),
        "[]".to_owned(),
        "null".to_owned(),
    ];
    for header in headers {
        write_header(&path, &header, 16);
        let message = load_from(dir.path()).unwrap_err();
        let start = "`DIR/model.safetensors` is not a complete safetensors file\nhint: ";
        assert!(message.starts_with(start), "{header}: {message}");
    }
    for size in [u64::MAX, 1 << 40, 200_000_000] {
        std::fs::write(&path, size.to_le_bytes()).unwrap();
        assert!(
            load_from(dir.path())
                .unwrap_err()
                .contains("is not a complete safetensors file")
        );
    }
}

#[test]
fn an_index_stays_within_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    save_sharded(&small(true, DType::F32), dir.path(), DType::F32, 8_000).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    let shard = weight_files(dir.path()).unwrap().remove(0);
    for file in [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "",
        ".",
        "..",
    ] {
        let text = json!({"weight_map": {"model.norm.weight": file}}).to_string();
        std::fs::write(&index, text).unwrap();
        let message = load_from(dir.path()).unwrap_err();
        let start = format!(
            "`DIR/model.safetensors.index.json` names the file `{file}`, which is not a plain file name\nhint: "
        );
        assert!(message.starts_with(&start), "{message}");
    }
    for text in [
        "{}",
        r#"{"weight_map": []}"#,
        r#"{"weight_map": {"a": 4}}"#,
        "\u{0}",
    ] {
        std::fs::write(&index, text).unwrap();
        let message = load_from(dir.path()).unwrap_err();
        assert!(message.starts_with("`DIR/model.safetensors.index.json` is not valid JSON for a safetensors index\nhint: "), "{message}");
    }
    std::fs::write(
        &index,
        r#"{"weight_map": {"model.norm.weight": "gone.safetensors"}}"#,
    )
    .unwrap();
    let message = load_from(dir.path()).unwrap_err();
    assert_eq!(
        message,
        "`DIR/gone.safetensors` does not exist, but `DIR/model.safetensors.index.json` names it for the tensor `model.norm.weight`\nhint: download the missing shard"
    );
    let name = shard.file_name().unwrap().to_str().unwrap();
    let text = json!({"weight_map": {"model.norm.weight": name}}).to_string();
    std::fs::write(&index, text).unwrap();
    let message = load_from(dir.path()).unwrap_err();
    assert!(
        message.contains("has no tensor `model.") && message.contains("\nhint: "),
        "{message}"
    );
}

#[cfg(unix)]
#[test]
fn a_pipe_or_a_folder_in_the_place_of_a_file_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    save(&small(true, DType::F32), dir.path(), DType::F32).unwrap();
    let broken = |name: &str, make: &dyn Fn(&Path)| {
        let path = dir.path().join(name);
        let kept = dir.path().join("kept");
        let existed = path.exists();
        if existed {
            std::fs::rename(&path, &kept).unwrap();
        }
        make(&path);
        let began = Instant::now();
        let message = load_from(dir.path()).unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(5));
        if path.is_dir() {
            std::fs::remove_dir(&path).unwrap();
        } else {
            std::fs::remove_file(&path).unwrap();
        }
        if existed {
            std::fs::rename(&kept, &path).unwrap();
        }
        message
    };
    let pipe = |path: &Path| {
        let made = std::process::Command::new("mkfifo")
            .arg(path)
            .status()
            .unwrap();
        assert!(made.success());
    };
    let folder = |path: &Path| std::fs::create_dir(path).unwrap();
    for make in [&pipe as &dyn Fn(&Path), &folder] {
        for name in ["config.json", "model.safetensors"] {
            let message = broken(name, make);
            let start = format!("`DIR/{name}` is not a regular file\nhint: ");
            assert!(message.starts_with(&start), "{message}");
        }
    }
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let message = broken("model.safetensors.index.json", &pipe);
    assert!(
        message.starts_with("`DIR/model.safetensors.index.json` is not a regular file"),
        "{message}"
    );
    // A file of many gigabytes without contents.
    let config = dir.path().join("config.json");
    let file = std::fs::File::create(&config).unwrap();
    file.set_len(1 << 40).unwrap();
    let message = load_from(dir.path()).unwrap_err();
    assert!(
        message.starts_with(
            "`DIR/config.json` has 1099511627776 bytes, and at most 100000000 are read\nhint: "
        ),
        "{message}"
    );
}
