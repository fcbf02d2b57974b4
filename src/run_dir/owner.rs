//! Whose run directory a folder is.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

use super::RUN_FILE;
use crate::run_file::{ConfigError, Loaded};

/// A run directory is of the run whose name its `run.toml` has.
pub fn check_owner(root: &Path, run: &Loaded) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct Head {
        run: Name,
    }
    #[derive(Deserialize)]
    struct Name {
        name: String,
    }
    let name = run.file.run.name.as_str();
    let copy = root.join(RUN_FILE);
    let ours = match fs::read_to_string(&copy) {
        Ok(text) => toml::from_str::<Head>(&text).map(|head| head.run.name).ok(),
        Err(_) if !root.exists() => return Ok(()),
        Err(_) => {
            let mut entries = fs::read_dir(root)
                .with_context(|| format!("cannot use {} as a run directory", root.display()))?;
            // These alone are a run directory whose first moments were cut short.
            let begun = |name: &OsStr| name == ".work" || name == "run.toml.tmp";
            if entries.all(|e| e.is_ok_and(|e| begun(&e.file_name()))) {
                return Ok(());
            }
            return Err(ConfigError::plain(format!(
                "{} holds files and no {RUN_FILE}, so it is not a run directory: give another with `--run-dir DIR`",
                root.display()
            ))
            .into());
        }
    };
    match ours {
        Some(owner) if owner == name => Ok(()),
        Some(owner) => Err(run
            .problem(
                &["run", "name"],
                format!(
                    "{} is the run directory of {owner:?}, not of {name:?}: give another with `--run-dir DIR`, or change the name",
                    root.display()
                ),
            )
            .into()),
        None => Err(ConfigError::plain(format!(
            "{} is not a run file, so {} cannot be told to be a run directory of {name:?}: give another with `--run-dir DIR`",
            copy.display(),
            root.display()
        ))
        .into()),
    }
}
