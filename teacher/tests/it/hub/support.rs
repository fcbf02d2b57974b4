//! A client with a cache of its own, and a small checkpoint to fetch.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use potstill_teacher::hub::{
    FetchEvent, Hub, HubError, HubReference, HubSettings, Selection, Snapshot,
};
use tempfile::TempDir;

use super::server::HubServer;

pub(crate) const MODEL: &str = "org/name";
pub(crate) const TOKEN: &str = "hf_SecretTokenOfATest";

/// A Hub with one checkpoint, and an empty cache.
pub(crate) struct Setup {
    pub(crate) server: HubServer,
    pub(crate) settings: HubSettings,
    folder: TempDir,
}

/// Bytes that do not repeat.
pub(crate) fn weights(length: usize) -> Vec<u8> {
    (0..length as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

impl Setup {
    pub(crate) fn new() -> Setup {
        let server = HubServer::start();
        for (file, content) in [
            ("config.json", "{}"),
            ("tokenizer.json", "{ }"),
            ("README.md", "#"),
        ] {
            server.add(MODEL, file, content);
        }
        server.add(MODEL, "model.safetensors", weights(100_000));
        server.add(MODEL, "pytorch_model.bin", "pickle");
        let folder = tempfile::tempdir().unwrap();
        let settings = HubSettings {
            endpoint: server.url(),
            token: Some(potstill_teacher::http::ApiKey::new(TOKEN.to_owned())),
            cache: folder.path().join("hub"),
            offline: false,
            attempts: 4,
            pause: Duration::from_millis(1),
            longest_pause: Duration::from_secs(2),
            idle: Duration::from_secs(5),
        };
        Setup {
            server,
            settings,
            folder,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A path in the checkpoint's part of the cache.
    pub(crate) fn cached(&self, name: &str) -> PathBuf {
        self.settings.cache.join("models--org--name").join(name)
    }

    pub(crate) fn fetch(&self) -> Result<Snapshot, HubError> {
        self.fetch_as(MODEL, "main", &mut |_| ControlFlow::Continue(()))
    }

    /// Fetches a checkpoint, or the file that the name has.
    pub(crate) fn fetch_as(
        &self,
        name: &str,
        revision: &str,
        observer: &mut dyn FnMut(FetchEvent) -> ControlFlow<()>,
    ) -> Result<Snapshot, HubError> {
        let hub = Hub::new(&self.settings)?;
        let reference = HubReference::model(name).unwrap();
        let selection = reference
            .file
            .map_or(Selection::Checkpoint, Selection::File);
        let plan = hub.plan(&reference.repository, revision, &selection, observer)?;
        hub.fetch(plan, observer)
    }

    /// The error of a fetch that must fail, with the assertion that it does not contain the token.
    pub(crate) fn error(&self) -> HubError {
        let error = self.fetch().unwrap_err();
        assert!(!format!("{error} {error:?}").contains(TOKEN), "{error}");
        assert!(error.to_string().contains("\nhint: "), "{error}");
        error
    }

    /// Asserts that a snapshot has exactly the checkpoint's files with their contents.
    pub(crate) fn assert_whole(&self, snapshot: &Snapshot) {
        assert_eq!(
            snapshot.files,
            ["config.json", "tokenizer.json", "model.safetensors"]
        );
        let read = |file: &str| std::fs::read(snapshot.folder.join(file)).unwrap();
        assert_eq!(read("config.json"), b"{}");
        assert!(read("model.safetensors") == weights(100_000));
        assert_eq!(self.leftovers(), Vec::<String>::new());
    }

    /// Asserts that the weights are in no place where a reader could take them.
    pub(crate) fn assert_unused(&self) {
        assert!(
            !self
                .cached("snapshots")
                .join(super::server::COMMIT)
                .join("model.safetensors")
                .exists()
        );
        let blob = self
            .cached("blobs")
            .join(super::server::etag(&weights(100_000)));
        assert!(!blob.exists());
    }

    /// Partial and temporary files of the cache.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut names = Vec::new();
        walk(&self.settings.cache, &mut |path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.ends_with(".incomplete") || name.ends_with(".tmp") {
                names.push(name);
            }
        });
        names
    }
}

/// Calls a function with every file below a folder.
pub(crate) fn walk(folder: &Path, each: &mut dyn FnMut(&Path)) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => walk(&entry.path(), each),
            false => each(&entry.path()),
        }
    }
}
