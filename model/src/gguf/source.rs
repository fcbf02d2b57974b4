//! The folder that an export is made from: its JSON files and their keys.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Error;

/// The `config.json` of a folder.
pub(super) struct SourceConfig {
    dir: PathBuf,
    keys: Value,
}

const OTHER_FORMAT: &str =
    "export this model as safetensors (`format = \"safetensors\"` in [export])";

impl SourceConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or is not JSON.
    pub(super) fn open(dir: &Path) -> Result<Self, Error> {
        let keys = read_json(dir, "config.json")?.unwrap_or(Value::Null);
        let config = Self {
            dir: dir.to_path_buf(),
            keys,
        };
        match config.keys.is_object() {
            true => Ok(config),
            false => Err(config.refused("it has no config.json".to_owned())),
        }
    }

    /// The folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the value of a key; `null` counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    /// Reads a whole number.
    pub(super) fn count(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let count = value.as_u64().and_then(|count| u32::try_from(count).ok());
        match count {
            Some(count) => Ok(Some(count as usize)),
            None => Err(self.wrong(key, "a whole number")),
        }
    }

    /// Reads a whole number that must be there.
    pub(super) fn required(&self, key: &str) -> Result<usize, Error> {
        let count = self.count(key)?.filter(|count| *count > 0);
        count.ok_or_else(|| self.wrong(key, "a whole number above 0"))
    }

    /// Reads a number.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let number = value.as_f64();
        number.map(Some).ok_or_else(|| self.wrong(key, "a number"))
    }

    /// Whether a flag is set.
    pub(super) fn flag(&self, key: &str) -> bool {
        self.get(key).and_then(Value::as_bool) == Some(true)
    }

    /// Reads a text.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    /// The type of the model.
    pub(super) fn model_type(&self) -> &str {
        self.text("model_type").unwrap_or_default()
    }

    /// The width of a head.
    pub(super) fn head_width(&self) -> Result<usize, Error> {
        let heads = self.required("num_attention_heads")?;
        let own = self.count("head_dim")?;
        // Qwen 3 has a default of its own.
        let default = match self.model_type() {
            "qwen3" => 128,
            _ => self.required("hidden_size")? / heads,
        };
        Ok(own.unwrap_or(default))
    }

    /// Makes the error about a key that has another value than its meaning requires.
    pub(super) fn wrong(&self, key: &str, what: &str) -> Error {
        let found = self
            .keys
            .get(key)
            .map_or("absent".to_owned(), Value::to_string);
        self.refused(format!(
            "`{key}` in config.json is {found}, but must be {what}"
        ))
    }

    /// Makes the error about a key whose value llama.cpp does not have.
    pub(super) fn unsupported(&self, key: &str) -> Error {
        let found = self
            .keys
            .get(key)
            .map_or("absent".to_owned(), Value::to_string);
        self.refused(format!(
            "llama.cpp has no {} models whose `{key}` in config.json is {found}",
            self.model_type()
        ))
    }

    /// Makes an error about this folder.
    pub(super) fn refused(&self, what: String) -> Error {
        Error::NoGguf {
            dir: self.dir.clone(),
            what,
            hint: OTHER_FORMAT,
        }
    }
}

/// Reads a JSON file of a folder; `None` if it does not exist.
pub(super) fn read_json(dir: &Path, name: &'static str) -> Result<Option<Value>, Error> {
    let path = dir.join(name);
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(Error::io("read", &path))?,
    };
    match serde_json::from_str(&text) {
        Ok(value) => Ok(Some(value)),
        Err(source) => Err(Error::Json {
            path,
            what: "checkpoint",
            source,
        }),
    }
}
