//! Names of repositories and of files in them, as people write them.

use super::HubError;

/// Kind of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RepositoryKind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

/// A repository of the Hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    kind: RepositoryKind,
    name: String,
}

/// A repository that a run file names, and the file in it if one is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubReference {
    /// The repository.
    pub repository: Repository,
    /// Branch, tag or commit; `None` if the reference names none.
    pub revision: Option<String>,
    /// Path of a file in the repository.
    pub file: Option<String>,
}

/// Beginning of a reference to a data set.
pub const DATASET_SCHEME: &str = "hf://";

impl Repository {
    /// Name of the repository, such as `org/name`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `model` or `data set`.
    pub(super) fn kind_name(&self) -> &'static str {
        match self.kind {
            RepositoryKind::Model => "model",
            RepositoryKind::Dataset => "data set",
        }
    }

    /// Folder of the repository in the cache.
    pub(super) fn folder_name(&self) -> String {
        let kind = match self.kind {
            RepositoryKind::Model => "models",
            RepositoryKind::Dataset => "datasets",
        };
        format!("{kind}--{}", self.name.replace('/', "--"))
    }

    /// Path of the repository below the Hub's base URL.
    pub(super) fn web_path(&self) -> String {
        match self.kind {
            RepositoryKind::Model => self.name.clone(),
            RepositoryKind::Dataset => format!("datasets/{}", self.name),
        }
    }

    /// Web page of the repository.
    pub(super) fn page(&self, endpoint: &str) -> String {
        format!("{endpoint}/{}", self.web_path())
    }

    /// Path of the repository in the Hub's API.
    pub(super) fn api_path(&self) -> String {
        match self.kind {
            RepositoryKind::Model => format!("api/models/{}", self.name),
            RepositoryKind::Dataset => format!("api/datasets/{}", self.name),
        }
    }
}

impl HubReference {
    /// Reads `org/name`, or `org/name/file.gguf`, whose file may be in folders. `None` if the text has another form,
    /// such as that of a local path.
    #[must_use]
    pub fn model(written: &str) -> Option<HubReference> {
        let mut parts = written.splitn(3, '/');
        let (owner, name) = (parts.next()?, parts.next()?);
        let file = parts.next();
        let is_name = is_repository_part(owner) && is_repository_part(name);
        let is_gguf = |file: &str| file.to_ascii_lowercase().ends_with(".gguf") && is_safe(file);
        // `models/x.gguf` is a local path: no repository is called so.
        if !is_name || is_gguf(name) || !file.is_none_or(is_gguf) {
            return None;
        }
        Some(HubReference {
            repository: Repository {
                kind: RepositoryKind::Model,
                name: format!("{owner}/{name}"),
            },
            revision: None,
            file: file.map(str::to_owned),
        })
    }

    /// Reads `hf://datasets/org/name/file` or `hf://datasets/org/name@revision/file`, as huggingface_hub writes them.
    /// A `/` in a revision is written `%2F`. `None` if the text does not begin with `hf://`.
    ///
    /// # Errors
    /// [`HubError::Settings`] for another form.
    pub fn dataset(written: &str) -> Option<Result<HubReference, HubError>> {
        let rest = written.strip_prefix(DATASET_SCHEME)?;
        let parse = || {
            let mut parts = rest.strip_prefix("datasets/")?.splitn(3, '/');
            let (owner, name, file) = (parts.next()?, parts.next()?, parts.next()?);
            let (name, revision) = match name.split_once('@') {
                Some((name, revision)) => (name, Some(revision.replace("%2F", "/"))),
                None => (name, None),
            };
            let is_name = is_repository_part(owner) && is_repository_part(name);
            let is_revision = revision.as_deref().is_none_or(is_safe);
            (is_name && is_revision && is_safe(file)).then(|| HubReference {
                repository: Repository {
                    kind: RepositoryKind::Dataset,
                    name: format!("{owner}/{name}"),
                },
                revision,
                file: Some(file.to_owned()),
            })
        };
        Some(parse().ok_or_else(|| {
            HubError::Settings(format!(
                "`{written}` does not name a file of a data set\nhint: write it as `hf://datasets/org/name/data/train.parquet`, or with a branch, tag or commit as `hf://datasets/org/name@main/…`"
            ))
        }))
    }

    /// The whole reference as people write it.
    #[must_use]
    pub fn written(&self) -> String {
        match &self.file {
            Some(file) => format!("{}/{file}", self.repository.name),
            None => self.repository.name.clone(),
        }
    }
}

/// Whether a text may be the owner or the name of a repository, by the rules of huggingface_hub.
fn is_repository_part(part: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !part.is_empty()
        && part.len() <= 96
        && part.chars().all(is_allowed)
        && !part.starts_with(['-', '.'])
        && !part.ends_with(['-', '.'])
        && !part.contains("--")
        && !part.contains("..")
        && !part.ends_with(".git")
}

/// Whether a path of a repository stays within the folder that it is joined to.
pub(super) fn is_safe(path: &str) -> bool {
    let is_ordinary = |part: &str| !part.is_empty() && part != "." && part != "..";
    let is_forbidden = |c: char| c.is_control() || matches!(c, '\\' | ':');
    path.len() <= 1000 && path.split('/').all(is_ordinary) && !path.contains(is_forbidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models_are_told_from_local_paths() {
        let model = |text| HubReference::model(text).map(|r| (r.repository.name, r.file));
        let name = |name: &str| Some((name.to_owned(), None));
        assert_eq!(model("Qwen/Qwen2.5-0.5B"), name("Qwen/Qwen2.5-0.5B"));
        let file = Some("q/x.Q8_0.gguf".to_owned());
        assert_eq!(model("a/b/q/x.Q8_0.gguf"), Some(("a/b".to_owned(), file)));
        for local in [
            "model",
            "/a/b",
            "./a",
            "../a/b",
            "~/a",
            "a/b/c",
            "a//b",
            "a/b.gguf",
            "a/b c",
            "a/..",
            "a/b/../x.gguf",
            "a/x--y",
            "a\\b",
            "hf://datasets/a/b/c",
            "a/b/",
        ] {
            assert_eq!(model(local), None, "{local}");
        }
    }

    #[test]
    fn references_to_data_sets_have_a_file_and_perhaps_a_revision() {
        let read = |text| HubReference::dataset(text).unwrap();
        let plain = read("hf://datasets/org/name/data/train-0.parquet").unwrap();
        assert_eq!(plain.repository.folder_name(), "datasets--org--name");
        assert_eq!(plain.file.as_deref(), Some("data/train-0.parquet"));
        assert_eq!(plain.revision, None);
        let pinned = read("hf://datasets/org/name@refs%2Fconvert%2Fparquet/a.jsonl").unwrap();
        assert_eq!(pinned.revision.as_deref(), Some("refs/convert/parquet"));
        for wrong in [
            "hf://datasets/org/name",
            "hf://org/name/x.jsonl",
            "hf://datasets/org/name/../x",
            "hf://datasets/org/name@../x",
            "hf://datasets/o/n//x",
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        assert!(HubReference::dataset("data.jsonl").is_none());
    }
}
