//! Tiny checkpoints of each family, written as GGUF, laid out as folders and loaded again.

use std::path::Path;

use burn::tensor::{Int, Tensor, TensorData};
use potstill_model::{
    DType, Decoder, Device, GgufLabels, GgufType, export_gguf, lay_out_gguf, load, save,
};
use serde_json::json;

use crate::real;

/// Writes a byte-level tokenizer of three tokens; the other rows of an embedding have none.
fn write_tokenizer(dir: &Path) {
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "use_regex": true });
    let tokenizer = json!({
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": { "type": "BPE", "vocab": { "a": 0, "b": 1, "ab": 2 }, "merges": ["a b"] },
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

/// Loads a tiny checkpoint, saves it in F16 with a tokenizer, and returns the folder.
fn half_precision(name: &str) -> Option<tempfile::TempDir> {
    let source = real(&format!("tiny/{name}"))?;
    let dir = tempfile::tempdir().unwrap();
    let model = load(&source, DType::F32, &Device::flex()).unwrap();
    save(&model, dir.path(), DType::F16).unwrap();
    write_tokenizer(dir.path());
    Some(dir)
}

fn logits(model: &Decoder, tokens: usize) -> Vec<f32> {
    let ids: Vec<i32> = (0..tokens as i32).map(|id| (id * 37 + 5) % 512).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, tokens]), &Device::flex());
    let hidden = model.hidden(ids);
    let [_, n, d] = hidden.dims();
    let logits = model.logits(hidden.reshape([n, d]));
    logits.without_autodiff().try_into_vec_as::<f32>().unwrap()
}

/// Compares the logits of a checkpoint in F16 with those of its GGUF file in F16, up to `tolerance`.
fn check(name: &str, tokens: usize, tolerance: f32) {
    let Some(dir) = half_precision(name) else {
        return;
    };
    let file = dir.path().join("x.gguf");
    let labels = GgufLabels::default();
    export_gguf(dir.path(), &file, GgufType::F16, &labels).unwrap();
    let folder = dir.path().join("laid-out");
    lay_out_gguf(&file, &folder).unwrap();
    let expected = load(dir.path(), DType::F32, &Device::flex()).unwrap();
    let found = load(&folder, DType::F32, &Device::flex()).unwrap();
    let expected = logits(&expected, tokens);
    let found = logits(&found, tokens);
    let differences = expected.iter().zip(&found).map(|(a, b)| (a - b).abs());
    let most = differences.fold(0.0, f32::max);
    assert!(most <= tolerance, "{name}: logits differ by {most}");
}

#[test]
fn models_are_the_same_after_a_round_trip() {
    // Behind its window of 8 the tiny Mistral differs, and its file's context ends there.
    for (name, tokens) in [
        ("llama31", 100),
        ("qwen2", 100),
        ("qwen3", 100),
        ("mistral", 8),
        ("gemma3", 100),
        ("phi3", 100),
        ("olmo2", 100),
        ("smollm3", 100),
    ] {
        check(name, tokens, 1e-4);
    }
    // The factor of Gemma 2's queries is multiplied into the weights, which are rounded to F16 again.
    check("gemma2", 100, 0.1);
}

#[test]
fn what_llama_cpp_does_not_have_is_refused_by_name() {
    for (name, part) in [
        ("qwen3moe", "`mlp_only_layers` in config.json is [0]"),
        (
            "dsv3",
            "the architecture \"deepseek_v3\" of config.json is not one of llama, mistral",
        ),
        ("gptoss", "the architecture \"gpt_oss\""),
    ] {
        let Some(dir) = half_precision(name) else {
            return;
        };
        let file = dir.path().join("x.gguf");
        let labels = GgufLabels::default();
        let error = export_gguf(dir.path(), &file, GgufType::F16, &labels).unwrap_err();
        let message = error.to_string();
        assert!(message.contains(part), "{message}");
        assert!(
            message.contains("hint: export this model as safetensors"),
            "{message}"
        );
        assert!(!file.exists());
    }
}

#[test]
fn a_tokenizer_that_llama_cpp_does_not_have_is_refused() {
    let Some(dir) = half_precision("qwen2") else {
        return;
    };
    let path = dir.path().join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    for (from, to, part) in [
        ("\"BPE\"", "\"Unigram\"", "the `model` of tokenizer.json"),
        (
            "\"use_regex\":true",
            "\"use_regex\":false",
            "the `pre_tokenizer` or `normalizer`",
        ),
        (
            "\"ab\":2",
            "\"ab\":512",
            "\"ab\" of tokenizer.json has the id 512",
        ),
    ] {
        assert!(text.contains(from), "{text}");
        std::fs::write(&path, text.replace(from, to)).unwrap();
        let file = dir.path().join("x.gguf");
        let labels = GgufLabels::default();
        let error = export_gguf(dir.path(), &file, GgufType::F16, &labels).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}
