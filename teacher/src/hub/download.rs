//! Download of one blob: resumed, verified, and visible under its name only when it is complete.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE};
use reqwest::{Method, Response, StatusCode};

use super::HubError;
use super::cache::{RepositoryCache, create_parent, hash_content};
use super::event::Observer;
use super::hash::{BlobHash, BlobHasher};
use super::listing::file_path;
use super::reference::Repository;
use super::request::HubRequest;
use super::transport::{AttemptFailure, Transport};

/// A file to download.
pub(super) struct Download<'a> {
    pub(super) transport: &'a Transport,
    pub(super) cache: &'a RepositoryCache,
    pub(super) repository: &'a Repository,
    /// The commit.
    pub(super) commit: &'a str,
    /// Path in the repository.
    pub(super) file: &'a str,
    /// Announced size, bytes.
    pub(super) size: u64,
    /// Announced hash.
    pub(super) hash: &'a BlobHash,
}

/// A partial blob that is being written.
struct PartialBlob {
    file: File,
    hasher: BlobHasher,
    length: u64,
    /// Whether the beginning was received by an earlier process.
    is_resumed: bool,
}

impl Download<'_> {
    /// Downloads the blob. `progress` takes the number of received bytes. The caller holds the blob's lock.
    pub(super) fn run(
        &self,
        observer: Observer<'_>,
        progress: &mut dyn FnMut(Observer<'_>, u64) -> Result<(), HubError>,
    ) -> Result<(), HubError> {
        let path = self.cache.incomplete(self.hash);
        create_parent(&path)?;
        loop {
            let mut partial = self.open(&path, &mut |read| progress(observer, read))?;
            self.receive(&path, &mut partial, observer, progress)?;
            partial
                .file
                .sync_all()
                .map_err(HubError::file("write", &path))?;
            let found = partial.hasher.digits();
            if found == self.hash.digits() {
                let blob = self.cache.blob(self.hash);
                return fs::rename(&path, &blob).map_err(HubError::file("write", &blob));
            }
            fs::remove_file(&path).map_err(HubError::file("delete", &path))?;
            // A wrong beginning may be the work of another process; a whole download is the server's.
            if !partial.is_resumed {
                return Err(HubError::WrongHash {
                    endpoint: self.transport.endpoint().to_owned(),
                    file: self.file.to_owned(),
                    expected: self.hash.digits().to_owned(),
                    found,
                });
            }
        }
    }

    /// Opens the partial blob and hashes what it has.
    fn open(
        &self,
        path: &Path,
        progress: &mut dyn FnMut(u64) -> Result<(), HubError>,
    ) -> Result<PartialBlob, HubError> {
        let mut options = File::options();
        let file = options
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path);
        let mut file = file.map_err(HubError::file("write", path))?;
        let mut length = file.metadata().map_err(HubError::file("read", path))?.len();
        if length > self.size {
            file.set_len(0).map_err(HubError::file("write", path))?;
            length = 0;
        }
        let mut hasher = self.hash.hasher(self.size);
        hash_content(&mut hasher, path, progress)?;
        file.seek(SeekFrom::Start(length))
            .map_err(HubError::file("read", path))?;
        Ok(PartialBlob {
            file,
            hasher,
            length,
            is_resumed: length > 0,
        })
    }

    /// Receives the rest of the blob, in as many attempts as the settings allow.
    fn receive(
        &self,
        path: &Path,
        partial: &mut PartialBlob,
        observer: Observer<'_>,
        progress: &mut dyn FnMut(Observer<'_>, u64) -> Result<(), HubError>,
    ) -> Result<(), HubError> {
        let address = file_path(self.repository, self.commit, self.file);
        let request = HubRequest {
            path: &address,
            repository: self.repository,
            revision: self.commit,
            file: Some(self.file),
        };
        let mut is_begun = false;
        while partial.length < self.size || !is_begun && self.size == 0 {
            is_begun = true;
            self.transport.attempts(request, observer, |observer| {
                let before = partial.length;
                let received = self.attempt(request, path, partial, observer, progress);
                (received, partial.length > before)
            })?;
        }
        Ok(())
    }

    fn attempt(
        &self,
        request: HubRequest<'_>,
        path: &Path,
        partial: &mut PartialBlob,
        observer: Observer<'_>,
        progress: &mut dyn FnMut(Observer<'_>, u64) -> Result<(), HubError>,
    ) -> Result<(), AttemptFailure> {
        let from = partial.length;
        let mut response = self
            .transport
            .open(request, Method::GET, Some(from), observer)?;
        if from > 0 && !continues_at(&response, from) {
            self.restart(path, partial)?;
        }
        if let Some(rest) = length_of(&response) {
            self.check_size(partial.length.saturating_add(rest))?;
        }
        while let Some(chunk) = self.transport.chunk(&mut response, observer)? {
            let length = partial.length + chunk.len() as u64;
            if length > self.size {
                self.restart(path, partial)?;
                self.check_size(length)?;
            }
            partial
                .file
                .write_all(&chunk)
                .map_err(HubError::file("write", path))?;
            partial.hasher.update(&chunk);
            partial.length = length;
            progress(observer, length)?;
        }
        match partial.length < self.size {
            true => {
                let why = format!(
                    "the response ended after {} of {} bytes",
                    partial.length, self.size
                );
                Err(AttemptFailure::Transient(why, None))
            }
            false => Ok(()),
        }
    }

    fn check_size(&self, found: u64) -> Result<(), HubError> {
        if found == self.size {
            return Ok(());
        }
        Err(HubError::WrongSize {
            endpoint: self.transport.endpoint().to_owned(),
            file: self.file.to_owned(),
            expected: self.size,
            found,
        })
    }

    /// Empties the partial blob.
    fn restart(&self, path: &Path, partial: &mut PartialBlob) -> Result<(), HubError> {
        partial
            .file
            .set_len(0)
            .map_err(HubError::file("write", path))?;
        partial
            .file
            .rewind()
            .map_err(HubError::file("write", path))?;
        partial.hasher = self.hash.hasher(self.size);
        partial.length = 0;
        partial.is_resumed = false;
        Ok(())
    }
}

/// Whether a response is the rest of the file from this byte on, as opposed to the whole file.
fn continues_at(response: &Response, from: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE);
    let range = range.and_then(|range| range.to_str().ok()?.strip_prefix("bytes "));
    let first = range.and_then(|range| range.split('-').next()?.trim().parse().ok());
    response.status() == StatusCode::PARTIAL_CONTENT && first == Some(from)
}

/// Number of bytes that the response announces.
fn length_of(response: &Response) -> Option<u64> {
    let length = response.headers().get(CONTENT_LENGTH)?;
    length.to_str().ok()?.parse().ok()
}
