//! Tokenizers read from a folder: bytes, fingerprints, special tokens, broken files.

use std::fs;

use potstill_datasets::{ChatTemplate, Error, Message, Role, Tokenizer, bos_problem, prompt_ids};
use serde_json::{Value, json};

use crate::text::small::{
    byte_level, byte_level_json, folder, sentence_piece, sentence_piece_json, write,
};

/// Texts with what tokenizers stumble over.
pub(crate) const TEXTS: [&str; 12] = [
    "a",
    " ab abc  cab ",
    "The quick brown fox.\n\n\tIt's 3.14 — “quoted” naïve café",
    "日本語と中文，한국어",
    "👩‍👩‍👧‍👦 😀🏳️‍🌈",
    "tabs\t\tand\r\nCRLF\u{a0}nbsp\u{200b}zwsp",
    "\u{0}\u{1}\u{7f}control",
    "   leading and trailing   ",
    "<0x41> <unk ▁ Ġ Ċ literal",
    "العربية עברית ไทย हिन्दी",
    "fn main() { println!(\"{:>8}\", x); }",
    "\n",
];

fn spelled(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u8> {
    ids.iter()
        .flat_map(|&id| tokenizer.token_bytes(id))
        .collect()
}

#[test]
fn bytes_of_ids_are_the_text() {
    let (byte_level, sentence_piece) = (byte_level(), sentence_piece());
    for text in TEXTS {
        let ids = byte_level.encode(text, false).unwrap();
        assert_eq!(spelled(&byte_level, &ids), text.as_bytes(), "{text:?}");
        assert_eq!(byte_level.decode(&ids, true).unwrap(), text);
        let ids = sentence_piece.encode(text, false).unwrap();
        // `▁` in a text is a space to SentencePiece.
        assert_eq!(
            spelled(&sentence_piece, &ids),
            format!(" {}", text.replace('▁', " ")).as_bytes(),
            "{text:?}"
        );
    }
    let ids = byte_level.encode("<|im_start|>a<|im_end|>", false).unwrap();
    assert_eq!(ids, [261, 64, 262]);
    assert_eq!(spelled(&byte_level, &ids), b"<|im_start|>a<|im_end|>");
    assert_eq!(byte_level.decode(&ids, true).unwrap(), "a");
    assert_eq!(byte_level.token_bytes(256), b"\n\n");
    assert_eq!(byte_level.token_bytes(263), b"");
    assert_eq!(byte_level.vocab_size(), 263);
}

#[test]
fn fingerprint_is_of_the_content_not_of_the_file() {
    let json = byte_level_json();
    let fingerprint = |json: &str| {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tokenizer.json"), json).unwrap();
        Tokenizer::from_dir(dir.path())
            .unwrap()
            .fingerprint()
            .to_owned()
    };
    let original = fingerprint(&json.to_string());
    assert_eq!(original.len(), 64);

    let mut reordered = serde_json::Map::new();
    for (key, value) in json.as_object().unwrap().iter().rev() {
        reordered.insert(key.clone(), value.clone());
    }
    let vocabulary: serde_json::Map<String, Value> = json["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .rev()
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    reordered["model"]["vocab"] = vocabulary.into();
    // Older files write a merge as one text.
    reordered["model"]["merges"] = json!(["Ċ Ċ", "Ġ t", "Ġt h"]);
    assert_eq!(
        fingerprint(&serde_json::to_string_pretty(&reordered).unwrap()),
        original
    );

    let mut changed = Vec::new();
    let mut merges = json.clone();
    merges["model"]["merges"] = json!([["Ġ", "t"], ["Ċ", "Ċ"], ["Ġt", "h"]]);
    changed.push(merges);
    let mut ids = json.clone();
    ids["model"]["vocab"]["!"] = json!(1);
    ids["model"]["vocab"]["\""] = json!(0);
    changed.push(ids);
    let mut content = json.clone();
    content["added_tokens"][0]["content"] = json!("<S>");
    changed.push(content);
    let mut special = json;
    special["added_tokens"][0]["special"] = json!(false);
    changed.push(special);
    for json in changed {
        assert_ne!(fingerprint(&json.to_string()), original);
    }
}

#[test]
fn end_of_sequence_is_what_all_files_name() {
    let dir = folder(&byte_level_json(), "</s>");
    let eos = || Tokenizer::from_dir(dir.path()).map(|tokenizer| tokenizer.eos_ids().to_vec());
    assert_eq!(eos().unwrap(), [260]);
    write(dir.path(), "config.json", &json!({ "eos_token_id": 259 }));
    assert_eq!(eos().unwrap(), [259, 260]);
    write(
        dir.path(),
        "generation_config.json",
        &json!({ "eos_token_id": null }),
    );
    assert_eq!(eos().unwrap(), [259, 260]);
    write(
        dir.path(),
        "generation_config.json",
        &json!({ "eos_token_id": [262, 260, 262] }),
    );
    assert_eq!(eos().unwrap(), [259, 260, 262]);
    let sources = Tokenizer::from_dir(dir.path()).unwrap();
    let sources = sources.eos_sources().iter();
    let sources: Vec<(&str, &[u32])> = sources.map(|s| (s.file, s.ids.as_slice())).collect();
    assert_eq!(
        sources,
        [
            ("generation_config.json", &[260, 262][..]),
            ("config.json", &[259]),
            ("tokenizer_config.json", &[260]),
        ]
    );
    // A later file may have been copied from another model.
    write(
        dir.path(),
        "config.json",
        &json!({ "eos_token_id": 50_256 }),
    );
    assert_eq!(eos().unwrap(), [260, 262]);
    for (bad, shown) in [
        (json!(263), "263"),
        (json!("</s>"), "\"</s>\""),
        (json!([-1]), "-1"),
    ] {
        write(
            dir.path(),
            "generation_config.json",
            &json!({ "eos_token_id": bad }),
        );
        let error = eos().unwrap_err().to_string();
        assert!(
            error.contains("generation_config.json: `eos_token_id` ") && error.contains(shown),
            "{error}"
        );
    }
}

#[test]
fn special_tokens_are_texts_or_objects() {
    let dir = folder(&byte_level_json(), "</s>");
    write(
        dir.path(),
        "tokenizer_config.json",
        &json!({ "bos_token": { "content": "<s>", "lstrip": false }, "pad_token": "</s>", "unk_token": null }),
    );
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.bos_token(), Some("<s>"));
    assert_eq!(tokenizer.special_tokens().pad.as_deref(), Some("</s>"));
    assert_eq!(tokenizer.special_tokens().unk, None);
    assert!(tokenizer.eos_ids().is_empty());
}

/// Files that trainers leave behind pad and cut every text.
#[test]
fn padding_and_truncation_of_the_file_are_ignored() {
    let mut json = byte_level_json();
    json["truncation"] =
        json!({ "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 });
    json["padding"] = json!({ "strategy": { "Fixed": 8 }, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 260, "pad_type_id": 0, "pad_token": "</s>" });
    let tokenizer = Tokenizer::from_dir(folder(&json, "</s>").path()).unwrap();
    assert_eq!(tokenizer.encode("abc", false).unwrap().len(), 3);
}

#[test]
fn broken_files_are_named() {
    let message = |files: &[(&str, &str)]| {
        let dir = folder(&sentence_piece_json(), "</s>");
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let error = Tokenizer::from_dir(dir.path()).unwrap_err();
        error
            .to_string()
            .replace(&dir.path().display().to_string(), "model")
    };
    insta::assert_snapshot!(message(&[("tokenizer.json", "{ \"model\": ")]), @"
model/tokenizer.json is not valid JSON: EOF while parsing a value at line 1 column 11
hint: fetch the file again
");
    insta::assert_snapshot!(message(&[("tokenizer.json", "{}")]), @"model/tokenizer.json: it does not describe a tokenizer: Model missing. at line 1 column 2");
    let word_piece = json!({ "model": { "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": { "[UNK]": 0 } },
        "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true } });
    insta::assert_snapshot!(message(&[("tokenizer.json", &word_piece.to_string())]), @"model/tokenizer.json: the decoder `WordPiece` is not supported; Potstill reads byte-level BPE and SentencePiece vocabularies");
    insta::assert_snapshot!(message(&[("tokenizer_config.json", "[")]), @"
model/tokenizer_config.json is not valid JSON: EOF while parsing a list at line 1 column 1
hint: fetch the file again
");
    insta::assert_snapshot!(message(&[("tokenizer_config.json", r#"{ "bos_token": 1 }"#)]), @"model/tokenizer_config.json: `bos_token` must be a string or an object with `content`, and is 1");
    insta::assert_snapshot!(message(&[("tokenizer_config.json", r#"{ "eos_token": "<end>" }"#)]), @r#"model/tokenizer_config.json: `eos_token` "<end>" is not in the vocabulary of tokenizer.json"#);

    let empty = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_dir(empty.path()).unwrap_err();
    assert!(matches!(error, Error::TokenizerMissing { .. }));
    insta::assert_snapshot!(error.to_string().replace(&empty.path().display().to_string(), "model"), @"
model has no tokenizer.json, and Potstill reads fast tokenizers only
hint: write one with transformers: `AutoTokenizer.from_pretrained(…).save_pretrained(…)`
");
    fs::create_dir(empty.path().join("tokenizer.json")).unwrap();
    let error = Tokenizer::from_dir(empty.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
    assert!(error.contains("is not a regular file"), "{error}");
}

#[test]
fn ids_without_a_row_must_belong_to_added_tokens() {
    // The last ids, from 259 on, are the four added tokens.
    let tokenizer = byte_level().with_rows(261).unwrap();
    assert_eq!(tokenizer.vocab_size(), 261);
    assert_eq!(
        tokenizer.tokens_without_row(),
        ["<|im_start|>", "<|im_end|>"]
    );
    insta::assert_snapshot!(tokenizer.encode("a<|im_end|>", false).unwrap_err(), @r#"
    the text "a<|im_end|>" has the token "<|im_end|>", whose id 262 has no row in the model's embedding of 261 rows
    hint: remove "<|im_end|>" from the data
    "#);
    assert_eq!(tokenizer.encode("a</s>", false).unwrap(), [64, 260]);
    assert_eq!(byte_level().with_rows(258).unwrap_err(), "Ġth");
    assert_eq!(byte_level().with_rows(300).unwrap().vocab_size(), 263);
}

#[test]
fn a_prompt_begins_as_the_tokenizer_has_texts_begin() {
    let mut json = byte_level_json();
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [259], "tokens": ["<s>"] } },
    });
    let adds = folder(&json, "</s>");
    let problem = |dir: &std::path::Path, template: &str, text: &str| {
        let tokenizer = Tokenizer::from_dir(dir).unwrap();
        let template = ChatTemplate::from_source("test", template).unwrap();
        let messages = [Message::text(Role::User, text)];
        let ids = prompt_ids(&tokenizer, &template, &messages, None, None).unwrap();
        bos_problem(&tokenizer, &ids)
    };
    let (bare, with_bos) = (
        "{{ messages[0].content }}",
        "{{ bos_token }}{{ messages[0].content }}",
    );
    assert_eq!(problem(adds.path(), with_bos, "Hi"), None);
    insta::assert_snapshot!(problem(adds.path(), bare, "Hi").unwrap(), @r#"
    a prompt does not begin with "<s>", which the tokenizer puts in front of every text, so the model was trained with it and is much worse without it
    hint: use a chat template that begins with `{{ bos_token }}`; `template = "plain"` does
    "#);
    insta::assert_snapshot!(problem(adds.path(), with_bos, "<s>Hi").unwrap(), @r#"
    a prompt begins with two "<s>", and models are trained with one
    hint: the chat template writes it, so remove it from the data
    "#);
    // `add_bos_token` decides, whatever the post-processor does.
    let config = |adds_bos: bool| json!({ "bos_token": "<s>", "add_bos_token": adds_bos });
    write(adds.path(), "tokenizer_config.json", &config(false));
    assert_eq!(problem(adds.path(), bare, "Hi"), None);
    let plain = folder(&byte_level_json(), "</s>");
    assert_eq!(problem(plain.path(), bare, "Hi"), None);
    write(plain.path(), "tokenizer_config.json", &config(true));
    assert!(problem(plain.path(), bare, "Hi").is_some());
}
