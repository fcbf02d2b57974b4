//! Files as a whole: sizes and hashes, and atomic writing.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::canonical::hex;
use crate::error::Error;
use crate::private::{create_new, create_private};

/// Size and hash of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileHash {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 in lower-case hex.
    pub sha256: String,
}

/// Computes the sizes and hashes of all files below a folder, by path with `/`. Several files are hashed at a time.
///
/// # Errors
/// [`Error::Io`], and [`Error::Invalid`] if a name is not UTF-8.
pub fn hash_files(dir: &Path) -> Result<BTreeMap<String, FileHash>, Error> {
    let (mut names, mut paths) = (Vec::new(), Vec::new());
    let mut folders = vec![(dir.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
            let path = entry.map_err(Error::io("list", &folder))?.path();
            let Some(file_name) = path.file_name().and_then(|name| name.to_str()) else {
                let problem = format!("{} has a name that is not UTF-8", path.display());
                return Err(Error::invalid(problem, "rename it"));
            };
            let name = format!("{prefix}{file_name}");
            if path.is_dir() {
                folders.push((path, format!("{name}/")));
            } else {
                names.push(name);
                paths.push(path);
            }
        }
    }
    Ok(names.into_iter().zip(hash_each(&paths)?).collect())
}

/// Computes the sizes and hashes of files, several at a time, in the order of their paths.
///
/// # Errors
/// [`Error::Io`], which names the file.
pub fn hash_each(paths: &[PathBuf]) -> Result<Vec<FileHash>, Error> {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
    if cores.min(paths.len()) < 2 {
        return paths.iter().map(|path| hash_file(path)).collect();
    }
    // Threads of their own, because this is called from threads of a pool and while a lock is held.
    let next = AtomicUsize::new(0);
    let work = || {
        let mine = std::iter::from_fn(|| {
            let index = next.fetch_add(1, Ordering::Relaxed);
            Some((index, hash_file(paths.get(index)?)))
        });
        mine.collect::<Vec<_>>()
    };
    let mut hashed = thread::scope(|scope| {
        let workers: Vec<_> = (0..cores.min(paths.len()))
            .map(|_| scope.spawn(work))
            .collect();
        let results = workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
        results.flatten().collect::<Vec<_>>()
    });
    hashed.sort_by_key(|(index, _)| *index);
    hashed.into_iter().map(|(_, hash)| hash).collect()
}

/// Computes the size and the hash of one regular file, which is read in blocks.
///
/// # Errors
/// [`Error::Io`], which names the file; [`Error::Invalid`] for a pipe or a device, which could be read without end.
pub fn hash_file(path: &Path) -> Result<FileHash, Error> {
    let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
    if !metadata.is_file() {
        let problem = format!("{} is not a regular file", path.display());
        return Err(Error::invalid(
            problem,
            "replace it by a file or by a link to one",
        ));
    }
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let mut hasher = Sha256::new();
    let mut block = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        let count = file.read(&mut block).map_err(Error::io("read", path))?;
        match block.get(..count) {
            None | Some([]) => break,
            Some(part) => hasher.update(part),
        }
        bytes += count as u64;
    }
    Ok(FileHash {
        bytes,
        sha256: hex(&hasher.finalize()),
    })
}

/// Writes a file that only its owner can read, atomically: writes a temporary file beside it, syncs and renames it, and
/// syncs the folder.
///
/// # Errors
/// [`Error::Io`].
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    replace(path, bytes, create_private)
}

/// As [`replace_file`], with the usual permissions, for files of an exported model.
///
/// # Errors
/// [`Error::Io`].
pub fn replace_shared_file(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    replace(path, bytes, |path| create_new(path, File::options()))
}

fn replace(
    path: &Path,
    bytes: &[u8],
    create: impl FnOnce(&Path) -> std::io::Result<File>,
) -> Result<(), Error> {
    let temporary = temporary_path(path);
    let mut file = create(&temporary).map_err(Error::io("create", &temporary))?;
    file.write_all(bytes)
        .map_err(Error::io("write", &temporary))?;
    publish_file(&file, &temporary, path)
}

/// Syncs a finished file and renames it into place.
pub(crate) fn publish_file(file: &File, temporary: &Path, path: &Path) -> Result<(), Error> {
    file.sync_all().map_err(Error::io("sync", temporary))?;
    fs::rename(temporary, path).map_err(Error::io("rename a finished file to", path))?;
    sync_parent(path)
}

/// Returns the path under which a file is written before it is complete.
pub(crate) fn temporary_path(path: &Path) -> PathBuf {
    with_suffix(path, ".tmp")
}

/// Adds a suffix to the name of a file or folder.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Syncs the folder of a new or renamed file, so that the change survives a crash.
pub(crate) fn sync_parent(path: &Path) -> Result<(), Error> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Only Unix can open a folder as a file; on other systems the rename has to suffice.
    if cfg!(unix) {
        File::open(parent)
            .and_then(|folder| folder.sync_all())
            .map_err(Error::io("sync", parent))?;
    }
    Ok(())
}
