//! A GGUF file as a folder in Hugging Face layout, so that everything that reads a checkpoint reads it.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::config::config;
use super::file::GgufFile;
use super::tokenizer::GgufTokenizer;
use crate::Error;
use crate::files::write_json;

/// Name of the weights in a folder.
pub(crate) const GGUF_FILE: &str = "model.gguf";

/// Lays out a GGUF file as a folder: `model.gguf`, a link to the file, and `config.json`, `tokenizer.json`,
/// `tokenizer_config.json` and `generation_config.json` from its metadata. The folder is created if it is absent. A folder
/// that was laid out from the same file is left as it is.
///
/// `config.json` is written last, so a folder that has one is whole.
///
/// # Errors
/// Returns an error that names the file, and the key or the tensor, for a file that is damaged or that this crate does not
/// read, and an error for a failure of the file system.
pub fn lay_out_gguf(file: &Path, folder: &Path) -> Result<(), Error> {
    let link = folder.join(GGUF_FILE);
    let config_file = folder.join("config.json");
    if config_file.is_file() && is_same_file(file, &link) {
        return Ok(());
    }
    let gguf = GgufFile::open(file)?;
    let config = config(&gguf)?;
    let tokenizer = GgufTokenizer::open(&gguf)?;
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    for outdated in [&config_file, &link] {
        match fs::remove_file(outdated) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", outdated)(error));
            }
            _ => {}
        }
    }
    write_json(&folder.join("tokenizer.json"), &tokenizer.tokenizer()?)?;
    write_json(&folder.join("tokenizer_config.json"), &tokenizer.config()?)?;
    let generation = json!({
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
    });
    write_json(&folder.join("generation_config.json"), &generation)?;
    link_file(file, &link)?;
    write_json(&config_file, &config)
}

/// Whether a link leads to a file, judged by size and time of change.
fn is_same_file(file: &Path, link: &Path) -> bool {
    let key = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.len(), metadata.modified().ok()?))
    };
    let original = key(file);
    original.is_some() && original == key(link)
}

/// Makes a hard link, or a symbolic one if the folder is on another file system.
fn link_file(file: &Path, link: &Path) -> Result<(), Error> {
    let file = fs::canonicalize(file).map_err(Error::io("find", file))?;
    if fs::hard_link(&file, link).is_ok() {
        return Ok(());
    }
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(&file, link);
    #[cfg(not(unix))]
    let linked = fs::copy(&file, link).map(|_| ());
    linked.map_err(Error::io("link", link))
}
