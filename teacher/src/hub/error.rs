//! Errors of the Hub's client. Each says what to do.

use std::path::{Path, PathBuf};

/// An error of the Hub's client. No message contains the token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// The settings of the client cannot be used.
    #[error("{0}")]
    Settings(String),
    /// The Hub has no such repository, or it is private.
    #[error(
        "{endpoint} has no {kind} `{repository}`, or it is private\nhint: check the spelling; {token_hint}"
    )]
    NoRepository {
        /// Base URL of the Hub.
        endpoint: String,
        /// `model` or `data set`.
        kind: &'static str,
        /// Name of the repository.
        repository: String,
        /// Advice about the token.
        token_hint: &'static str,
    },
    /// The repository has no such branch, tag or commit.
    #[error(
        "`{repository}` has no revision `{revision}`\nhint: name a branch, a tag or a commit of {page}"
    )]
    NoRevision {
        /// Name of the repository.
        repository: String,
        /// The revision.
        revision: String,
        /// Web page of the repository.
        page: String,
    },
    /// The repository has no such file.
    #[error(
        "`{repository}` has no file `{file}` at {revision}\nhint: {page}/tree/{revision} lists its files"
    )]
    NoFile {
        /// Name of the repository.
        repository: String,
        /// Path of the file in the repository.
        file: String,
        /// The revision.
        revision: String,
        /// Web page of the repository.
        page: String,
    },
    /// The repository is open only to people who accepted its terms.
    #[error(
        "`{repository}` is gated: its files are for accounts that accepted its terms\nhint: accept them at {page}, and {token_hint}"
    )]
    Gated {
        /// Name of the repository.
        repository: String,
        /// Web page of the repository.
        page: String,
        /// Advice about the token.
        token_hint: &'static str,
    },
    /// The Hub refuses the token.
    #[error(
        "{endpoint} refuses the token\nhint: make a token at {endpoint}/settings/tokens and set HF_TOKEN to it, or unset HF_TOKEN for public repositories"
    )]
    TokenRefused {
        /// Base URL of the Hub.
        endpoint: String,
    },
    /// The Hub refuses the request for another reason.
    #[error("the Hub refuses {what} with status {status}{message}\nhint: see {page}")]
    Refused {
        /// The request, such as "`config.json` of `org/name`".
        what: String,
        /// HTTP status.
        status: u16,
        /// The Hub's own words, after a colon; empty if it gives none.
        message: String,
        /// Web page of the repository.
        page: String,
    },
    /// The Hub could not be reached, or failed repeatedly.
    #[error("cannot get {what} after {attempts} attempts: {why}\nhint: {hint}")]
    Unavailable {
        /// The request.
        what: String,
        /// Reason of the last failure.
        why: String,
        /// Number of attempts.
        attempts: u32,
        /// Advice.
        hint: String,
    },
    /// The Hub asks for a longer pause than this client waits.
    #[error(
        "the Hub asks to wait {seconds} s before {what} is requested again\nhint: repeat the command later; a token in HF_TOKEN raises the Hub's limits"
    )]
    AskedToWait {
        /// The request.
        what: String,
        /// Length of the pause, seconds.
        seconds: u64,
    },
    /// A redirect cannot be followed.
    #[error("the Hub redirects {what} {why}\nhint: check HF_ENDPOINT")]
    Redirect {
        /// The request.
        what: String,
        /// The defect of the redirect.
        why: String,
    },
    /// The cache lacks something, and no request may be sent.
    #[error("HF_HUB_OFFLINE is set, and {} has no {what}\nhint: unset HF_HUB_OFFLINE once to fetch it, or copy the cache of another machine there", cache.display())]
    NotCached {
        /// Folder of the cache.
        cache: PathBuf,
        /// The absent thing.
        what: String,
    },
    /// The repository has weights in Python's pickle format only.
    #[error(
        "`{repository}` has its weights in Python's pickle format only (`{file}`), which can run code when it is read\nhint: save it once with transformers (`AutoModelForCausalLM.from_pretrained(\"{repository}\").save_pretrained(folder)` and the same for its tokenizer) and name that folder; many repositories also have a branch or a copy in safetensors"
    )]
    PickleOnly {
        /// Name of the repository.
        repository: String,
        /// A pickle file of the repository.
        file: String,
    },
    /// The repository has no weights that can be read.
    #[error(
        "`{repository}` has no model.safetensors and no model.safetensors.index.json\nhint: {hint}"
    )]
    NoSafetensors {
        /// Name of the repository.
        repository: String,
        /// Advice, which names the repository's GGUF files if there are any.
        hint: String,
    },
    /// The repository has no file that makes it a checkpoint.
    #[error(
        "`{repository}` has no `{file}`, so it is not a checkpoint that can be used\nhint: name a repository in the layout of transformers, or a file of it such as `{repository}/model.gguf`"
    )]
    NoCheckpoint {
        /// Name of the repository.
        repository: String,
        /// The absent file.
        file: &'static str,
    },
    /// A repository names a path that leads out of its folder.
    #[error(
        "`{named_by}` of `{repository}` names `{file}`, which is not a path within the repository\nhint: do not use this repository"
    )]
    UnsafePath {
        /// Name of the repository.
        repository: String,
        /// File that names the path, or `the list of files`.
        named_by: String,
        /// The path.
        file: String,
    },
    /// A file has another size than the Hub announced.
    #[error(
        "{endpoint} sent `{file}` with {found} bytes, but announced {expected}\nhint: repeat the command; if it fails again, the server of HF_ENDPOINT is broken, or something on the way changes files"
    )]
    WrongSize {
        /// Base URL of the Hub.
        endpoint: String,
        /// Path of the file in the repository.
        file: String,
        /// Announced size, bytes.
        expected: u64,
        /// Received size, bytes.
        found: u64,
    },
    /// A file has another hash than the Hub announced.
    #[error(
        "{endpoint} sent `{file}` with the hash {found}, but announced {expected}; the file was deleted\nhint: repeat the command; if it fails again, the server of HF_ENDPOINT is broken, or something on the way changes files"
    )]
    WrongHash {
        /// Base URL of the Hub.
        endpoint: String,
        /// Path of the file in the repository.
        file: String,
        /// Announced hash, as hexadecimal digits.
        expected: String,
        /// Hash of the received bytes, as hexadecimal digits.
        found: String,
    },
    /// A file of the cache is damaged, and no request may be sent.
    #[error("{} is damaged: its content does not have the hash of its name\nhint: delete it, and unset HF_HUB_OFFLINE once to fetch it again", path.display())]
    DamagedCache {
        /// Path of the file.
        path: PathBuf,
    },
    /// The Hub gives no hash for a file.
    #[error(
        "{endpoint} gives no SHA-256 or git hash for `{file}`, so the file could not be verified\nhint: use https://huggingface.co or a mirror that keeps its headers, or download the files yourself and name their folder"
    )]
    NoHash {
        /// Base URL of the Hub.
        endpoint: String,
        /// Path of the file in the repository.
        file: String,
    },
    /// A response or a file is not of the expected form.
    #[error("{what} is not of the form that the Hub documents: {why}\nhint: check HF_ENDPOINT")]
    Malformed {
        /// The response or file.
        what: String,
        /// The defect.
        why: String,
    },
    /// The disk of the cache has too little space.
    #[error("the download needs {} more, and the disk of {} has {} free\nhint: free some space, or set HF_HUB_CACHE to a folder on a larger disk", size(*needed), cache.display(), size(*free))]
    TooLittleSpace {
        /// Folder of the cache.
        cache: PathBuf,
        /// Bytes that are still to be written.
        needed: u64,
        /// Free bytes.
        free: u64,
    },
    /// The disk of the cache became full.
    #[error("the disk of {} is full\nhint: free some space, or set HF_HUB_CACHE to a folder on a larger disk; the download goes on where it stopped", path.display())]
    DiskFull {
        /// Path of the file that did not fit.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The cache cannot be read or written.
    #[error("cannot {action} {}: {source}\nhint: HF_HUB_CACHE sets the folder of the cache", path.display())]
    File {
        /// The attempted action, as a verb.
        action: &'static str,
        /// Path of the file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The caller asked to stop. Whatever was received is kept.
    #[error("the download was stopped; it goes on where it stopped when the command is repeated")]
    Stopped,
}

impl HubError {
    /// Whether the name, the revision or the kind of the repository is wrong, as opposed to a failure on the way.
    #[must_use]
    pub fn is_about_the_name(&self) -> bool {
        matches!(
            self,
            HubError::NoRepository { .. }
                | HubError::NoRevision { .. }
                | HubError::NoFile { .. }
                | HubError::PickleOnly { .. }
                | HubError::NoSafetensors { .. }
                | HubError::NoCheckpoint { .. }
        )
    }

    /// Turns an error of the file system into one that names the action and the path.
    pub(super) fn file(
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(std::io::Error) -> HubError {
        let path = path.to_owned();
        move |source| match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                HubError::DiskFull { path, source }
            }
            _ => HubError::File {
                action,
                path,
                source,
            },
        }
    }
}

/// A number of bytes for people, such as `2.9 GB`; a GB is 10⁹ bytes.
fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        0.0..1e6 => format!("{:.1} kB", bytes / 1e3),
        1e6..1e9 => format!("{:.1} MB", bytes / 1e6),
        _ => format!("{:.1} GB", bytes / 1e9),
    }
}
