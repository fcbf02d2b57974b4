//! A tokenizer in Hugging Face layout: conversion between text and ids, and the bytes of each id.

mod bounds;
mod eos;

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

pub use self::eos::EosSource;
use crate::error::Error;
use crate::limits::TOKENIZER_TEXT_BYTES;
use crate::model_files::{parse, read_json, read_optional, unusable};
use crate::token_bytes::TokenBytes;

/// The special tokens that a chat template can name. A token that is `None` is undefined in the template, as in
/// transformers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of sequence.
    pub bos: Option<String>,
    /// End of sequence. The ids that end a sequence are [`Tokenizer::eos_ids`] and may differ from this token.
    pub eos: Option<String>,
    /// Unknown text.
    pub unk: Option<String>,
    /// Padding.
    pub pad: Option<String>,
}

/// The tokenizer of a model's folder.
///
/// Ids equal those of transformers' fast tokenizers, because the same library reads the same file.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bytes: TokenBytes,
    special: SpecialTokens,
    eos_ids: Vec<u32>,
    eos_sources: Vec<EosSource>,
    /// Id of the token that begins every text of the model, if there is one.
    leading_id: Option<u32>,
    /// Number of rows of the model's embedding, if it is smaller than the vocabulary.
    rows: Option<usize>,
    /// Most bytes of a text that is encoded.
    longest_text: u64,
    fingerprint: String,
    /// Ids of "\n", which are removed from the ids of "\n" + text to encode a text that continues another one. The list
    /// is empty if the tokenizer does not put a space in front of a text.
    newline_ids: Vec<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` (required) and `tokenizer_config.json` (special tokens) of a folder.
    /// The ids that end a sequence are those of `generation_config.json`, of `config.json`, and of the `eos_token` of
    /// `tokenizer_config.json` together; there may be none.
    ///
    /// # Errors
    /// [`Error::TokenizerMissing`], [`Error::Io`], and [`Error::Invalid`] for a broken file, a vocabulary whose tokens
    /// have no known bytes, or an EOS that is not in the vocabulary. Each names the file.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let Some(text) = read_optional(&path)? else {
            return Err(Error::TokenizerMissing {
                folder: dir.to_owned(),
            });
        };
        let json = parse(&path, &text)?;
        let content = |problem: String| unusable(&path, &problem);
        let growth = bounds::check(&json).map_err(content)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&text)
            .map_err(|error| content(format!("it does not describe a tokenizer: {error}")))?;
        // Some files contain padding and truncation settings of the program that saved them.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| content(error.to_string()))?;

        let added: HashMap<u32, (String, bool)> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .map(|(id, token)| (id, (token.content, token.special)))
            .collect();
        let bytes = TokenBytes::new(&json, &inner.get_vocab(true), &added).map_err(content)?;
        if bytes.len() == 0 {
            return Err(content("its vocabulary is empty".to_owned()));
        }
        let special = special_tokens(dir)?;
        let eos_sources = eos::sources(dir, &inner, special.eos.as_deref())?;
        let fingerprint = bytes.fingerprint(&json, &added);
        let mut tokenizer = Self {
            inner,
            bytes,
            special,
            eos_ids: eos::union(&eos_sources),
            eos_sources,
            leading_id: None,
            rows: None,
            longest_text: TOKENIZER_TEXT_BYTES / growth,
            fingerprint,
            newline_ids: Vec::new(),
        };
        let unable = |error: Error| content(error.to_string());
        let spelled: Vec<u8> = tokenizer
            .encode("a", false)
            .map_err(unable)?
            .iter()
            .flat_map(|&id| tokenizer.token_bytes(id))
            .collect();
        if spelled != b"a" {
            tokenizer.newline_ids = tokenizer.encode("\n", false).map_err(unable)?;
        }
        tokenizer.leading_id = tokenizer.find_leading_id(dir)?;
        Ok(tokenizer)
    }

    /// Returns the token that transformers puts in front of a text: what `add_bos_token` of `tokenizer_config.json` says,
    /// or else what the post-processor of `tokenizer.json` does.
    fn find_leading_id(&self, dir: &Path) -> Result<Option<u32>, Error> {
        let config = read_json(dir, "tokenizer_config.json")?;
        match config.and_then(|(_, json)| json["add_bos_token"].as_bool()) {
            Some(true) => {
                let bos = self.special.bos.as_deref();
                Ok(bos.and_then(|bos| self.inner.token_to_id(bos)))
            }
            Some(false) => Ok(None),
            None => {
                let (with, without) = (self.encode("a", true)?, self.encode("a", false)?);
                let added = with.len() > without.len() && with.first() != without.first();
                Ok(with.first().copied().filter(|_| added))
            }
        }
    }

    /// Returns the tokenizer for a model whose embedding has this number of rows. Ids beyond them must belong to added
    /// tokens, such as the placeholder of an image in a model for text; [`encode`](Self::encode) refuses a text with them.
    ///
    /// # Errors
    /// The first ordinary token that has no row, as `tokenizer.json` writes it.
    pub fn with_rows(mut self, rows: usize) -> Result<Self, String> {
        if rows >= self.bytes.len() {
            return Ok(self);
        }
        let is_ordinary =
            |id: &u32| !self.token_bytes(*id).is_empty() && self.added_token(*id).is_none();
        if let Some(id) = (rows as u32..self.bytes.len() as u32).find(is_ordinary) {
            return Err(self.inner.id_to_token(id).unwrap_or_default());
        }
        self.rows = Some(rows);
        Ok(self)
    }

    /// Encodes a text, with or without the special tokens that the tokenizer puts around it. Special tokens that the
    /// text contains are encoded as such. An empty text may have no ids.
    ///
    /// # Errors
    /// [`Error::Tokenize`] if the text cannot be encoded, for instance because there is no unknown token, and
    /// [`Error::Invalid`] if it has a token without a row in the model's embedding.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        if text.len() as u64 > self.longest_text {
            return Err(Error::invalid(
                format!(
                    "the text {:?} has {} bytes, and this tokenizer encodes at most {}",
                    excerpt(text),
                    text.len(),
                    self.longest_text
                ),
                "shorten the text, or remove it from the data",
            ));
        }
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|source| Error::Tokenize {
                action: format!("encode the text {:?}", excerpt(text)),
                source,
            })?;
        let ids = encoding.get_ids();
        let rows = self.rows.unwrap_or(usize::MAX);
        if let Some(id) = ids.iter().find(|id| **id as usize >= rows) {
            let token = self.added_token(*id).unwrap_or_default();
            return Err(Error::invalid(
                format!(
                    "the text {:?} has the token {token:?}, whose id {id} has no row in the model's embedding of {rows} rows",
                    excerpt(text)
                ),
                format!("remove {token:?} from the data"),
            ));
        }
        Ok(ids.to_vec())
    }

    /// Encodes a text that continues another one, without the space that SentencePiece tokenizers put in front of a text.
    pub(crate) fn encode_continuation(&self, text: &str) -> Result<Vec<u32>, Error> {
        if self.newline_ids.is_empty() {
            return self.encode(text, false);
        }
        let ids = self.encode(&format!("\n{text}"), false)?;
        match ids.strip_prefix(self.newline_ids.as_slice()) {
            Some(ids) => Ok(ids.to_vec()),
            // The line feed was merged with the text.
            None => self.encode(text, false),
        }
    }

    /// Decodes ids, with or without special tokens. Bytes that are not UTF-8 become U+FFFD;
    /// [`token_bytes`](Self::token_bytes) returns the bytes themselves.
    ///
    /// # Errors
    /// [`Error::Tokenize`] if the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|source| Error::Tokenize {
                action: format!("decode {} ids", ids.len()),
                source,
            })
    }

    /// Returns the bytes that a token adds inside a text; none for an id that is not in the vocabulary.
    ///
    /// The concatenated bytes of a text's ids are the text, after the tokenizer's normalisation and with the space that
    /// SentencePiece puts in front.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.bytes.get(id).to_vec()
    }

    /// Returns the largest id + 1, including added tokens, but without those that have no row in the model's embedding
    /// ([`with_rows`](Self::with_rows)). The embedding may have more rows, which pad it.
    pub fn vocab_size(&self) -> usize {
        let ids = self.bytes.len();
        self.rows.map_or(ids, |rows| rows.min(ids))
    }

    /// Returns the added tokens that have no row in the model's embedding, in the order of their ids.
    pub fn tokens_without_row(&self) -> Vec<String> {
        let beyond = self.vocab_size() as u32..self.bytes.len() as u32;
        beyond.filter_map(|id| self.added_token(id)).collect()
    }

    /// Returns the ids that end a sequence, sorted; the list is empty if the folder names none.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Returns what each file of the folder says about the ids that end a sequence, for the files that say something.
    pub fn eos_sources(&self) -> &[EosSource] {
        &self.eos_sources
    }

    /// Returns the id of the token that the tokenizer puts in front of every text, which is BOS; `None` if it puts none.
    /// A model whose texts all began with it needs it.
    pub fn leading_id(&self) -> Option<u32> {
        self.leading_id
    }

    /// Returns the token that begins a sequence, as written in `tokenizer_config.json`.
    pub fn bos_token(&self) -> Option<&str> {
        self.special.bos.as_deref()
    }

    /// Returns the special tokens of `tokenizer_config.json`.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// Returns the SHA-256, in hexadecimal, of the bytes of all ids, the merges and the added tokens. Two tokenizers with
    /// the same fingerprint agree about every id, even if their files are written differently.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Returns the text of an added token; `None` for other tokens.
    pub(crate) fn added_token(&self, id: u32) -> Option<String> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).map(|token| token.content.clone())
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("special", &self.special)
            .field("eos_ids", &self.eos_ids)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

/// Returns the first characters of a text for a message.
fn excerpt(text: &str) -> String {
    let mut short: String = text.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

fn special_tokens(dir: &Path) -> Result<SpecialTokens, Error> {
    let Some((path, json)) = read_json(dir, "tokenizer_config.json")? else {
        return Ok(SpecialTokens::default());
    };
    // A token is a string, or an object with further properties.
    let token = |key: &str| match &json[key] {
        Value::Null => Ok(None),
        Value::String(content) => Ok(Some(content.clone())),
        Value::Object(token) if token.get("content").is_some_and(Value::is_string) => {
            Ok(token["content"].as_str().map(str::to_owned))
        }
        other => {
            let problem =
                format!("`{key}` must be a string or an object with `content`, and is {other}");
            Err(unusable(&path, &problem))
        }
    };
    Ok(SpecialTokens {
        bos: token("bos_token")?,
        eos: token("eos_token")?,
        unk: token("unk_token")?,
        pad: token("pad_token")?,
    })
}
