//! Ids and bytes of real tokenizers, against transformers. Needs `POTSTILL_REAL`.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use potstill_datasets::{ChatTemplate, Message, Role, Tokenizer, encode_conversation, prompt_ids};
use serde_json::Value;

use super::messages;
use crate::text::tokenizer::TEXTS;

/// A file or folder below `POTSTILL_REAL`, or `None` after saying that the test is skipped.
pub(crate) fn real(path: &str) -> Option<PathBuf> {
    let Some(root) = std::env::var_os("POTSTILL_REAL") else {
        eprintln!("skipped: POTSTILL_REAL is not set");
        return None;
    };
    let found = PathBuf::from(root).join(path);
    if !found.exists() {
        eprintln!("skipped: POTSTILL_REAL has no {path}");
        return None;
    }
    Some(found)
}

fn compare(model: &str, reference: &str) {
    let (Some(dir), Some(reference)) = (real(model), real(reference)) else {
        return;
    };
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    let template = ChatTemplate::from_dir(&dir).unwrap();
    let reference: Value = serde_json::from_str(&fs::read_to_string(reference).unwrap()).unwrap();
    let items = reference["items"].as_array().unwrap();
    assert!(items.len() >= 8);
    for item in items {
        let expected: Vec<u32> = serde_json::from_value(item["ids"].clone()).unwrap();
        let ids = if item["chat"].is_null() {
            tokenizer
                .encode(item["text"].as_str().unwrap(), true)
                .unwrap()
        } else {
            let template = template.as_ref().unwrap();
            prompt_ids(&tokenizer, template, &messages(&item["chat"]), None, None).unwrap()
        };
        assert_eq!(ids, expected, "{}", item["text"]);
        let greedy: Vec<u32> = serde_json::from_value(item["greedy32_ids"].clone()).unwrap();
        assert_eq!(
            tokenizer.decode(&greedy, false).unwrap(),
            item["greedy32_text"].as_str().unwrap()
        );
    }
}

#[test]
fn smollm2() {
    compare("models/SmolLM2-135M-Instruct", "ref/smollm2.json");
}

#[test]
fn stories260k() {
    compare("models/stories260K", "ref/stories260k.json");
}

#[test]
fn qwen() {
    compare("models/Qwen2.5-Coder-0.5B-Instruct", "ref/qwen-0.5b.json");
}

#[test]
fn gemma() {
    compare("models/gemma-3-270m", "ref/gemma-270m.json");
}

/// Gemma's last id, the placeholder of an image, has no row in the embedding of the models for text.
#[test]
fn a_token_without_a_row_is_refused_where_a_text_has_it() {
    let Some(dir) = real("models/gemma-3-270m") else {
        return;
    };
    let rows = 262_144;
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    assert_eq!(tokenizer.vocab_size(), rows + 1);
    let tokenizer = tokenizer.with_rows(rows).unwrap();
    assert_eq!(tokenizer.vocab_size(), rows);
    assert_eq!(tokenizer.tokens_without_row(), ["<image_soft_token>"]);
    assert_eq!(tokenizer.leading_id(), Some(2));
    let error = tokenizer
        .encode("a picture <image_soft_token>", false)
        .unwrap_err()
        .to_string();
    assert!(error.contains("whose id 262144 has no row"), "{error}");
    assert!(tokenizer.encode("a picture", false).is_ok());
    let token = tokenizer.with_rows(300).unwrap_err();
    assert!(!token.is_empty());
}

/// Qwen's embedding has 151,936 rows for 151,665 tokens.
#[test]
fn ids_of_padding_have_no_text() {
    let Some(dir) = real("models/Qwen2.5-Coder-0.5B-Instruct") else {
        return;
    };
    let tokenizer = Tokenizer::from_dir(&dir)
        .unwrap()
        .with_rows(151_936)
        .unwrap();
    assert_eq!(tokenizer.vocab_size(), 151_665);
    assert_eq!(
        tokenizer.decode(&[151_665, 64, 151_935], false).unwrap(),
        "a"
    );
    assert!(tokenizer.token_bytes(151_935).is_empty());
    assert_eq!(tokenizer.leading_id(), None);
    assert_eq!(tokenizer.eos_ids(), [151_643, 151_645]);
}

