//! Real GGUF files against the folders that were made from them.

use std::path::{Path, PathBuf};

use potstill_model::lay_out_gguf;

use crate::real;

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
