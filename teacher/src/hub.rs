//! The Hugging Face Hub: models and data sets are fetched into the cache that huggingface_hub uses too.
//!
//! A revision is resolved to a commit, the needed files are chosen from the list of the commit's files, and each file
//! is verified by its hash before it gets its place in the cache. An interrupted download goes on where it stopped. The
//! token is sent to the host of the endpoint alone.

mod cache;
mod download;
mod error;
mod event;
mod hash;
mod listing;
mod reference;
mod request;
mod selection;
mod settings;
mod snapshot;
mod transport;

use std::path::{Path, PathBuf};

use cache::RepositoryCache;
pub use error::HubError;
pub use event::{FetchEvent, Observer};
use listing::list;
pub use reference::{DATASET_SCHEME, HubReference, Repository};
pub use selection::Selection;
pub use settings::HubSettings;
pub use snapshot::{Snapshot, SnapshotPlan};
use snapshot::{cached, planned};
use transport::Transport;

/// Client of the Hub.
pub struct Hub {
    /// Connection; `None` if only the cache may be used.
    transport: Option<Transport>,
    cache: PathBuf,
}

impl Hub {
    /// Sets up the client. Nothing is sent.
    ///
    /// # Errors
    /// Settings that cannot be used.
    pub fn new(settings: &HubSettings) -> Result<Hub, HubError> {
        Ok(Hub {
            transport: match settings.offline {
                true => None,
                false => Some(Transport::new(settings)?),
            },
            cache: settings.cache.clone(),
        })
    }

    /// Returns the folder of a snapshot whose files were all fetched before; `None` if one is gone. Nothing is sent.
    #[must_use]
    pub fn fetched(
        settings: &HubSettings,
        repository: &Repository,
        commit: &str,
        files: &[String],
    ) -> Option<PathBuf> {
        let cache = RepositoryCache::new(&settings.cache, repository);
        let is_there = |file: &String| cached(&cache, commit, file).is_ok();
        let is_known = listing::is_commit(commit) && !files.is_empty();
        (is_known && files.iter().all(is_there)).then(|| cache.snapshot(commit))
    }

    /// Resolves a revision to a commit and chooses the files to fetch. Only lists and headers are requested, and
    /// nothing is written.
    ///
    /// # Errors
    /// A repository, revision or file that does not exist or cannot be used, and failures of the connection. Without a
    /// connection, files that the cache does not have.
    pub fn plan(
        &self,
        repository: &Repository,
        revision: &str,
        selection: &Selection,
        observer: Observer<'_>,
    ) -> Result<SnapshotPlan, HubError> {
        let cache = RepositoryCache::new(&self.cache, repository);
        let mut plan = SnapshotPlan {
            repository: repository.clone(),
            cache,
            revision: revision.to_owned(),
            commit: String::new(),
            files: Vec::new(),
            listed: Vec::new(),
        };
        let Some(transport) = &self.transport else {
            plan_from_cache(&mut plan, selection)?;
            return Ok(plan);
        };
        let listing = list(transport, repository, revision, observer)?;
        plan.commit = listing.commit;
        let names: Vec<&str> = listing
            .files
            .iter()
            .map(|file| file.path.as_str())
            .collect();
        let chosen = selection.choose(repository, &names)?;
        if let (Selection::File(file), true) = (selection, chosen.is_empty()) {
            return Err(HubError::NoFile {
                repository: repository.name().to_owned(),
                file: file.clone(),
                revision: revision.to_owned(),
                page: repository.page(transport.endpoint()),
            });
        }
        for name in &chosen {
            if let Some(file) = listing.files.iter().find(|file| file.path == *name) {
                let file = planned(transport, &plan, file, observer)?;
                plan.files.push(file);
            }
        }
        plan.listed = listing.files;
        Ok(plan)
    }

    /// Fetches what is missing of a plan, and verifies all of its files.
    ///
    /// # Errors
    /// Failures of the connection, wrong sizes and hashes, and failures of the file system. Received parts of files are
    /// kept for the next time, but are never used before they are complete and verified.
    pub fn fetch(&self, plan: SnapshotPlan, observer: Observer<'_>) -> Result<Snapshot, HubError> {
        plan.fetch(self.transport.as_ref(), observer)
    }

    /// Folder of the cache.
    #[must_use]
    pub fn cache(&self) -> &Path {
        &self.cache
    }
}

/// Plans a snapshot from the cache alone.
fn plan_from_cache(plan: &mut SnapshotPlan, selection: &Selection) -> Result<(), HubError> {
    let name = plan.repository.name();
    let not_cached = |what: String| HubError::NotCached {
        cache: plan.cache.cache().to_owned(),
        what,
    };
    let commit = plan.cache.commit_of(&plan.revision);
    let commit =
        commit.ok_or_else(|| not_cached(format!("`{name}` at revision `{}`", plan.revision)))?;
    let wanted = match selection {
        Selection::File(file) => Some(file.as_str()),
        _ => None,
    };
    let files = plan.cache.files_of(&commit, wanted);
    let names: Vec<&str> = files.iter().map(String::as_str).collect();
    let chosen = selection
        .choose(&plan.repository, &names)
        .unwrap_or_default();
    if chosen.is_empty() {
        let what = match selection {
            Selection::File(file) => format!("file `{file}` of `{name}` at {commit}"),
            _ => format!("complete checkpoint of `{name}` at {commit}"),
        };
        return Err(not_cached(what));
    }
    let files: Result<_, _> = chosen
        .iter()
        .map(|file| cached(&plan.cache, &commit, file))
        .collect();
    plan.files = files?;
    plan.commit = commit;
    Ok(())
}
