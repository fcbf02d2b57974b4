//! Text and JSON files of a model's folder.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::Error;
use crate::limits::TOKENIZER_FILE_BYTES;

/// Reads the text of a regular file of at most [`TOKENIZER_FILE_BYTES`]; `None` if the file does not exist.
pub(crate) fn read_optional(path: &Path) -> Result<Option<String>, Error> {
    match path.exists() {
        true => read_text(path, TOKENIZER_FILE_BYTES).map(Some),
        false => Ok(None),
    }
}

/// Reads the text of a regular file of at most `limit` bytes. A pipe or a device could be read without end.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] for anything but a regular file, and for a file above the limit.
pub fn read_text(path: &Path, limit: u64) -> Result<String, Error> {
    let metadata = std::fs::metadata(path).map_err(Error::io("read", path))?;
    if !metadata.is_file() {
        let problem = format!("{} is not a regular file", path.display());
        return Err(Error::invalid(problem, "name a file, or a link to one"));
    }
    if metadata.len() > limit {
        let bytes = metadata.len();
        let problem = format!(
            "{} has {bytes} bytes, and the limit is {limit}",
            path.display()
        );
        return Err(Error::invalid(problem, "check that it is the right file"));
    }
    std::fs::read_to_string(path).map_err(Error::io("read", path))
}

/// Parses the text of a JSON file.
pub(crate) fn parse(path: &Path, text: &str) -> Result<Value, Error> {
    serde_json::from_str(text).map_err(|error| {
        let problem = format!("{} is not valid JSON: {error}", path.display());
        Error::invalid(problem, "fetch the file again")
    })
}

/// Returns the error for a file whose content cannot be used.
pub(crate) fn unusable(path: &Path, problem: &str) -> Error {
    Error::invalid(format!("{}: {problem}", path.display()), "")
}

/// Reads a JSON file of a folder and returns it with its path; `None` if the file does not exist.
pub(crate) fn read_json(dir: &Path, name: &str) -> Result<Option<(PathBuf, Value)>, Error> {
    let path = dir.join(name);
    match read_optional(&path)? {
        Some(text) => parse(&path, &text).map(|json| Some((path, json))),
        None => Ok(None),
    }
}
