//! `tokenizer.json` and `tokenizer_config.json` from the metadata of a GGUF file.

use std::cmp::Reverse;
use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::file::GgufFile;
use super::pre_tokenizer::PreTokenizer;
use crate::Error;
use crate::limits::GGUF_TOKEN_BYTES;

/// Kinds of tokens: values of `tokenizer.ggml.token_type`.
pub(super) mod kind {
    pub(crate) const NORMAL: i32 = 1;
    pub(crate) const UNKNOWN: i32 = 2;
    pub(crate) const CONTROL: i32 = 3;
    pub(crate) const USER_DEFINED: i32 = 4;
    pub(crate) const UNUSED: i32 = 5;
    pub(crate) const BYTE: i32 = 6;
}

/// The tokenizer of a file.
pub(super) struct GgufTokenizer<'a> {
    file: &'a GgufFile,
    tokens: Vec<String>,
    kinds: Vec<i32>,
}

impl<'a> GgufTokenizer<'a> {
    /// Reads the vocabulary.
    ///
    /// # Errors
    /// Returns an error for an absent vocabulary, and for kinds that are not as many as the tokens.
    pub(super) fn open(file: &'a GgufFile) -> Result<Self, Error> {
        let key = "tokenizer.ggml.tokens";
        let Some(tokens) = file.texts(key)? else {
            return Err(file.broken(format!("the key `{key}` is absent, so it has no tokenizer")));
        };
        let key = "tokenizer.ggml.token_type";
        let kinds = match file.numbers(key)? {
            Some(kinds) => kinds.iter().map(|kind| *kind as i32).collect(),
            None => vec![kind::NORMAL; tokens.len()],
        };
        if kinds.len() != tokens.len() {
            let what = format!(
                "the key `{key}` has {} values for {} tokens",
                kinds.len(),
                tokens.len()
            );
            return Err(file.broken(what));
        }
        let rows = file
            .tensor("token_embd.weight")
            .map(|tensor| tensor.shape[0]);
        if rows.is_some_and(|rows| rows < tokens.len()) {
            let what = format!(
                "it has {} tokens, but `token_embd.weight` has {} rows",
                tokens.len(),
                rows.unwrap_or_default()
            );
            return Err(file.broken(what));
        }
        Ok(Self {
            file,
            tokens: tokens.iter().map(|token| (*token).to_owned()).collect(),
            kinds,
        })
    }

    /// Makes `tokenizer.json`.
    ///
    /// # Errors
    /// Returns an error for a kind of tokenizer that this crate does not read, and for merges of tokens that do not exist.
    pub(super) fn tokenizer(&self) -> Result<Value, Error> {
        let key = "tokenizer.ggml.model";
        match self.file.text(key)? {
            Some("gpt2") => self.byte_level(),
            Some("llama") => self.sentence_piece(),
            found => {
                let what = format!(
                    "the key `{key}` is {found:?}, and only \"gpt2\" and \"llama\" are supported"
                );
                Err(self.file.broken(what))
            }
        }
    }

    /// Makes `tokenizer_config.json`, with the chat template.
    ///
    /// # Errors
    /// Returns an error for a special token that does not exist.
    pub(super) fn config(&self) -> Result<Value, Error> {
        let mut out = Map::new();
        for (key, name) in [
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        ] {
            let token = self.special(name)?;
            out.insert(key.to_owned(), json!(token.map(|(_, token)| token)));
        }
        for name in ["add_bos_token", "add_eos_token"] {
            if let Some(flag) = self.file.flag(&format!("tokenizer.ggml.{name}"))? {
                out.insert(name.to_owned(), json!(flag));
            }
        }
        if let Some(template) = self.file.text("tokenizer.chat_template")? {
            out.insert("chat_template".to_owned(), json!(template));
        }
        let fixed = json!({
            "clean_up_tokenization_spaces": false,
            "tokenizer_class": "PreTrainedTokenizerFast",
        });
        out.extend(
            fixed
                .as_object()
                .into_iter()
                .flatten()
                .map(|(k, v)| (k.clone(), v.clone())),
        );
        Ok(Value::Object(out))
    }

    /// Returns the id and the text of a special token.
    fn special(&self, name: &str) -> Result<Option<(usize, &str)>, Error> {
        let key = format!("tokenizer.ggml.{name}");
        let Some(id) = self.file.count(&key)? else {
            return Ok(None);
        };
        match self.tokens.get(id) {
            Some(token) => Ok(Some((id, token))),
            None => Err(self.file.broken(format!(
                "the key `{key}` is {id}, but there are {} tokens",
                self.tokens.len()
            ))),
        }
    }

