//! The check that a folder is the run directory of a run.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

use super::RUN_FILE;
use crate::run_file::{ConfigError, Loaded};

/// Checks that a folder can be the run directory of `run`: it is empty, or its `run.toml` has the run's name.
///
/// # Errors
/// When the folder belongs to another run, or is not a run directory.
pub fn check_owner(root: &Path, run: &Loaded) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct RunHead {
        run: RunTable,
    }
    #[derive(Deserialize)]
    struct RunTable {
        name: String,
    }
    let name = run.settings.run.name.as_str();
    let copy = root.join(RUN_FILE);
    let ours = match fs::read_to_string(&copy) {
        Ok(text) => toml::from_str::<RunHead>(&text)
            .map(|head| head.run.name)
            .ok(),
        Err(_) if !root.exists() => return Ok(()),
        Err(_) => {
            let mut entries = fs::read_dir(root)
                .with_context(|| format!("cannot use {} as a run directory", root.display()))?;
            // A folder with only these is a run directory whose creation was interrupted.
            let begun = |name: &OsStr| name == ".work" || name == "run.toml.tmp";
            if entries.all(|e| e.is_ok_and(|e| begun(&e.file_name()))) {
                return Ok(());
            }
            return Err(ConfigError::plain(format!(
                "{} has files but no {RUN_FILE}, so it is not a run directory\nhint: choose another folder with `--run-dir DIR`",
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
                    "{} is the run directory of {owner:?}, not of {name:?}\nhint: choose another folder with `--run-dir DIR`, or change the name",
                    root.display()
                ),
            )
            .into()),
        None => Err(ConfigError::plain(format!(
            "{} is not a run file, so {} cannot be recognised as the run directory of {name:?}\nhint: choose another folder with `--run-dir DIR`",
            copy.display(),
            root.display()
        ))
        .into()),
    }
}
