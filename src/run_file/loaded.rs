//! Reading a run file, and pointing into it later.

use std::path::{Path, PathBuf};

use super::place::{ConfigError, Problem};
use super::ranges::RunPath;
use super::{RunFile, rules};

/// A run file with its place, so that what is found wrong later can still point into it.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What it says.
    pub file: RunFile,
    /// Where it lies, as given.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
}

impl Loaded {
    /// Reads and checks a run file.
    ///
    /// # Errors
    /// When it cannot be read, is not TOML, or breaks a rule: each problem with line,
    /// column and the way out.
    pub fn read(path: &Path) -> Result<Loaded, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            ConfigError::plain(format!(
                "cannot read the run file {}: {e}; `potstill run FILE` takes the path of a TOML file",
                path.display()
            ))
        })?;
        let file = parse(path, &text)?;
        Ok(Loaded {
            file,
            path: path.to_owned(),
            text,
        })
    }

    /// A path of the run file; relative ones are below its folder.
    pub fn resolve(&self, path: &RunPath) -> PathBuf {
        path.resolve(self.path.parent().unwrap_or(Path::new("")))
    }

    /// An error that points at a key, such as `["import", "path"]`.
    pub fn problem(&self, key: &[&str], message: impl Into<String>) -> ConfigError {
        let problem = Problem::at_key(&self.text, key, message.into());
        ConfigError::new(&self.path, &self.text, vec![problem])
    }
}

/// Parses the text of the run file at `path`, which is only named in errors.
///
/// # Errors
/// See [`Loaded::read`].
pub fn parse(path: &Path, text: &str) -> Result<RunFile, ConfigError> {
    if text.trim_start().starts_with(['{', '<']) {
        return Err(ConfigError::plain(format!(
            "{} is not a run file, which is TOML: `potstill init --data {}` writes one if it is your data",
            path.display(),
            path.display()
        )));
    }
    let file: RunFile = toml::from_str(text)
        .map_err(|e| ConfigError::new(path, text, vec![Problem::from_toml(text, &e)]))?;
    let problems = rules::broken(&file, text);
    if problems.is_empty() {
        Ok(file)
    } else {
        Err(ConfigError::new(path, text, problems))
    }
}
