//! A Hub on loopback that fails on purpose. Large files are redirected to another host (`localhost` in place of
//! `127.0.0.1`), as the real Hub redirects to a CDN.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// Commit of the loopback Hub's repositories.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Size from which a file counts as large, bytes.
const LARGE: usize = 1000;

/// A fault of one response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connection is closed after this number of bytes of the body.
    Cut(usize),
    /// An error status, with headers such as `X-Error-Code: GatedRepo\r\n`.
    Status(u16, &'static str),
    /// The whole file although a range was requested.
    IgnoreRange,
    /// Other bytes of the same number.
    WrongContent,
    /// Another number of bytes.
    WrongSize,
    /// A redirect to this address.
    Redirect(String),
    /// A pause in the middle of the body.
    Pause(Duration),
}

/// A request that was received.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// Method and path, such as `GET /org/name/resolve/…`.
    pub(crate) line: String,
    /// Value of `Host`.
    pub(crate) host: String,
    /// Value of `Authorization`.
    pub(crate) authorization: Option<String>,
    /// Value of `Range`.
    pub(crate) range: Option<String>,
}

#[derive(Default)]
struct State {
    /// Files by repository, such as `org/name` or `datasets/org/name`, and path.
    files: BTreeMap<(String, String), Vec<u8>>,
    /// Faults of the next responses to requests whose line contains a text.
    faults: Vec<(String, VecDeque<Fault>)>,
    seen: Vec<Seen>,
    /// Whether the list of files has neither sizes nor hashes, as that of some mirrors.
    is_bare: bool,
}

/// A running Hub.
#[derive(Clone)]
pub(crate) struct HubServer {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl HubServer {
    /// Listens on a free port until the process ends.
    pub(crate) fn start() -> HubServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = HubServer {
            address: listener.local_addr().unwrap(),
            state: Arc::default(),
        };
        let accepting = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = accepting.clone();
                // A client that disconnects is not a failure of the server.
                std::thread::spawn(move || drop(server.serve(stream)));
            }
        });
        server
    }

    /// The base URL.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a file to a repository.
    pub(crate) fn add(&self, repository: &str, path: &str, content: impl Into<Vec<u8>>) {
        let key = (repository.to_owned(), path.to_owned());
        self.state().files.insert(key, content.into());
    }

    /// Adds faults of the next responses to requests whose line contains `part`.
    pub(crate) fn fail(&self, part: &str, faults: impl IntoIterator<Item = Fault>) {
        let faults = faults.into_iter().collect();
        self.state().faults.push((part.to_owned(), faults));
    }

    /// Leaves sizes and hashes out of the list of files.
    pub(crate) fn leave_out_hashes(&self) {
        self.state().is_bare = true;
    }

    /// The requests so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.state().seen.clone()
    }

    /// Number of requests so far whose line contains `part`.
    pub(crate) fn count(&self, part: &str) -> usize {
        let seen = self.seen();
        seen.iter().filter(|seen| seen.line.contains(part)).count()
    }

    fn fault(&self, line: &str) -> Option<Fault> {
        let mut state = self.state();
        let matching = state.faults.iter_mut();
        let mut matching =
            matching.filter(|(part, faults)| line.contains(part.as_str()) && !faults.is_empty());
        matching.next().and_then(|(_, faults)| faults.pop_front())
    }

    fn serve(&self, stream: TcpStream) -> io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let mut stream = stream;
        loop {
            let Some(first) = lines.next().transpose()? else {
                return Ok(());
            };
            let mut headers = BTreeMap::new();
            for line in lines.by_ref() {
                let line = line?;
                let Some((name, value)) = line.split_once(": ") else {
                    break;
                };
                headers.insert(name.to_ascii_lowercase(), value.to_owned());
            }
            let line = first.trim_end_matches(" HTTP/1.1").to_owned();
            let seen = Seen {
                line: line.clone(),
                host: headers.get("host").cloned().unwrap_or_default(),
                authorization: headers.get("authorization").cloned(),
                range: headers.get("range").cloned(),
            };
            self.state().seen.push(seen.clone());
            self.respond(&mut stream, &seen)?;
        }
    }

    fn respond(&self, stream: &mut TcpStream, seen: &Seen) -> io::Result<()> {
        let fault = self.fault(&seen.line);
        let (method, path) = seen.line.split_once(' ').unwrap_or_default();
        let path = path.split('?').next().unwrap_or_default();
        match &fault {
            Some(Fault::Status(status, headers)) => {
                let body = b"<html>refused</html>";
                return write_head(stream, *status, headers, body.len()).and_then(
                    |()| match method {
                        "HEAD" => Ok(()),
                        _ => stream.write_all(body),
                    },
                );
            }
            Some(Fault::Redirect(to)) => {
                return write_head(stream, 302, &format!("Location: {to}\r\n"), 0);
            }
            _ => {}
        }
        if let Some(rest) = path.strip_prefix("/api/") {
            let body = self.list(rest);
            return match body {
                Some(body) => {
                    let body = body.to_string();
                    write_head(
                        stream,
                        200,
                        "Content-Type: application/json\r\n",
                        body.len(),
                    )?;
                    stream.write_all(body.as_bytes())
                }
                None => write_head(stream, 404, "X-Error-Code: RepoNotFound\r\n", 0),
            };
        }
        let found = path.trim_start_matches('/').split_once("/resolve/");
        let found = found.and_then(|(repository, rest)| {
            let (revision, file) = rest.split_once('/')?;
            let repository = repository.trim_start_matches("cdn/");
            let key = (repository.to_owned(), file.replace("%20", " "));
            let content = self.state().files.get(&key).cloned()?;
            [COMMIT, "main"].contains(&revision).then_some(content)
        });
        let Some(content) = found else {
            return write_head(stream, 404, "X-Error-Code: EntryNotFound\r\n", 0);
        };
        let facts = format!(
            "X-Repo-Commit: {COMMIT}\r\nX-Linked-Size: {}\r\nX-Linked-ETag: \"{}\"\r\nETag: \"{}\"\r\n",
            content.len(),
            etag(&content),
            etag(&content)
        );
        if content.len() >= LARGE && !path.starts_with("/cdn/") {
            let port = self.address.port();
            let to = format!("{facts}Location: http://localhost:{port}/cdn{path}?signature=s\r\n");
            return write_head(stream, 302, &to, 0);
        }
        write_file(stream, method, seen, &facts, content, fault.as_ref())
    }

    /// The API's answer about `models/org/name/revision/…` or, for huggingface_hub, `models/org/name/tree/…`.
    fn list(&self, path: &str) -> Option<Value> {
        if let Some((repository, _)) = path.split_once("/tree/") {
            let info = self.list(repository)?;
            let entry = |file: &Value| {
                let size = &file["size"];
                let mut entry = json!({ "type": "file", "path": file["rfilename"], "size": size, "oid": file["blobId"] });
                if file["lfs"].is_object() {
                    entry["lfs"] =
                        json!({ "oid": file["lfs"]["sha256"], "size": size, "pointerSize": 130 });
                }
                entry
            };
            let files = info["siblings"].as_array()?;
            return Some(files.iter().map(entry).collect());
        }
        let (repository, revision) = path.split_once("/revision/").unwrap_or((path, "main"));
        let repository = repository.trim_start_matches("models/");
        let state = self.state();
        let mut siblings = Vec::new();
        for ((of, path), content) in &state.files {
            if of != repository {
                continue;
            }
            let mut file = json!({ "rfilename": path });
            if !state.is_bare {
                file["size"] = json!(content.len());
                file["blobId"] = json!(git_sha1(content));
                if content.len() >= LARGE {
                    file["lfs"] = json!({ "sha256": etag(content), "size": content.len(), "pointerSize": 130 });
                }
            }
            siblings.push(file);
        }
        let known = ["main", "v1", COMMIT].contains(&revision);
        (known && !siblings.is_empty()).then(|| {
            json!({ "id": repository, "sha": COMMIT, "siblings": siblings, "private": false, "gated": false })
        })
    }
}

