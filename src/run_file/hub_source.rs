//! A repository of the Hugging Face Hub that a run uses, pinned to a commit.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A repository that a run file names, at the commit that the run uses. `sources.json` holds one for each source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubSource {
    /// Name of the repository, and of the file in it if one is named, such as `org/name` or `org/name/file.gguf`.
    pub repository: String,
    /// Branch, tag or commit of the run file.
    pub revision: String,
    /// The commit that the revision had when the run used it first.
    pub commit: String,
    /// Fetched files, by their paths in the repository.
    pub files: Vec<String>,
    /// Folder of the snapshot on this machine.
    #[serde(skip)]
    pub folder: PathBuf,
}

impl HubSource {
    /// Whether weights were fetched.
    pub fn has_weights(&self) -> bool {
        let is_weights = |file: &String| file.ends_with(".safetensors") || file.ends_with(".gguf");
        self.files.iter().any(is_weights)
    }

    /// The repository with the beginning of the commit, for people.
    pub fn describe(&self) -> String {
        let commit = self.commit.get(..12).unwrap_or(&self.commit);
        format!("{} at {commit}", self.repository)
    }
}
