//! Snapshots: the needed files of a repository at one commit, planned and fetched.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use super::HubError;
use super::cache::{RepositoryCache, hash_content};
use super::download::Download;
use super::event::{FetchEvent, Observer};
use super::hash::BlobHash;
use super::listing::{ListedFile, complete};
use super::reference::{Repository, is_safe};
use super::selection::{INDEX_FILE, shards};
use super::transport::Transport;

/// Files of a repository at one commit that are to be in the cache.
#[derive(Debug, Clone)]
pub struct SnapshotPlan {
    pub(super) repository: Repository,
    pub(super) cache: RepositoryCache,
    /// Branch, tag or commit that was asked for.
    pub(super) revision: String,
    pub(super) commit: String,
    pub(super) files: Vec<PlannedFile>,
    /// Files that the repository has, for the shards of an index; empty without a connection.
    pub(super) listed: Vec<ListedFile>,
}

/// A file of a plan.
#[derive(Debug, Clone)]
pub(super) struct PlannedFile {
    /// Path in the repository.
    pub(super) path: String,
    /// Size, bytes.
    pub(super) size: u64,
    /// Hash of the content; `None` for a file of the cache that is not a link to a blob.
    pub(super) hash: Option<BlobHash>,
}

/// A folder of the cache with the files of a repository at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The folder.
    pub folder: PathBuf,
    /// The commit.
    pub commit: String,
    /// Paths of the files in the folder.
    pub files: Vec<String>,
}

impl SnapshotPlan {
    /// The commit, as 40 hexadecimal digits.
    #[must_use]
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// Number of files and of bytes that are not in the cache yet. Parts of files that are there count as present.
    #[must_use]
    pub fn missing(&self) -> (usize, u64) {
        let missing = self.files.iter().filter(|file| !self.is_cached(file));
        missing.fold((0, 0), |(files, bytes), file| {
            (
                files + 1,
                bytes + file.size.saturating_sub(self.partial_bytes(file)),
            )
        })
    }

    /// The same plan without weights.
    #[must_use]
    pub fn without_weights(mut self) -> SnapshotPlan {
        self.files.retain(|file| !is_weights(&file.path));
        self
    }

    /// Free bytes on the disk of the cache; `None` if the system does not say.
    #[must_use]
    pub fn free_bytes(&self) -> Option<u64> {
        self.cache.free_bytes()
    }

    /// Folder of the cache.
    #[must_use]
    pub fn cache(&self) -> &std::path::Path {
        self.cache.cache()
    }

