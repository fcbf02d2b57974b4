//! The ids that end a sequence, from the three files that may name them.

use std::path::Path;

use serde_json::Value;

use crate::error::Error;
use crate::model_files::{read_json, unusable};

/// The ids that end a sequence according to one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EosSource {
    /// Name of the file, such as `generation_config.json`.
    pub file: &'static str,
    /// The ids, sorted.
    pub ids: Vec<u32>,
}

/// Reads what the files of a folder say; files that say nothing are left out.
///
/// `eos_token_id` of `generation_config.json` and `config.json`, and `eos_token` of `tokenizer_config.json`, may each name
/// only a part of the tokens: Llama 3.1 has three, of which the tokenizer names one. An id that is not in the vocabulary
/// is an error in the first file, and is left out of a later one, which may have been copied from another model.
pub(super) fn sources(
    dir: &Path,
    tokenizer: &tokenizers::Tokenizer,
    eos_token: Option<&str>,
) -> Result<Vec<EosSource>, Error> {
    let mut sources: Vec<EosSource> = Vec::new();
    for file in ["generation_config.json", "config.json"] {
        let Some((path, json)) = read_json(dir, file)? else {
            continue;
        };
        check_type(&path, &json)?;
        for key in ["bos_token_id", "pad_token_id"] {
            check_id(&path, &json, key, tokenizer)?;
        }
        let values = match &json["eos_token_id"] {
            Value::Null => continue,
            Value::Array(values) if values.is_empty() => {
                return Err(wrong_id(&path, "`eos_token_id` [] names no token"));
            }
            Value::Array(values) => values.clone(),
            value => vec![value.clone()],
        };
        let mut ids = Vec::new();
        for value in values {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            match id.filter(|&id| tokenizer.id_to_token(id).is_some()) {
                Some(id) => ids.push(id),
                None if !sources.is_empty() && may_be_of_another_model(&json, &value) => {}
                None => {
                    let problem = format!(
                        "`eos_token_id` {value} is not an id of the vocabulary in tokenizer.json"
                    );
                    return Err(wrong_id(&path, &problem));
                }
            }
        }
        ids.sort_unstable();
        ids.dedup();
        if !ids.is_empty() {
            sources.push(EosSource { file, ids });
        }
    }
    if let Some(eos) = eos_token {
        let file = "tokenizer_config.json";
        match tokenizer.token_to_id(eos) {
            Some(id) => sources.push(EosSource {
                file,
                ids: vec![id],
            }),
            None if !sources.is_empty() => {}
            None => {
                let problem =
                    format!("`eos_token` {eos:?} is not in the vocabulary of tokenizer.json");
                return Err(unusable(&dir.join(file), &problem));
            }
        }
    }
    Ok(sources)
}

/// Whether an id that the tokenizer does not have is at least an id, and not beyond the rows that the same file names.
fn may_be_of_another_model(json: &Value, id: &Value) -> bool {
    let rows = json["vocab_size"].as_u64().unwrap_or(1 << 32);
    id.as_u64().is_some_and(|id| id < rows)
}

/// Checks that a file is a table.
fn check_type(path: &Path, json: &Value) -> Result<(), Error> {
    match json.is_object() {
        true => Ok(()),
        false => Err(unusable(path, "it must be a table")),
    }
}

/// Checks that a key is absent, or an id of the vocabulary or of a row that pads the embedding. Some released files have
/// -1 for a token that they do not have.
fn check_id(
    path: &Path,
    json: &Value,
    key: &str,
    tokenizer: &tokenizers::Tokenizer,
) -> Result<(), Error> {
    let value = &json[key];
    let rows = json["vocab_size"].as_u64().unwrap_or_default();
    let known = |id: u64| {
        let token = u32::try_from(id)
            .ok()
            .and_then(|id| tokenizer.id_to_token(id));
        token.is_some() || id < rows
    };
    match value.is_null() || value.as_i64() == Some(-1) || value.as_u64().is_some_and(known) {
        true => Ok(()),
        false => {
            let problem =
                format!("`{key}` {value} is not an id of the vocabulary in tokenizer.json");
            Err(wrong_id(path, &problem))
        }
    }
}

/// Returns the ids of all files, sorted.
pub(super) fn union(sources: &[EosSource]) -> Vec<u32> {
    let mut ids: Vec<u32> = sources.iter().flat_map(|s| s.ids.iter().copied()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Returns the error for an id that no token has.
fn wrong_id(path: &Path, problem: &str) -> Error {
    let hint = "compare the file with the one that was published with the model";
    Error::invalid(format!("{}: {problem}", path.display()), hint)
}
