//! The list of a repository's files at a commit.

use reqwest::Method;
use serde::Deserialize;

use super::HubError;
use super::event::Observer;
use super::hash::BlobHash;
use super::reference::Repository;
use super::request::HubRequest;
use super::transport::{AttemptFailure, Transport};

/// Largest list of files that is read, bytes.
const LARGEST_LIST: usize = 256 << 20;

/// A repository's files at a commit.
#[derive(Debug, Clone)]
pub(super) struct Listing {
    /// The commit, as 40 hexadecimal digits.
    pub(super) commit: String,
    /// All files.
    pub(super) files: Vec<ListedFile>,
}

/// A file of a repository. Size and hash may be absent in the lists of mirrors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ListedFile {
    /// Path in the repository.
    pub(super) path: String,
    /// Size, bytes.
    pub(super) size: Option<u64>,
    /// Hash of the content.
    pub(super) hash: Option<BlobHash>,
}

/// The API's answer.
#[derive(Deserialize)]
struct RepositoryInfo {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

/// A file in the API's answer.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<LargeFile>,
}

/// Facts about a file in git's large file storage.
#[derive(Deserialize)]
struct LargeFile {
    sha256: Option<String>,
    size: Option<u64>,
}

/// Whether a text is a whole commit hash.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && matches!(BlobHash::read(text), Some(BlobHash::GitSha1(_)))
}

/// Asks the Hub for the commit of a revision and its files.
pub(super) fn list(
    transport: &Transport,
    repository: &Repository,
    revision: &str,
    observer: Observer<'_>,
) -> Result<Listing, HubError> {
    let path = format!(
        "{}/revision/{}?blobs=true",
        repository.api_path(),
        escaped(revision, true)
    );
    let request = HubRequest {
        path: &path,
        repository,
        revision,
        file: None,
    };
    let body = transport.attempts(request, observer, |observer| {
        (whole_body(transport, request, observer), false)
    })?;
    let malformed = |why: String| HubError::Malformed {
        what: request.what(),
        why,
    };
    let info: RepositoryInfo = crate::reply_json::parse(&body).map_err(malformed)?;
    if !is_commit(&info.sha) {
        return Err(malformed(format!("its `sha` is {:?}", info.sha)));
    }
    let file = |sibling: Sibling| {
        let large = sibling.lfs.as_ref();
        let hash = match large {
            Some(large) => large.sha256.as_deref(),
            None => sibling.blob_id.as_deref(),
        };
        ListedFile {
            size: large.and_then(|large| large.size).or(sibling.size),
            hash: hash.and_then(BlobHash::read),
            path: sibling.rfilename,
        }
    };
    Ok(Listing {
        commit: info.sha,
        files: info.siblings.into_iter().map(file).collect(),
    })
}

fn whole_body(
    transport: &Transport,
    request: HubRequest<'_>,
    observer: Observer<'_>,
) -> Result<Vec<u8>, AttemptFailure> {
    let mut response = transport.open(request, Method::GET, None, observer)?;
    let mut body = Vec::new();
    while let Some(chunk) = transport.chunk(&mut response, observer)? {
        body.extend_from_slice(&chunk);
        if body.len() > LARGEST_LIST {
            let what = request.what();
            let why = format!("it has more than {LARGEST_LIST} bytes");
            return Err(HubError::Malformed { what, why }.into());
        }
    }
    Ok(body)
}

/// Completes a file whose size or hash the list does not have by a request for its headers.
pub(super) fn complete(
    transport: &Transport,
    repository: &Repository,
    commit: &str,
    file: &ListedFile,
    observer: Observer<'_>,
) -> Result<(u64, BlobHash), HubError> {
    if let (Some(size), Some(hash)) = (file.size, &file.hash) {
        return Ok((size, hash.clone()));
    }
    let path = file_path(repository, commit, &file.path);
    let request = HubRequest {
        path: &path,
        repository,
        revision: commit,
        file: Some(&file.path),
    };
    let response = transport.attempts(request, observer, |observer| {
        (
            transport.open(request, Method::HEAD, Some(0), observer),
            false,
        )
    })?;
    let header = |name: &str| {
        response
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
    };
    let hash = header("x-linked-etag")
        .or(header("etag"))
        .and_then(BlobHash::read);
    let size = header("x-linked-size").or(header("content-length"));
    match (size.and_then(|size| size.parse().ok()), hash) {
        (Some(size), Some(hash)) => Ok((size, hash)),
        _ => Err(HubError::NoHash {
            endpoint: transport.endpoint().to_owned(),
            file: file.path.clone(),
        }),
    }
}

/// Path of a file below the endpoint.
pub(super) fn file_path(repository: &Repository, commit: &str, file: &str) -> String {
    format!(
        "{}/resolve/{commit}/{}",
        repository.web_path(),
        escaped(file, false)
    )
}

/// Escapes everything in a path that a URL cannot contain, and `/` if `slashes` is set.
fn escaped(path: &str, slashes: bool) -> String {
    let mut out = String::new();
    for byte in path.bytes() {
        match byte {
            b'/' if !slashes => out.push('/'),
            b'-' | b'_' | b'.' | b'~' => out.push(byte as char),
            byte if byte.is_ascii_alphanumeric() => out.push(byte as char),
            byte => out += &format!("%{byte:02X}"),
        }
    }
    out
}
