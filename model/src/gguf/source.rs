//! The folder that an export is made from: its JSON files and their keys.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::keys::Keys;
use crate::{Config, Error};

/// A folder and its configuration.
pub(super) struct ExportSource {
    dir: PathBuf,
    path: PathBuf,
    config: Config,
}

const OTHER_FORMAT: &str =
    "export this model as safetensors (`format = \"safetensors\"` in [export])";

impl ExportSource {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// Returns the errors of [`Config::from_dir`].
    pub(super) fn open(dir: &Path) -> Result<Self, Error> {
        Ok(Self {
            dir: dir.to_path_buf(),
            path: dir.join("config.json"),
            config: Config::from_dir(dir)?,
        })
    }

    /// The folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The configuration.
    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// The keys of the configuration.
    pub(super) fn keys(&self) -> Keys<'_> {
        Keys::new(&self.path, self.config.keys())
    }

    /// Reads a whole number that must be there, and above 0.
    pub(super) fn count(&self, key: &'static str) -> Result<usize, Error> {
        self.keys().count(key, None)
    }

    /// Makes the error about a key whose value llama.cpp does not have.
    pub(super) fn unsupported(&self, key: &str) -> Error {
        let found = self.config.keys().get(key);
        self.refused(format!(
            "llama.cpp has no {} models whose `{key}` in config.json is {}",
            self.config.model_type(),
            found.map_or("absent".to_owned(), Value::to_string)
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
