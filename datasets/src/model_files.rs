//! Text and JSON files of a model's folder.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::Error;
use crate::limits::TOKENIZER_FILE_BYTES;

/// Reads the text of a regular file of at most [`TOKENIZER_FILE_BYTES`]; `None` if the file does not exist. A pipe or a device
/// could be read without end.
pub(crate) fn read_optional(path: &Path) -> Result<Option<String>, Error> {
    if let Ok(metadata) = std::fs::metadata(path) {
        if !metadata.is_file() {
            return Err(unusable(path, "it is not a regular file"));
        }
        if metadata.len() > TOKENIZER_FILE_BYTES {
            let bytes = metadata.len();
            let problem = format!("it has {bytes} bytes, and the limit is {TOKENIZER_FILE_BYTES}");
            return Err(unusable(path, &problem));
        }
    }
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
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