    fn is_cached(&self, file: &PlannedFile) -> bool {
        let path = match &file.hash {
            Some(hash) => self.cache.blob(hash),
            None => self.cache.snapshot(&self.commit).join(&file.path),
        };
        fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == file.size)
    }

    fn partial_bytes(&self, file: &PlannedFile) -> u64 {
        let partial = file.hash.as_ref().map(|hash| self.cache.incomplete(hash));
        let length = partial
            .and_then(|path| fs::metadata(path).ok())
            .map(|found| found.len());
        length.filter(|length| *length <= file.size).unwrap_or(0)
    }

    fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// Fetches what is missing, verifies every file, and links the files into the snapshot. `transport` is absent if
    /// nothing may be sent.
    pub(super) fn fetch(
        mut self,
        transport: Option<&Transport>,
        observer: Observer<'_>,
    ) -> Result<Snapshot, HubError> {
        self.check_space()?;
        let (mut next, mut done) = (0, 0);
        while let Some(file) = self.files.get(next).cloned() {
            self.fetch_file(transport, &file, done, observer)?;
            done += file.size;
            next += 1;
            if file.path == INDEX_FILE {
                self.use_index(transport, observer)?;
                self.check_space()?;
            }
        }
        self.cache.record_commit(&self.revision, &self.commit)?;
        Ok(Snapshot {
            folder: self.cache.snapshot(&self.commit),
            files: self.files.into_iter().map(|file| file.path).collect(),
            commit: self.commit,
        })
    }

    fn check_space(&self) -> Result<(), HubError> {
        let ((_, needed), free) = (self.missing(), self.free_bytes());
        match free {
            Some(free) if free < needed => Err(HubError::TooLittleSpace {
                cache: self.cache().to_owned(),
                needed,
                free,
            }),
            _ => Ok(()),
        }
    }

    /// Replaces the files with weights by those that the index names.
    fn use_index(
        &mut self,
        transport: Option<&Transport>,
        observer: Observer<'_>,
    ) -> Result<(), HubError> {
        let index = self.cache.snapshot(&self.commit).join(INDEX_FILE);
        let mut named: BTreeSet<String> = shards(&self.repository, &index)?;
        self.files
            .retain(|file| !file.path.ends_with(".safetensors") || named.remove(&file.path));
        for shard in named {
            let listed = self.listed.iter().find(|file| file.path == shard).cloned();
            let file = match (listed, transport) {
                (Some(listed), Some(transport)) => planned(transport, self, &listed, observer)?,
                (None, Some(transport)) => {
                    return Err(HubError::NoFile {
                        repository: self.repository.name().to_owned(),
                        file: shard,
                        revision: self.commit.clone(),
                        page: self.repository.page(transport.endpoint()),
                    });
                }
                (_, None) => cached(&self.cache, &self.commit, &shard)?,
            };
            self.files.push(file);
        }
        Ok(())
    }

    /// Brings one file into the snapshot. `before` is the number of bytes of the files before it.
    fn fetch_file(
        &self,
        transport: Option<&Transport>,
        file: &PlannedFile,
        before: u64,
        observer: Observer<'_>,
    ) -> Result<(), HubError> {
        let total = self.bytes();
        let mut progress = |observer: Observer<'_>, bytes: u64| {
            let done = before + bytes.min(file.size);
            let file = file.path.clone();
            match observer(FetchEvent::Progress { done, total, file }).is_break() {
                true => Err(HubError::Stopped),
                false => Ok(()),
            }
        };
        progress(observer, 0)?;
        let Some(hash) = &file.hash else {
            return Ok(());
        };
        let blob = self.cache.blob(hash);
        if self.is_cached(file) && self.is_intact(file, hash, observer, &mut progress)? {
            return self.cache.link(&self.commit, &file.path, hash);
        }
        let Some(transport) = transport else {
            return Err(HubError::DamagedCache { path: blob });
        };
        let _lock = self.cache.lock(hash, observer)?;
        // Another process may have finished the blob in the meantime.
        if !(self.is_cached(file) && self.is_intact(file, hash, observer, &mut progress)?) {
            if blob.exists() {
                let text = format!("{} is damaged and is downloaded again", blob.display());
                if observer(FetchEvent::Remark(text)).is_break() {
                    return Err(HubError::Stopped);
                }
                fs::remove_file(&blob).map_err(HubError::file("delete", &blob))?;
            }
            let download = Download {
                transport,
                cache: &self.cache,
                repository: &self.repository,
                commit: &self.commit,
                file: &file.path,
                size: file.size,
                hash,
            };
            download.run(observer, &mut progress)?;
        }
        self.cache.link(&self.commit, &file.path, hash)
    }

    /// Whether the content of a blob has the hash of its name.
    fn is_intact(
        &self,
        file: &PlannedFile,
        hash: &BlobHash,
        observer: Observer<'_>,
        progress: &mut dyn FnMut(Observer<'_>, u64) -> Result<(), HubError>,
    ) -> Result<bool, HubError> {
        let mut hasher = hash.hasher(file.size);
        hash_content(&mut hasher, &self.cache.blob(hash), &mut |bytes| {
            progress(observer, bytes)
        })?;
        Ok(hasher.digits() == hash.digits())
    }
}

/// Whether a file holds weights or lists the files that do.
fn is_weights(path: &str) -> bool {
    let path = path.to_ascii_lowercase();
    path.ends_with(".safetensors") || path.ends_with(".gguf") || path == INDEX_FILE
}

/// A file of the plan from the Hub's list.
pub(super) fn planned(
    transport: &Transport,
    plan: &SnapshotPlan,
    listed: &ListedFile,
    observer: Observer<'_>,
) -> Result<PlannedFile, HubError> {
    if !is_safe(&listed.path) {
        return Err(HubError::UnsafePath {
            repository: plan.repository.name().to_owned(),
            named_by: "the list of files".to_owned(),
            file: listed.path.clone(),
        });
    }
    let (size, hash) = complete(transport, &plan.repository, &plan.commit, listed, observer)?;
    Ok(PlannedFile {
        path: listed.path.clone(),
        size,
        hash: Some(hash),
    })
}

/// A file of the plan from the cache, which must have it.
pub(super) fn cached(
    cache: &RepositoryCache,
    commit: &str,
    file: &str,
) -> Result<PlannedFile, HubError> {
    let path = cache.snapshot(commit).join(file);
    let found = fs::metadata(&path)
        .ok()
        .filter(|found| is_safe(file) && found.is_file());
    let Some(found) = found else {
        return Err(HubError::NotCached {
            cache: cache.cache().to_owned(),
            what: format!("complete snapshot: `{file}` is absent"),
        });
    };
    Ok(PlannedFile {
        path: file.to_owned(),
        size: found.len(),
        hash: cache.hash_of(commit, file),
    })
}
