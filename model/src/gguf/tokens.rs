//! The metadata of an export that describe the tokenizer, from `tokenizer.json` and `tokenizer_config.json`.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::pre_tokenizer::PreTokenizer;
use super::source::{ExportSource, read_json};
use super::tokenizer::kind;
use super::write::{Metadata, Value};
use crate::Error;

/// The tokenizer of a folder.
struct SourceTokenizer<'a> {
    source: &'a ExportSource,
    /// `tokenizer.json`
    json: Json,
    /// `tokenizer_config.json`
    settings: Json,
    tokens: Vec<String>,
    kinds: Vec<i32>,
}

/// Reads the metadata of the tokenizer of a folder for an embedding of `rows` rows.
///
/// # Errors
/// Returns an error for an absent `tokenizer.json`, and for one that llama.cpp cannot represent.
pub(super) fn tokenizer_metadata(source: &ExportSource, rows: usize) -> Result<Metadata, Error> {
    let Some(json) = read_json(source.dir(), "tokenizer.json")? else {
        return Err(source.refused("it has no tokenizer.json".to_owned()));
    };
    let settings = read_json(source.dir(), "tokenizer_config.json")?;
    let mut tokenizer = SourceTokenizer {
        source,
        json,
        settings: settings.unwrap_or(Json::Null),
        tokens: (0..rows).map(|id| format!("[PAD{id}]")).collect(),
        kinds: vec![kind::UNUSED; rows],
    };
    if tokenizer.json["model"]["type"] != "BPE" {
        return Err(tokenizer.refused("`model`"));
    }
    let is_sentence_piece = tokenizer.json["model"]["byte_fallback"] == true;
    tokenizer.read_tokens(is_sentence_piece)?;
    let mut out = match is_sentence_piece {
        true => tokenizer.sentence_piece()?,
        false => tokenizer.byte_level()?,
    };
    out.extend(tokenizer.special_tokens()?);
    if let Some(template) = tokenizer.chat_template()? {
        let key = "tokenizer.chat_template".to_owned();
        out.push((key, Value::Text(template)));
    }
    Ok(out)
}

