//! Two tokenizers small enough to read: one of each alphabet.

use std::fs;
use std::path::Path;

use potstill_datasets::Tokenizer;
use serde_json::{Value, json};
use tempfile::TempDir;

fn added(tokens: &[&str], first: usize) -> Vec<Value> {
    let flags = json!({ "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
    tokens
        .iter()
        .enumerate()
        .map(|(i, content)| {
            let mut token = flags.clone();
            token["id"] = json!(first + i);
            token["content"] = json!(content);
            token
        })
        .collect()
}

/// Byte-level BPE: bytes are ids 0 to 255 in the order of GPT-2's alphabet, then "\n\n", " t" and " th",
/// then `<s>` 259, `</s>` 260, `<|im_start|>` 261, `<|im_end|>` 262.
pub(crate) fn byte_level_json() -> Value {
    let mut alphabet: Vec<char> = (33..=126)
        .chain(161..=172)
        .chain(174..=255)
        .filter_map(char::from_u32)
        .collect();
    alphabet.extend((256..256 + 68).filter_map(char::from_u32));
    let mut vocabulary: Vec<String> = alphabet.iter().map(char::to_string).collect();
    vocabulary.extend(["ĊĊ", "Ġt", "Ġth"].map(str::to_owned));
    let vocabulary: serde_json::Map<String, Value> = vocabulary
        .into_iter()
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": added(&["<s>", "</s>", "<|im_start|>", "<|im_end|>"], 259),
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [["Ċ", "Ċ"], ["Ġ", "t"], ["Ġt", "h"]] },
    })
}

/// SentencePiece's way: `<unk>` 0, `<s>` 1, `</s>` 2, the bytes, then `▁`, letters, and "▁a" and "ab".
pub(crate) fn sentence_piece_json() -> Value {
    let mut vocabulary: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    vocabulary.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    vocabulary.extend(["▁", "a", "b", "c", "▁a", "ab"].map(str::to_owned));
    let vocabulary: serde_json::Map<String, Value> = vocabulary
        .into_iter()
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "pre_tokenizer": null, "post_processor": null,
        "added_tokens": added(&["<unk>", "<s>", "</s>"], 0),
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" }] },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 }] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary, "merges": [["▁", "a"], ["a", "b"]] },
    })
}

pub(crate) fn write(dir: &Path, name: &str, json: &Value) {
    fs::write(dir.join(name), json.to_string()).unwrap();
}

pub(crate) fn folder(tokenizer: &Value, eos: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "tokenizer.json", tokenizer);
    write(
        dir.path(),
        "tokenizer_config.json",
        &json!({ "bos_token": "<s>", "eos_token": eos }),
    );
    dir
}

/// Ends a sequence with `<|im_end|>`.
pub(crate) fn byte_level() -> Tokenizer {
    Tokenizer::from_dir(folder(&byte_level_json(), "<|im_end|>").path()).unwrap()
}

/// Ends a sequence with `</s>`.
pub(crate) fn sentence_piece() -> Tokenizer {
    Tokenizer::from_dir(folder(&sentence_piece_json(), "</s>").path()).unwrap()
}
