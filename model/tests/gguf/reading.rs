//! Real GGUF files against the folders that were made from them.

use std::path::{Path, PathBuf};

use half::bf16;
use potstill_model::{DType, GgufWeights, lay_out_gguf};
use safetensors::SafeTensors;

use crate::real;

/// Compares each tensor with that of the folder, rounded to BF16. The folders' embedding is the finer of the embedding and
/// the head where a file has both.
fn check_weights(name: &str) {
    let Some(file) = real(&format!("models/gguf/{name}.gguf")) else {
        return;
    };
    let Some(folder) = real(&format!("models/{name}")) else {
        return;
    };
    let weights = GgufWeights::open(&file).unwrap();
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let names = weights.names();
    let is_tied = !names.contains(&"lm_head.weight".to_owned());
    assert!(names.len() >= expected.names().len());
    for name in expected.names() {
        let own = match name == "model.embed_tokens.weight" && !is_tied {
            true => "lm_head.weight",
            false => name,
        };
        let view = expected.tensor(name).unwrap();
        assert_eq!(weights.shape(own).unwrap(), view.shape(), "{name}");
        let found = weights.read(own, DType::BF16).unwrap();
        let found = found.as_slice::<bf16>().unwrap();
        let stored = view.data().chunks_exact(2);
        let same = found
            .iter()
            .zip(stored)
            .all(|(found, stored)| found.to_le_bytes() == stored);
        assert!(same, "{name}");
    }
}

#[test]
fn weights_of_gemma_3_are_those_of_the_folder() {
    check_weights("gemma-3-270m");
}

#[test]
fn weights_of_qwen_2_are_those_of_the_folder() {
    check_weights("Qwen2.5-Coder-0.5B-Instruct");
}

#[test]
fn weights_of_llama_are_those_of_the_folder() {
    check_weights("SmolLM2-135M-Instruct");
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Lays out a real file and returns the folder, and the folder that it should be like.
fn laid_out(name: &str) -> Option<(tempfile::TempDir, PathBuf)> {
    let file = real(&format!("models/gguf/{name}.gguf"))?;
    let folder = real(&format!("models/{name}"))?;
    let out = tempfile::tempdir().unwrap();
    lay_out_gguf(&file, out.path()).unwrap();
    Some((out, folder))
}

#[test]
fn configurations_are_those_of_the_folders() {
    for name in [
        "gemma-3-270m",
        "Qwen2.5-Coder-0.5B-Instruct",
        "SmolLM2-135M-Instruct",
    ] {
        let Some((out, folder)) = laid_out(name) else {
            return;
        };
        let found = json(&out.path().join("config.json"));
        let legacy = folder.join("config.legacy.json");
        let expected = match legacy.exists() {
            true => json(&legacy),
            false => json(&folder.join("config.json")),
        };
        // Keys that say nothing about the model, that files do not have, or that differ because of the file: both Qwen
        // files have a head of their own.
        let other = [
            "torch_dtype",
            "transformers_version",
            "tie_word_embeddings",
            "initializer_range",
            "attention_dropout",
            "max_window_layers",
            "use_cache",
            "sliding_window_pattern",
            "_sliding_window_pattern",
            "use_bidirectional_attention",
            "attn_logit_softcapping",
            "unk_token_id",
            "pretraining_tp",
            "rope_scaling",
            "sliding_window",
        ];
        for (key, value) in expected.as_object().unwrap() {
            if !other.contains(&key.as_str()) {
                let is_same = match (found[key].as_f64(), value.as_f64()) {
                    (Some(found), Some(value)) => found == value,
                    _ => &found[key] == value,
                };
                assert!(is_same, "{key} of {name}: {} for {value}", found[key]);
            }
        }
    }
}

#[test]
fn laying_out_again_leaves_the_folder_alone() {
    let Some((out, _)) = laid_out("Qwen2.5-Coder-0.5B-Instruct") else {
        return;
    };
    let config = out.path().join("config.json");
    let time = |path: &Path| std::fs::metadata(path).unwrap().modified().unwrap();
    let before = time(&config);
    let file = real("models/gguf/Qwen2.5-Coder-0.5B-Instruct.gguf").unwrap();
    lay_out_gguf(&file, out.path()).unwrap();
    assert_eq!(time(&config), before);
}
