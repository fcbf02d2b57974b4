//! Targets: what a model's folder holds, and GGUF files.

use std::fs;
use std::path::Path;

use potstill_datasets::Tokenizer;
use potstill_model::{Config, DType, Decoder, Device, Int, Tensor, lay_out_gguf, load, save};
use serde_json::Value;

use crate::scratch::{check_error, check_error_names, file, folder};

/// Most parameters of a model that a target computes with.
const SMALL: u64 = 200_000;

/// `config.json` of the model whose weights are read.
pub const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 6, "hidden_size": 4, "intermediate_size": 4,
"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "rms_norm_eps": 1e-5,
"rope_theta": 10000.0, "max_position_embeddings": 16, "tie_word_embeddings": true, "bos_token_id": 1,
"eos_token_id": [2]}"#;

/// Input: `config.json`. A configuration that is read can be written and read again, and a small one makes a model.
pub fn config(data: &[u8]) {
    let path = file("config.json", data);
    let config = match Config::from_file(&path) {
        Ok(config) => config,
        Err(error) => return check_error_names(&error, "config.json"),
    };
    let json = config.to_json(DType::F32);
    let again = Config::from_json(&json).unwrap();
    assert_eq!(json, again.to_json(DType::F32));
    assert_eq!(config.parameters(), again.parameters());
    if config.parameters() > SMALL || config.max_position_embeddings > 1 << 16 {
        return;
    }
    match Decoder::init(&config, 1, DType::F32, &Device::flex()) {
        Ok(model) => {
            let hidden = run(&model);
            assert_eq!(hidden, run(&model));
        }
        Err(error) => check_error(&error),
    }
}

/// Runs a model on three tokens and returns the bits of the hidden states.
fn run(model: &Decoder) -> Vec<u32> {
    let last = model.token_count().saturating_sub(1) as i32;
    let ids = Tensor::<2, Int>::from_data([[0, last, last / 2]], &model.device());
    let hidden = model.hidden(ids).into_data();
    hidden.iter::<f32>().map(f32::to_bits).collect()
}

/// Input: `model.safetensors` of the model of [`CONFIG`].
pub fn safetensors(data: &[u8]) {
    let dir = folder();
    fs::write(dir.join("config.json"), CONFIG).unwrap();
    fs::write(dir.join("model.safetensors"), data).unwrap();
    check_weights(&dir);
}

/// Input: `model.safetensors.index.json` of the model of [`CONFIG`].
pub fn weight_index(data: &[u8]) {
    let dir = folder();
    fs::write(dir.join("config.json"), CONFIG).unwrap();
    let config = Config::from_dir(&dir).unwrap();
    let model = Decoder::init(&config, 1, DType::F32, &Device::flex()).unwrap();
    save(&model, &dir, DType::F32).unwrap();
    fs::rename(dir.join("model.safetensors"), dir.join("a.safetensors")).unwrap();
    fs::write(dir.join("model.safetensors.index.json"), data).unwrap();
    check_weights(&dir);
}

/// Loads the model of a folder, saves it, and loads it again with the same weights.
fn check_weights(dir: &Path) {
    let model = match load(dir, DType::F32, &Device::flex()) {
        Ok(model) => model,
        Err(error) => return check_error_names(&error, &dir.display().to_string()),
    };
    let copy = dir.join("copy");
    save(&model, &copy, DType::F32).unwrap();
    let again = load(&copy, DType::F32, &Device::flex()).unwrap();
    assert_eq!(bits(&model), bits(&again));
    run(&model);
}

fn bits(model: &Decoder) -> Vec<Vec<u8>> {
    let parameters = potstill_model::named_parameters(model);
    parameters
        .into_iter()
        .map(|(_, parameter)| parameter.try_into_data().unwrap().bytes().to_vec())
        .collect()
}

/// Input: a GGUF file. One that is laid out has a configuration, a tokenizer and weights that can be read, or are refused.
pub fn gguf(data: &[u8]) {
    let path = file("model.gguf", data);
    let dir = path.with_file_name("layout");
    if let Err(error) = lay_out_gguf(&path, &dir) {
        return check_error_names(&error, "model.gguf");
    }
    match Tokenizer::from_dir(&dir) {
        Ok(tokenizer) => drop(tokenizer.encode("Once upon a time", true)),
        Err(error) => check_error(&error),
    }
    match Config::from_dir(&dir) {
        Ok(config) if config.parameters() <= SMALL => check_weights(&dir),
        Ok(_) => {}
        Err(error) => check_error(&error),
    }
    let text = fs::read(dir.join("config.json")).unwrap();
    serde_json::from_slice::<Value>(&text).unwrap();
}