#[test]
fn bytes_of_ids_are_the_text() {
    for (model, prefix) in [
        ("models/SmolLM2-135M-Instruct", ""),
        ("models/stories260K", " "),
        ("models/Qwen2.5-Coder-0.5B-Instruct", ""),
        ("models/gemma-3-270m", ""),
    ] {
        let Some(dir) = real(model) else { continue };
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        let questions = real("data/gsm8k/train.jsonl")
            .map(|path| fs::read_to_string(path).unwrap())
            .unwrap_or_default();
        for text in TEXTS.into_iter().chain(questions.lines().take(200)) {
            let ids = tokenizer.encode(text, false).unwrap();
            let bytes: Vec<u8> = ids
                .iter()
                .flat_map(|&id| tokenizer.token_bytes(id))
                .collect();
            let text = if prefix.is_empty() && !model.contains("gemma") {
                text.to_owned()
            } else {
                text.replace('▁', " ")
            };
            assert_eq!(
                String::from_utf8_lossy(&bytes),
                format!("{prefix}{text}"),
                "{model}"
            );
        }
    }
}

#[test]
fn fingerprints_tell_the_models_apart() {
    let models = [
        "SmolLM2-135M-Instruct",
        "stories260K",
        "Qwen2.5-Coder-0.5B-Instruct",
    ];
    let dirs: Vec<PathBuf> = models
        .iter()
        .filter_map(|model| real(&format!("models/{model}")))
        .collect();
    let mut seen = BTreeSet::new();
    for dir in &dirs {
        let fingerprint = Tokenizer::from_dir(dir).unwrap().fingerprint().to_owned();
        let json: Value =
            serde_json::from_str(&fs::read_to_string(dir.join("tokenizer.json")).unwrap()).unwrap();
        let copy = tempfile::tempdir().unwrap();
        fs::write(
            copy.path().join("tokenizer.json"),
            serde_json::to_string_pretty(&json).unwrap(),
        )
        .unwrap();
        assert_eq!(
            Tokenizer::from_dir(copy.path()).unwrap().fingerprint(),
            fingerprint
        );
        seen.insert(fingerprint);
    }
    assert_eq!(seen.len(), dirs.len());
}

#[test]
fn masks_cover_the_answer_and_its_end() {
    for (model, after) in [
        ("models/SmolLM2-135M-Instruct", 1),
        ("models/Qwen2.5-Coder-0.5B-Instruct", 1),
    ] {
        let Some(dir) = real(model) else { continue };
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        let template = ChatTemplate::from_dir(&dir).unwrap().unwrap();
        for answer in ["Apples.", "\n\n leading line feeds", "日本語 😀\n", " "] {
            let prompt = [
                Message::text(Role::System, "Be terse."),
                Message::text(Role::User, "Name one fruit."),
            ];
            let encoded = encode_conversation(
                &tokenizer,
                &template,
                &prompt,
                None,
                &Message::text(Role::Assistant, answer),
                None,
            )
            .unwrap();
            let ids = prompt_ids(&tokenizer, &template, &prompt, None, None).unwrap();
            assert!(encoded.token_ids.starts_with(&ids));
            let len = encoded.token_ids.len();
            assert_eq!(encoded.loss_mask.len(), len);
            let first = encoded.loss_mask.iter().position(|&loss| loss).unwrap();
            let last = encoded.loss_mask.iter().rposition(|&loss| loss).unwrap();
            assert_eq!(first, ids.len());
            assert_eq!(last, len - 1 - after);
            assert!(tokenizer.eos_ids().contains(&encoded.token_ids[last]));
            assert_eq!(
                tokenizer
                    .decode(&encoded.token_ids[first..last], false)
                    .unwrap(),
                answer
            );
        }
    }
}
