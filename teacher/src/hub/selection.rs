//! Choice of the files of a repository that are fetched.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;

use super::HubError;
use super::reference::{Repository, is_safe};

/// Files of a checkpoint besides its weights.
const SMALL_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];
/// Weights in one file.
const SINGLE_FILE: &str = "model.safetensors";
/// List of the files with weights.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";
/// Ends of the names of files in Python's pickle format.
const PICKLES: [&str; 5] = [".bin", ".pt", ".pth", ".ckpt", ".pkl"];

/// Files of a repository that are needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// Configuration, tokenizer, chat template and weights in safetensors.
    Checkpoint,
    /// Configuration, tokenizer and chat template.
    WithoutWeights,
    /// Tokenizer and chat template; a configuration is not required.
    Tokenizer,
    /// One file.
    File(String),
}

impl Selection {
    /// Chooses from the files that a repository has. The shards of a checkpoint are chosen by their names, because the
    /// index that lists them is not fetched yet.
    pub(super) fn choose(
        &self,
        repository: &Repository,
        files: &[&str],
    ) -> Result<Vec<String>, HubError> {
        if let Selection::File(file) = self {
            let found = files.contains(&file.as_str());
            return Ok(if found {
                vec![file.clone()]
            } else {
                Vec::new()
            });
        }
        let has = |name: &str| files.contains(&name);
        let required = match self {
            Selection::Tokenizer => "tokenizer.json",
            _ => "config.json",
        };
        let mut chosen: Vec<&str> = SMALL_FILES.into_iter().filter(|name| has(name)).collect();
        let mut weights: Vec<&str> = Vec::new();
        if has(SINGLE_FILE) {
            weights.push(SINGLE_FILE);
        } else if has(INDEX_FILE) {
            weights.push(INDEX_FILE);
            weights.extend(files.iter().filter(|file| is_shard(file)));
        }
        if !has(required) || (*self == Selection::Checkpoint && weights.is_empty()) {
            return Err(unusable(repository, files, required));
        }
        if *self == Selection::Checkpoint {
            chosen.extend(weights);
        }
        Ok(chosen.into_iter().map(str::to_owned).collect())
    }
}

/// Whether transformers gives a file of weights this name.
fn is_shard(file: &str) -> bool {
    file.starts_with("model-") && file.contains("-of-") && file.ends_with(".safetensors")
}

/// Explains why a repository is no checkpoint in safetensors.
fn unusable(repository: &Repository, files: &[&str], required: &'static str) -> HubError {
    let name = repository.name().to_owned();
    let gguf = files
        .iter()
        .find(|file| file.to_ascii_lowercase().ends_with(".gguf"));
    let pickle = files
        .iter()
        .find(|file| PICKLES.iter().any(|end| file.ends_with(end)));
    let has_required = files.contains(&required);
    match (gguf, pickle) {
        (Some(gguf), _) => HubError::NoSafetensors {
            hint: format!("to use its GGUF file, write `{name}/{gguf}`"),
            repository: name,
        },
        (None, Some(pickle)) if has_required => HubError::PickleOnly {
            repository: name,
            file: (*pickle).to_owned(),
        },
        _ if has_required => HubError::NoSafetensors {
            repository: name,
            hint: "name a repository or a branch that has weights in safetensors".to_owned(),
        },
        _ => HubError::NoCheckpoint {
            repository: name,
            file: required,
        },
    }
}

/// Reads the names of the files with weights from the index in a snapshot.
pub(super) fn shards(repository: &Repository, index: &Path) -> Result<BTreeSet<String>, HubError> {
    #[derive(Deserialize)]
    struct WeightIndex {
        weight_map: std::collections::HashMap<String, String>,
    }
    let text = std::fs::read(index).map_err(HubError::file("read", index))?;
    let read: WeightIndex = crate::reply_json::parse(&text).map_err(|why| HubError::Malformed {
        what: format!("`{INDEX_FILE}` of `{}`", repository.name()),
        why,
    })?;
    let shards: BTreeSet<String> = read.weight_map.into_values().collect();
    match shards.iter().find(|shard| !is_safe(shard)) {
        Some(shard) => Err(HubError::UnsafePath {
            repository: repository.name().to_owned(),
            named_by: INDEX_FILE.to_owned(),
            file: shard.clone(),
        }),
        None => Ok(shards),
    }
}

#[cfg(test)]
mod tests {
    use super::super::HubReference;
    use super::*;

    fn choose(selection: &Selection, files: &[&str]) -> Result<Vec<String>, HubError> {
        let repository = HubReference::model("org/name").unwrap().repository;
        selection.choose(&repository, files)
    }

    #[test]
    fn a_checkpoint_has_only_its_own_files() {
        let files = [
            ".gitattributes",
            "README.md",
            "config.json",
            "consolidated.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/model.onnx",
            "pytorch_model.bin",
            "tokenizer.json",
        ];
        let chosen = choose(&Selection::Checkpoint, &files).unwrap();
        assert_eq!(
            chosen,
            [
                "config.json",
                "tokenizer.json",
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ]
        );
        let small = choose(&Selection::WithoutWeights, &files).unwrap();
        assert_eq!(small, ["config.json", "tokenizer.json"]);
        let both = [
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
        ];
        let chosen = choose(&Selection::Checkpoint, &both).unwrap();
        assert_eq!(chosen, ["config.json", "model.safetensors"]);
    }

    #[test]
    fn a_repository_without_safetensors_is_refused_with_advice() {
        let error = |files: &[&str]| choose(&Selection::Checkpoint, files).unwrap_err();
        let pickle = error(&["config.json", "pytorch_model.bin", "tokenizer.json"]);
        assert!(matches!(pickle, HubError::PickleOnly { .. }));
        assert!(pickle.to_string().contains("save_pretrained"));
        let gguf = error(&["README.md", "x-q8_0.gguf"]);
        assert!(
            gguf.to_string().ends_with("write `org/name/x-q8_0.gguf`"),
            "{gguf}"
        );
        assert!(matches!(
            error(&["README.md"]),
            HubError::NoCheckpoint { .. }
        ));
        assert!(matches!(
            error(&["config.json"]),
            HubError::NoSafetensors { .. }
        ));
    }
}
