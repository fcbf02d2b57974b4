//! GGUF files, which are laid out as folders in Hugging Face layout.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use potstill_datasets::range::FilePath;
use potstill_model::lay_out_gguf;
use sha2::{Digest, Sha256};

use crate::run_file::{ConfigError, Loaded};

/// Lays out the GGUF files that the settings name, and lets the settings name the folders.
pub(super) fn lay_out(run: &mut Loaded) -> anyhow::Result<()> {
    let teacher = run.settings.teacher.as_mut();
    let teacher = teacher.and_then(|teacher| teacher.path.as_mut());
    let paths = teacher
        .into_iter()
        .chain(run.settings.student.path.as_mut());
    for path in paths {
        let folder = checkpoint_folder(path.as_path())?;
        if folder != path.as_path() {
            run.gguf.insert(folder.clone(), path.as_path().to_owned());
            *path = FilePath::from(folder);
        }
    }
    Ok(())
}

/// Returns the folder of a checkpoint: the folder itself, or for a GGUF file the folder that it is laid out in.
///
/// # Errors
/// A GGUF file that cannot be read, and failures of the file system.
pub(crate) fn checkpoint_folder(path: &Path) -> anyhow::Result<PathBuf> {
    let is_gguf = path
        .extension()
        .is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
    if !is_gguf || !path.is_file() {
        return Ok(path.to_owned());
    }
    let folder = folder_of(path)?;
    lay_out_gguf(path, &folder)?;
    Ok(folder)
}

/// The folder that a GGUF file is laid out in. It has the file's name and is in the user's cache, because several runs
/// and commands without a run directory use it.
fn folder_of(file: &Path) -> anyhow::Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(std::env::home_dir()?.join(".cache")));
    let cache = cache.ok_or_else(|| {
        ConfigError::plain(
            "there is no home folder to lay out a GGUF file in\nhint: set XDG_CACHE_HOME to a folder"
                .to_owned(),
        )
    })?;
    let path = file
        .canonicalize()
        .with_context(|| format!("cannot find {}", file.display()))?;
    let digest = Sha256::digest(path.as_os_str().as_encoded_bytes());
    let digits: String = digest
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let name = file.file_stem().unwrap_or_default();
    Ok(cache.join("potstill/gguf").join(digits).join(name))
}