fn write_file(
    stream: &mut TcpStream,
    method: &str,
    seen: &Seen,
    facts: &str,
    content: Vec<u8>,
    fault: Option<&Fault>,
) -> io::Result<()> {
    let first = seen.range.as_deref().and_then(|range| {
        range
            .strip_prefix("bytes=")?
            .split('-')
            .next()?
            .parse::<usize>()
            .ok()
    });
    let first = first.filter(|_| fault != Some(&Fault::IgnoreRange));
    let mut body = content[first.unwrap_or(0).min(content.len())..].to_vec();
    match fault {
        Some(Fault::WrongContent) => body.iter_mut().for_each(|byte| *byte ^= 1),
        Some(Fault::WrongSize) => body.push(0),
        _ => {}
    }
    let (status, range) = match first {
        Some(first) => {
            let last = content.len().saturating_sub(1);
            let range = format!("Content-Range: bytes {first}-{last}/{}\r\n", content.len());
            (206, range)
        }
        None => (200, String::new()),
    };
    write_head(stream, status, &format!("{facts}{range}"), body.len())?;
    if method == "HEAD" {
        return Ok(());
    }
    match fault {
        Some(Fault::Cut(bytes)) => {
            stream.write_all(&body[..(*bytes).min(body.len())])?;
            stream.shutdown(Shutdown::Both)
        }
        Some(Fault::Pause(pause)) => {
            let (begin, end) = body.split_at(body.len() / 2);
            stream.write_all(begin)?;
            std::thread::sleep(*pause);
            stream.write_all(end)
        }
        _ => stream.write_all(&body),
    }
}

fn write_head(stream: &mut TcpStream, status: u16, headers: &str, length: usize) -> io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {status} Status\r\nContent-Length: {length}\r\n{headers}\r\n"
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn git_sha1(content: &[u8]) -> String {
    let mut hash = Sha1::new_with_prefix(format!("blob {}\0", content.len()));
    hash.update(content);
    hex(&hash.finalize())
}

/// Name of a content's blob: SHA-256 of a large file, and git's hash of a small one.
pub(crate) fn etag(content: &[u8]) -> String {
    match content.len() >= LARGE {
        true => hex(&Sha256::digest(content)),
        false => git_sha1(content),
    }
}
