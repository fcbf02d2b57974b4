//! The cache, in the layout of huggingface_hub, so that Python's tools share it:
//! `models--org--name/{blobs/HASH, refs/REVISION, snapshots/COMMIT/FILE}`, where a file of a snapshot is a link to its
//! blob, a partial blob is `blobs/HASH.incomplete`, and locks are in `.locks/`.

use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::HubError;
use super::event::{FetchEvent, Observer};
use super::hash::{BlobHash, BlobHasher};
use super::listing::is_commit;
use super::reference::{Repository, is_safe};

/// Time between two attempts to lock a blob.
const LOCK_PAUSE: Duration = Duration::from_millis(100);
/// Bytes that are read at a time while a blob is hashed.
const READ_BYTES: usize = 1 << 20;

/// Number of temporary files that this process has named.
static TEMPORARY_FILES: AtomicU64 = AtomicU64::new(0);

/// The part of the cache that belongs to a repository.
#[derive(Debug, Clone)]
pub(super) struct RepositoryCache {
    cache: PathBuf,
    root: PathBuf,
    locks: PathBuf,
}

impl RepositoryCache {
    pub(super) fn new(cache: &Path, repository: &Repository) -> RepositoryCache {
        let name = repository.folder_name();
        RepositoryCache {
            cache: cache.to_owned(),
            root: cache.join(&name),
            locks: cache.join(".locks").join(&name),
        }
    }

    /// Path of a blob.
    pub(super) fn blob(&self, hash: &BlobHash) -> PathBuf {
        self.root.join("blobs").join(hash.digits())
    }

    /// Path of a blob that is not complete.
    pub(super) fn incomplete(&self, hash: &BlobHash) -> PathBuf {
        self.root
            .join("blobs")
            .join(format!("{}.incomplete", hash.digits()))
    }

    /// Folder of a snapshot.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The commit that a revision had when it was last looked up; `None` if it is not known.
    pub(super) fn commit_of(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let reference = self.root.join("refs").join(revision);
        let commit = fs::read_to_string(reference)
            .ok()
            .filter(|_| is_safe(revision))?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Records the commit of a branch or tag.
    pub(super) fn record_commit(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit
            || !is_safe(revision)
            || self.commit_of(revision).as_deref() == Some(commit)
        {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        create_parent(&path)?;
        let temporary = temporary_name(&path);
        File::create(&temporary)
            .and_then(|mut file| file.write_all(commit.as_bytes()))
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(HubError::file("write", &path))
    }

    /// Files at the top of a snapshot and, of the folders below, those that `wanted` names.
    pub(super) fn files_of(&self, commit: &str, wanted: Option<&str>) -> Vec<String> {
        let snapshot = self.snapshot(commit);
        let entries = fs::read_dir(&snapshot).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let wanted = wanted.filter(|file| file.contains('/')).map(str::to_owned);
        // A link whose blob is gone counts as absent.
        names
            .chain(wanted)
            .filter(|name| snapshot.join(name).is_file())
            .collect()
    }

    /// Hash of a file of a snapshot by the name of its blob; `None` if the file is not a link to a blob.
    pub(super) fn hash_of(&self, commit: &str, file: &str) -> Option<BlobHash> {
        let target = fs::read_link(self.snapshot(commit).join(file)).ok()?;
        BlobHash::read(target.file_name()?.to_str()?)
    }

    /// Locks a blob against other processes, huggingface_hub included. The lock ends when the file is dropped.
    pub(super) fn lock(&self, hash: &BlobHash, observer: Observer<'_>) -> Result<File, HubError> {
        let path = self.locks.join(format!("{}.lock", hash.digits()));
        create_parent(&path)?;
        let open = File::options().create(true).append(true).open(&path);
        let file = open.map_err(HubError::file("write", &path))?;
        let mut is_told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                // Some network file systems have no locks. The hash is checked in any case.
                Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {
                    return Ok(file);
                }
                Err(TryLockError::Error(e)) => return Err(HubError::file("lock", &path)(e)),
                Err(TryLockError::WouldBlock) => {}
            }
            let event = match is_told {
                true => FetchEvent::Tick,
                false => FetchEvent::Remark(format!(
                    "another process downloads the same file; waiting for {}",
                    path.display()
                )),
            };
            is_told = true;
            if observer(event).is_break() {
                return Err(HubError::Stopped);
            }
            std::thread::sleep(LOCK_PAUSE);
        }
    }

    /// Makes a file of a snapshot a link to its blob.
    pub(super) fn link(&self, commit: &str, file: &str, hash: &BlobHash) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(file);
        if path.is_file() && self.hash_of(commit, file).as_ref() == Some(hash) {
            return Ok(());
        }
        create_parent(&path)?;
        let temporary = temporary_name(&path);
        link_blob(&self.blob(hash), file, &temporary)
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(HubError::file("link", &path))
    }

    /// Free bytes on the disk of the cache; `None` if the system does not say.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        free_bytes(&self.cache)
    }

    /// Folder of the whole cache.
    pub(super) fn cache(&self) -> &Path {
        &self.cache
    }
}

/// Free bytes on the disk of a folder, which need not exist yet; `None` if the system does not say.
#[cfg(unix)]
pub(super) fn free_bytes(folder: &Path) -> Option<u64> {
    let existing = folder.ancestors().find(|folder| folder.exists())?;
    let disk = rustix::fs::statvfs(existing).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Free bytes on the disk of a folder: not known on this system.
#[cfg(not(unix))]
pub(super) fn free_bytes(_: &Path) -> Option<u64> {
    None
}

/// Links to a blob by a relative path, as huggingface_hub does, so that the cache may be moved.
#[cfg(unix)]
fn link_blob(blob: &Path, file: &str, link: &Path) -> std::io::Result<()> {
    let up = "../".repeat(2 + file.matches('/').count());
    let name = blob.file_name().unwrap_or_default().to_string_lossy();
    std::os::unix::fs::symlink(format!("{up}blobs/{name}"), link)
}

/// Copies a blob, because links need special rights on this system.
#[cfg(not(unix))]
fn link_blob(blob: &Path, _: &str, link: &Path) -> std::io::Result<()> {
    fs::copy(blob, link).map(|_| ())
}

/// Adds the content of a file to a hash. `progress` takes the number of bytes so far.
pub(super) fn hash_content(
    hasher: &mut BlobHasher,
    path: &Path,
    progress: &mut dyn FnMut(u64) -> Result<(), HubError>,
) -> Result<(), HubError> {
    let mut file = File::open(path).map_err(HubError::file("read", path))?;
    let mut buffer = vec![0; READ_BYTES];
    let mut read_bytes = 0;
    loop {
        let n = file
            .read(&mut buffer)
            .map_err(HubError::file("read", path))?;
        if n == 0 {
            return Ok(());
        }
        hasher.update(&buffer[..n]);
        read_bytes += n as u64;
        progress(read_bytes)?;
    }
}

/// Creates the folder of a file.
pub(super) fn create_parent(path: &Path) -> Result<(), HubError> {
    match path.parent() {
        Some(parent) => {
            fs::create_dir_all(parent).map_err(HubError::file("create the folder", parent))
        }
        None => Ok(()),
    }
}

/// A name beside `path` that no other process uses.
fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    let number = TEMPORARY_FILES.fetch_add(1, Ordering::Relaxed);
    name.push(format!(".{}-{number}.tmp", std::process::id()));
    PathBuf::from(name)
}