    fn byte_level(&self) -> Result<Value, Error> {
        let key = "tokenizer.ggml.pre";
        let name = self.file.text(key)?;
        let Some(splitting) = name.and_then(PreTokenizer::by_name) else {
            let what = format!(
                "the key `{key}` is {}, and only {} are supported",
                name.map_or("absent".to_owned(), |name| format!("{name:?}")),
                PreTokenizer::names()
            );
            return Err(self.file.broken(what));
        };
        let adds_bos = self.file.flag("tokenizer.ggml.add_bos_token")?;
        let normalizer = match splitting.normalizes {
            true => json!({ "type": "NFC" }),
            false => Value::Null,
        };
        let vocabulary = self.vocabulary(|_, token| token.to_owned());
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
        });
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(|_, token| token.to_owned()),
            "normalizer": normalizer,
            "pre_tokenizer": splitting.to_json(),
            "post_processor": self.template(adds_bos.unwrap_or(splitting.adds_bos))?,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": splitting.ignores_merges,
                "merges": self.merges(&vocabulary)?,
                "vocab": vocabulary,
            },
        }))
    }

    /// Reads the merges of a byte-level tokenizer as pairs.
    fn merges(&self, vocabulary: &Map<String, Value>) -> Result<Vec<Value>, Error> {
        let key = "tokenizer.ggml.merges";
        let Some(merges) = self.file.texts(key)? else {
            return Err(self.file.broken(format!("the key `{key}` is absent")));
        };
        let mut pairs = Vec::with_capacity(merges.len());
        for (number, merge) in merges.iter().enumerate() {
            // The first character may be a space itself.
            let first = merge.chars().next().map_or(0, char::len_utf8);
            let space = merge[first..].find(' ').map(|at| at + first);
            let pair = space.map(|at| (&merge[..at], &merge[at + 1..]));
            let is_known = |(left, right): &(&str, &str)| {
                let whole = format!("{left}{right}");
                [*left, *right, &whole]
                    .iter()
                    .all(|part| vocabulary.contains_key(*part))
            };
            let Some((left, right)) = pair.filter(is_known) else {
                let what = format!(
                    "merge {number} in the key `{key}`, {merge:?}, is not a pair of tokens that make a token"
                );
                return Err(self.file.broken(what));
            };
            pairs.push(json!([left, right]));
        }
        Ok(pairs)
    }

    fn sentence_piece(&self) -> Result<Value, Error> {
        let key = "tokenizer.ggml.scores";
        let Some(scores) = self.file.numbers(key)? else {
            return Err(self.file.broken(format!("the key `{key}` is absent")));
        };
        if scores.len() != self.tokens.len() {
            let what = format!(
                "the key `{key}` has {} values for {} tokens",
                scores.len(),
                self.tokens.len()
            );
            return Err(self.file.broken(what));
        }
        let adds_bos = self.file.flag("tokenizer.ggml.add_bos_token")?;
        let has_prefix = self.file.flag("tokenizer.ggml.add_space_prefix")?;
        let has_prefix = has_prefix.unwrap_or(true);
        let mut decoders = vec![
            json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        let space = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
        let (normalizer, pre_tokenizer) = match has_prefix {
            true => {
                decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
                let prefix = json!({ "type": "Prepend", "prepend": "▁" });
                let both = json!({ "type": "Sequence", "normalizers": [prefix, space] });
                (both, Value::Null)
            }
            // The normalizer leaves no space, so that this splitting has no effect. Gemma's file has it.
            false => (
                space,
                json!({
                    "type": "Split", "pattern": { "String": " " }, "behavior": "MergedWithPrevious", "invert": false,
                }),
            ),
        };
        // User-defined tokens are stored with spaces, and in the vocabulary they have the sign for a space.
        let spell = |kind: i32, token: &str| match kind {
            kind::USER_DEFINED => token.replace(' ', "▁"),
            _ => token.to_owned(),
        };
        let unknown = match self.special("unknown_token_id")? {
            Some((_, token)) => Some(token),
            None => {
                let id = self.kinds.iter().position(|kind| *kind == kind::UNKNOWN);
                id.map(|id| self.tokens[id].as_str())
            }
        };
        let vocabulary = self.vocabulary(spell);
        let merges = self.merges_by_score(&vocabulary, &scores)?;
        let has_bytes = self.kinds.contains(&kind::BYTE);
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added_tokens(spell),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.template(adds_bos.unwrap_or(true))?,
            "decoder": { "type": "Sequence", "decoders": decoders },
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": unknown,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": true,
                "byte_fallback": has_bytes,
                "ignore_merges": false,
                "merges": merges,
                "vocab": vocabulary,
            },
        }))
    }

    /// Finds the merges of a SentencePiece vocabulary, as transformers does: each way to cut a token into two tokens, the
    /// highest score first. Tokens that SentencePiece did not learn count as score 0.
    fn merges_by_score(
        &self,
        vocabulary: &Map<String, Value>,
        scores: &[f64],
    ) -> Result<Vec<Value>, Error> {
        struct Merge<'a> {
            score: f64,
            left: &'a str,
            right: &'a str,
        }
        let ids: HashMap<&str, u64> = vocabulary
            .iter()
            .map(|(token, id)| (token.as_str(), id.as_u64().unwrap_or_default()))
            .collect();
        let mut merges = Vec::new();
        for (token, id) in vocabulary {
            if token.len() > GGUF_TOKEN_BYTES {
                let what = format!(
                    "token {id} has {} bytes, more than {GGUF_TOKEN_BYTES}",
                    token.len()
                );
                return Err(self.file.broken(what));
            }
            let id = id.as_u64().unwrap_or_default() as usize;
            let score = match self.kinds[id] {
                kind::NORMAL => scores[id],
                _ => 0.0,
            };
            let mut cuts: Vec<(u64, u64, Merge<'_>)> = Vec::new();
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(first), Some(second)) = (ids.get(left), ids.get(right)) {
                    cuts.push((*first, *second, Merge { score, left, right }));
                }
            }
            cuts.sort_by_key(|cut| (cut.0, cut.1));
            merges.extend(cuts.into_iter().map(|cut| cut.2));
        }
        merges.sort_by(|a, b| {
            let lengths = |merge: &Merge<'_>| {
                Reverse((merge.left.chars().count(), merge.right.chars().count()))
            };
            b.score
                .total_cmp(&a.score)
                .then_with(|| lengths(a).cmp(&lengths(b)))
        });
        let pair = |merge: &Merge<'_>| json!([merge.left, merge.right]);
        Ok(merges.iter().map(pair).collect())
    }

    /// The tokens that have a text and their ids; of two equal tokens the first counts.
    fn vocabulary(&self, spell: impl Fn(i32, &str) -> String) -> Map<String, Value> {
        let mut out = Map::new();
        for (id, (token, kind)) in self.tokens.iter().zip(&self.kinds).enumerate() {
            if *kind != kind::UNUSED {
                out.entry(spell(*kind, token)).or_insert_with(|| json!(id));
            }
        }
        out
    }

    fn added_tokens(&self, spell: impl Fn(i32, &str) -> String) -> Vec<Value> {
        let tokens = self.tokens.iter().zip(&self.kinds).enumerate();
        let added = tokens.filter(|(_, (_, kind))| {
            matches!(**kind, kind::CONTROL | kind::USER_DEFINED | kind::UNKNOWN)
        });
        added
            .map(|(id, (token, kind))| {
                json!({
                    "id": id,
                    "content": spell(*kind, token),
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": false,
                    "normalized": false,
                    "special": *kind != kind::USER_DEFINED,
                })
            })
            .collect()
    }

    /// The `post_processor` that puts BOS and EOS around a text, or null if it adds neither.
    fn template(&self, adds_bos: bool) -> Result<Value, Error> {
        let adds_eos = self.file.flag("tokenizer.ggml.add_eos_token")?;
        let bos = match adds_bos {
            true => self.special("bos_token_id")?,
            false => None,
        };
        let eos = match adds_eos.unwrap_or(false) {
            true => self.special("eos_token_id")?,
            false => None,
        };
        if bos.is_none() && eos.is_none() {
            return Ok(Value::Null);
        }
        let around = |sequence: &str, number: u32| {
            let token = |(_, token): &(usize, &str)| json!({ "SpecialToken": { "id": token, "type_id": number } });
            let text = json!({ "Sequence": { "id": sequence, "type_id": number } });
            let parts = bos.iter().map(token).chain([text]);
            parts.chain(eos.iter().map(token)).collect::<Vec<_>>()
        };
        let (single, second) = (around("A", 0), around("B", 1));
        let pair = [single.clone(), second].concat();
        let mut special_tokens = Map::new();
        for (id, token) in bos.iter().chain(&eos) {
            let entry = json!({ "id": token, "ids": [id], "tokens": [token] });
            special_tokens.insert((*token).to_owned(), entry);
        }
        Ok(json!({
            "type": "TemplateProcessing",
            "pair": pair,
            "single": single,
            "special_tokens": special_tokens,
        }))
    }
}