impl SourceTokenizer<'_> {
    /// Reads the text and the kind of each id. Ids without a row in the embedding are left out if they are added tokens.
    fn read_tokens(&mut self, is_sentence_piece: bool) -> Result<(), Error> {
        let Some(vocabulary) = self.json["model"]["vocab"].as_object() else {
            return Err(self.refused("`model.vocab`"));
        };
        let unknown = self.json["model"]["unk_token"].as_str();
        for (token, id) in vocabulary {
            let id = id.as_u64().unwrap_or(u64::MAX) as usize;
            let Some(slot) = self.tokens.get_mut(id) else {
                let what = format!(
                    "the token {token:?} of tokenizer.json has the id {id}, but the embedding has {} rows",
                    self.kinds.len()
                );
                return Err(self.source.refused(what));
            };
            slot.clone_from(token);
            self.kinds[id] = match is_sentence_piece {
                true if is_byte(token) => kind::BYTE,
                true if Some(token.as_str()) == unknown => kind::UNKNOWN,
                _ => kind::NORMAL,
            };
        }
        for added in self.json["added_tokens"].as_array().into_iter().flatten() {
            let id = added["id"].as_u64().unwrap_or(u64::MAX) as usize;
            let (Some(content), Some(slot)) = (added["content"].as_str(), self.tokens.get_mut(id))
            else {
                continue;
            };
            let is_control = added["special"] == true || looks_special(content);
            *slot = match is_sentence_piece && !is_control {
                // llama.cpp compares user-defined tokens with the text before spaces are replaced.
                true => content.replace('▁', " "),
                false => content.to_owned(),
            };
            self.kinds[id] = match self.kinds[id] {
                kind::UNKNOWN => kind::UNKNOWN,
                _ if is_control => kind::CONTROL,
                _ => kind::USER_DEFINED,
            };
        }
        Ok(())
    }

    fn byte_level(&mut self) -> Result<Metadata, Error> {
        let Some(splitting) = PreTokenizer::of(&self.json) else {
            return Err(self.refused("`pre_tokenizer` or `normalizer`"));
        };
        let mut merges = Vec::new();
        for (left, right) in self.merges()? {
            let spell = |part: &str| part.replace(' ', "Ġ");
            merges.push(format!("{} {}", spell(left), spell(right)));
        }
        Ok(vec![
            entry("model", Value::Text("gpt2".to_owned())),
            entry("pre", Value::Text(splitting.name().to_owned())),
            entry("tokens", Value::Texts(std::mem::take(&mut self.tokens))),
            entry("token_type", Value::Counts(std::mem::take(&mut self.kinds))),
            entry("merges", Value::Texts(merges)),
        ])
    }

    /// Describes a tokenizer that merges characters with `▁` for spaces. Its order of merges becomes scores: llama.cpp
    /// merges the pair whose token has the highest score.
    fn sentence_piece(&mut self) -> Result<Metadata, Error> {
        let has_prefix = self.has_space_prefix()?;
        let merges = self.merges()?;
        let last = -(merges.len() as f32) - 1.0;
        let mut ranks: HashMap<String, usize> = HashMap::new();
        for (rank, (left, right)) in merges.iter().enumerate() {
            ranks.entry(format!("{left}{right}")).or_insert(rank);
        }
        let score = |token: &String| ranks.get(token).map_or(last, |rank| -(*rank as f32));
        let scores = self.tokens.iter().map(score).collect();
        Ok(vec![
            entry("model", Value::Text("llama".to_owned())),
            entry("pre", Value::Text("default".to_owned())),
            entry("tokens", Value::Texts(std::mem::take(&mut self.tokens))),
            entry("scores", Value::Numbers(scores)),
            entry("token_type", Value::Counts(std::mem::take(&mut self.kinds))),
            entry("add_space_prefix", Value::Flag(has_prefix)),
        ])
    }

    /// Whether a space is put in front of a text. Spaces become `▁` by a normalizer or by the splitting `Metaspace`.
    fn has_space_prefix(&self) -> Result<bool, Error> {
        let normalizer = &self.json["normalizer"];
        let steps = match normalizer["normalizers"].as_array() {
            Some(steps) => steps.as_slice(),
            None if normalizer.is_null() => &[],
            None => std::slice::from_ref(normalizer),
        };
        let mut has_prefix = false;
        let mut has_sign = false;
        for step in steps {
            match step["type"].as_str() {
                Some("Prepend") if step["prepend"] == "▁" => has_prefix = true,
                Some("Replace") if step["pattern"]["String"] == " " && step["content"] == "▁" => {
                    has_sign = true;
                }
                _ => return Err(self.refused("`normalizer`")),
            }
        }
        let splitting = &self.json["pre_tokenizer"];
        match splitting["type"].as_str() {
            None if has_sign => Ok(has_prefix),
            // The normalizer leaves no space to split at.
            Some("Split") if has_sign && splitting["pattern"]["String"] == " " => Ok(has_prefix),
            Some("Metaspace") if !has_sign && splitting["split"] != true => {
                let scheme = splitting["prepend_scheme"].as_str();
                let prefix = scheme.map(|scheme| scheme != "never");
                Ok(prefix.unwrap_or(splitting["add_prefix_space"] != false))
            }
            _ => Err(self.refused("`pre_tokenizer`")),
        }
    }

    /// The pairs of `model.merges`, in both forms of the file.
    fn merges(&self) -> Result<Vec<(&str, &str)>, Error> {
        let Some(merges) = self.json["model"]["merges"].as_array() else {
            return Err(self.refused("`model.merges`"));
        };
        let pairs: Option<Vec<_>> = merges.iter().map(pair).collect();
        pairs.ok_or_else(|| self.refused("`model.merges`"))
    }

    /// The ids of special tokens, and whether BOS and EOS are put around a text.
    fn special_tokens(&self) -> Result<Metadata, Error> {
        let (before, behind) = self.around();
        let mut ends = self.ids("eos_token_id")?;
        let mut out = Vec::new();
        let mut put = |name: &str, id: Option<u32>| {
            out.extend(id.map(|id| entry(name, Value::Count(id))));
        };
        let own = |name: &str| self.id_of(&self.settings[name]);
        let first = |ids: Vec<u32>| ids.first().copied();
        let bos = before.or(own("bos_token"));
        put("bos_token_id", bos.or(first(self.ids("bos_token_id")?)));
        let eos = behind.or(own("eos_token")).or(ends.first().copied());
        put("eos_token_id", eos);
        ends.retain(|id| Some(*id) != eos);
        put("eot_token_id", ends.first().copied());
        let unknown = self.id_of(&self.json["model"]["unk_token"]);
        put("unknown_token_id", unknown.or(own("unk_token")));
        put(
            "padding_token_id",
            own("pad_token").or(first(self.ids("pad_token_id")?)),
        );
        out.push(entry("add_bos_token", Value::Flag(before.is_some())));
        out.push(entry("add_eos_token", Value::Flag(behind.is_some())));
        Ok(out)
    }

    /// The ids of the tokens that the post-processor puts before and behind a text.
    fn around(&self) -> (Option<u32>, Option<u32>) {
        let own = std::slice::from_ref(&self.json["post_processor"]);
        let steps = self.json["post_processor"]["processors"].as_array();
        let steps = steps.map_or(own, Vec::as_slice);
        let template = steps
            .iter()
            .find(|step| step["type"] == "TemplateProcessing");
        let Some(single) = template.and_then(|template| template["single"].as_array()) else {
            return (None, None);
        };
        let id = |part: Option<&Json>| self.id_of(&part?["SpecialToken"]["id"]);
        (id(single.first()), id(single.last()))
    }

    /// Returns the id of a token that is named by its text, or by a table with its `content`.
    fn id_of(&self, token: &Json) -> Option<u32> {
        let content = token.as_str().or(token["content"].as_str())?;
        let mut added = self.json["added_tokens"].as_array().into_iter().flatten();
        let added = added.find(|added| added["content"] == content);
        let id = added.map_or(&self.json["model"]["vocab"][content], |added| &added["id"]);
        id.as_u64().and_then(|id| u32::try_from(id).ok())
    }

    /// The ids of a key of `generation_config.json` or `config.json`.
    fn ids(&self, key: &str) -> Result<Vec<u32>, Error> {
        let generation = read_json(self.source.dir(), "generation_config.json")?;
        let own = generation
            .as_ref()
            .and_then(|generation| generation.get(key));
        let Some(value) = own
            .filter(|own| !own.is_null())
            .or(self.source.config().keys().get(key))
        else {
            return Ok(Vec::new());
        };
        let ids = value
            .as_array()
            .map_or(std::slice::from_ref(value), Vec::as_slice);
        let id = |id: &Json| id.as_u64().and_then(|id| u32::try_from(id).ok());
        Ok(ids.iter().filter_map(id).collect())
    }

    fn chat_template(&self) -> Result<Option<String>, Error> {
        let path = self.source.dir().join("chat_template.jinja");
        if path.exists() {
            let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
            return Ok(Some(text));
        }
        let own = &self.settings["chat_template"];
        let mut named = own.as_array().into_iter().flatten();
        let default = named.find(|template| template["name"] == "default");
        let text = default.map_or(own, |template| &template["template"]);
        Ok(text.as_str().map(str::to_owned))
    }

    fn refused(&self, what: &str) -> Error {
        let what = format!("llama.cpp is not known to have the {what} of tokenizer.json");
        self.source.refused(what)
    }
}

/// Reads a merge, which is "a b" in older files and ["a", "b"] in newer ones.
fn pair(merge: &Json) -> Option<(&str, &str)> {
    match merge {
        Json::String(pair) => pair.split_once(' '),
        pair => Some((pair[0].as_str()?, pair[1].as_str()?)),
    }
}

fn entry(name: &str, value: Value) -> (String, Value) {
    (format!("tokenizer.ggml.{name}"), value)
}

/// Whether a token stands for a byte, such as `<0x0A>`.
fn is_byte(token: &str) -> bool {
    let digits = token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Whether a token is a control token although its file does not say so: the rule of llama.cpp's converter.
fn looks_special(token: &str) -> bool {
    let encloses = |start: &str, end: &str| token.starts_with(start) && token.ends_with(end);
    matches!(token, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || encloses("<|", "|>")
        || encloses("<｜", "｜>")
        || encloses("<unused", ">")
}
