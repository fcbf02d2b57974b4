//! A tokenizer in Hugging Face layout: text to ids and back, and what each id spells.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Error;
use crate::token_bytes::TokenBytes;

/// The special tokens that a chat template can name. `None` is undefined there, as in transformers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of sequence.
    pub bos: Option<String>,
    /// End of sequence. Which ids end a sequence is [`Tokenizer::eos_ids`], not this.
    pub eos: Option<String>,
    /// Unknown text.
    pub unk: Option<String>,
    /// Padding.
    pub pad: Option<String>,
}

/// The tokenizer of a model's folder.
///
/// Ids are those of transformers' fast tokenizers: the same library reads the same file.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bytes: TokenBytes,
    special: SpecialTokens,
    eos_ids: Vec<u32>,
    fingerprint: String,
    /// What has to be taken off the front of "\n" + text to encode a text that goes on from another;
    /// empty where the tokenizer does not put a space in front of a text.
    newline_ids: Vec<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` (required) and `tokenizer_config.json` (special tokens) of a folder.
    /// The ids that end a sequence come from `generation_config.json`, else `config.json`, else the
    /// `eos_token` of `tokenizer_config.json`; they can be none.
    ///
    /// # Errors
    /// A missing or broken file, a vocabulary whose tokens cannot be spelled as bytes, an end of
    /// sequence that is not in the vocabulary: each names the file.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let Some(text) = read_optional(&path)? else {
            return Err(Error::TokenizerMissing {
                folder: dir.to_owned(),
            });
        };
        let json = parse(&path, &text)?;
        let content = |reason: String| Error::TokenizerContent {
            path: path.clone(),
            reason,
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(&text)
            .map_err(|error| content(format!("it does not describe a tokenizer: {error}")))?;
        // Some files carry the settings of the last call, which are not the tokenizer's.
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
        let eos_ids = eos_ids(dir, &inner, &special)?;
        let fingerprint = bytes.fingerprint(&json, &added);
        let mut tokenizer = Self {
            inner,
            bytes,
            special,
            eos_ids,
            fingerprint,
            newline_ids: Vec::new(),
        };
        let spelled: Vec<u8> = tokenizer
            .encode("a", false)?
            .iter()
            .flat_map(|&id| tokenizer.token_bytes(id))
            .collect();
        if spelled != b"a" {
            tokenizer.newline_ids = tokenizer.encode("\n", false)?;
        }
        Ok(tokenizer)
    }

    /// The ids of a text, with or without the special tokens that the tokenizer puts around it.
    /// Special tokens that the text spells are encoded as such. An empty text may give no ids.
    ///
    /// # Errors
    /// [`Error::Tokenize`] where the model cannot encode the text (no unknown token, for instance).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|source| Error::Tokenize {
                action: format!("encode the text {:?}", excerpt(text)),
                source,
            })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a text that goes on from another one. SentencePiece tokenizers put a space in front
    /// of every text; here they must not.
    pub(crate) fn encode_continuation(&self, text: &str) -> Result<Vec<u32>, Error> {
        if self.newline_ids.is_empty() {
            return self.encode(text, false);
        }
        let ids = self.encode(&format!("\n{text}"), false)?;
        match ids.strip_prefix(self.newline_ids.as_slice()) {
            Some(ids) => Ok(ids.to_vec()),
            // The newline has merged with what follows.
            None => self.encode(text, false),
        }
    }

    /// The text of the ids, with or without special tokens. Bytes that are not UTF-8 come out as U+FFFD;
    /// [`token_bytes`](Self::token_bytes) has them as they are.
    ///
    /// # Errors
    /// [`Error::Tokenize`] where the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|source| Error::Tokenize {
                action: format!("decode {} ids", ids.len()),
                source,
            })
    }

    /// The bytes that a token adds inside a text; none for an id that is not in the vocabulary.
    ///
    /// End to end, the bytes of a text's ids are the text, after the tokenizer's normalisation and with
    /// the space that SentencePiece puts in front.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.bytes.get(id).to_vec()
    }

    /// Largest id + 1, added tokens included. A model's embedding may have more rows, never fewer.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// The ids that end a sequence, sorted; empty if the folder names none.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The token that begins a sequence, as `tokenizer_config.json` spells it.
    pub fn bos_token(&self) -> Option<&str> {
        self.special.bos.as_deref()
    }

    /// The special tokens of `tokenizer_config.json`.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// SHA-256 in hexadecimal over id → bytes, merges and added tokens. Two tokenizers with the same
    /// fingerprint agree about every id, however their files are written.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The text of an added token; `None` for all others.
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

/// The first characters of a text, for a message.
fn excerpt(text: &str) -> String {
    let mut short: String = text.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// The text of a file, or `None` if it does not exist.
pub(crate) fn read_optional(path: &Path) -> Result<Option<String>, Error> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

fn parse(path: &Path, text: &str) -> Result<Value, Error> {
    serde_json::from_str(text).map_err(|source| Error::TokenizerJson {
        path: path.to_owned(),
        source,
    })
}

/// The JSON in a file of a folder with the file's path, or `None` if there is no such file.
pub(crate) fn read_json(dir: &Path, name: &str) -> Result<Option<(PathBuf, Value)>, Error> {
    let path = dir.join(name);
    match read_optional(&path)? {
        Some(text) => parse(&path, &text).map(|json| Some((path, json))),
        None => Ok(None),
    }
}

fn special_tokens(dir: &Path) -> Result<SpecialTokens, Error> {
    let Some((path, json)) = read_json(dir, "tokenizer_config.json")? else {
        return Ok(SpecialTokens::default());
    };
    // A token is a string, or an object that says more about it.
    let token = |key: &str| match &json[key] {
        Value::Null => Ok(None),
        Value::String(content) => Ok(Some(content.clone())),
        Value::Object(token) if token.get("content").is_some_and(Value::is_string) => {
            Ok(token["content"].as_str().map(str::to_owned))
        }
        other => Err(Error::TokenizerContent {
            path: path.clone(),
            reason: format!(
                "`{key}` has to be a string or an object with `content`, and is {other}"
            ),
        }),
    };
    Ok(SpecialTokens {
        bos: token("bos_token")?,
        eos: token("eos_token")?,
        unk: token("unk_token")?,
        pad: token("pad_token")?,
    })
}

fn eos_ids(
    dir: &Path,
    inner: &tokenizers::Tokenizer,
    special: &SpecialTokens,
) -> Result<Vec<u32>, Error> {
    for name in ["generation_config.json", "config.json"] {
        let Some((path, json)) = read_json(dir, name)? else {
            continue;
        };
        let values = match &json["eos_token_id"] {
            Value::Null => continue,
            Value::Array(values) => values.clone(),
            value => vec![value.clone()],
        };
        let mut ids = Vec::new();
        for value in values {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            let Some(id) = id.filter(|&id| inner.id_to_token(id).is_some()) else {
                return Err(Error::TokenizerContent {
                    path,
                    reason: format!(
                        "`eos_token_id` {value} is not an id of the vocabulary in tokenizer.json"
                    ),
                });
            };
            ids.push(id);
        }
        ids.sort_unstable();
        ids.dedup();
        return Ok(ids);
    }
    let Some(eos) = &special.eos else {
        return Ok(Vec::new());
    };
    match inner.token_to_id(eos) {
        Some(id) => Ok(vec![id]),
        None => Err(Error::TokenizerContent {
            path: dir.join("tokenizer_config.json"),
            reason: format!("`eos_token` {eos:?} is not in the vocabulary of tokenizer.json"),
        }),
    }
}
