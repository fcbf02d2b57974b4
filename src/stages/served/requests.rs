//! `requests.jsonl`: a line when a request is sent, and a line when it is over.
//!
//! A request that has only the first was in flight when the process died. The server may have worked for
//! it, so it is charged in full, by a line of its own, when the file is next opened.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use potstill_teacher::http::{Attempt, ChargeBasis, Reservation, Spending, TokenUsage};
use serde::{Deserialize, Serialize};

use crate::progress::Talk;

/// A line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// A process begins to ask; numbers of requests begin anew.
    Session {
        /// The stage that asks.
        stage: String,
        /// When, milliseconds since 1970.
        began_unix_ms: u64,
    },
    /// All questions of a probe, which are asked one after the other.
    Probed {
        /// How many.
        requests: u64,
        /// What the server counted.
        billed: TokenUsage,
        /// What that costs.
        usd: f64,
    },
    /// A request leaves.
    Sent(Reservation),
    /// A request is over.
    Over(Attempt),
}

/// The open list of requests.
pub(super) struct Requests {
    path: PathBuf,
    file: Mutex<File>,
    /// What earlier processes spent.
    pub(super) spent: Spending,
    /// Requests that were in flight when a process died.
    lost: usize,
}

impl Requests {
    /// Opens the list, cuts a torn last line, and charges what was in flight when a process died.
    ///
    /// # Errors
    /// Where it cannot be read or written, or a line of it is not one of ours.
    pub(super) fn open(path: &Path, stage: &str) -> anyhow::Result<Requests> {
        let read = read(path)?;
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        file.set_len(read.whole_bytes)
            .with_context(|| format!("cannot write {}", path.display()))?;
        let mut requests = Requests {
            path: path.to_owned(),
            file: Mutex::new(file),
            spent: read.spent,
            lost: read.open.len(),
        };
        for reserved in read.open {
            let lost = reserved.charged_in_full();
            add(&mut requests.spent, &lost);
            requests.write(&Line::Over(lost))?;
        }
        requests.write(&Line::Session {
            stage: stage.to_owned(),
            began_unix_ms: now_ms(),
        })?;
        requests.sync()?;
        Ok(requests)
    }

    /// Says what an earlier process left in flight.
    pub(super) fn say_lost(&self, talk: &Talk, stage: &str) {
        if self.lost > 0 {
            talk.line(&format!(
                "{stage}: {} requests were in flight when an earlier process ended; they count as paid in full",
                self.lost
            ));
        }
    }

    /// A probe is over.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub(super) fn probed(&self, requests: u64, billed: TokenUsage, usd: f64) -> anyhow::Result<()> {
        self.write(&Line::Probed {
            requests,
            billed,
            usd,
        })
        .with_context(|| format!("cannot write {}", self.path.display()))?;
        self.sync()
    }

    /// A request leaves.
    ///
    /// # Errors
    /// Where it cannot be written, so that the request must not leave.
    pub(super) fn sent(&self, reservation: &Reservation) -> std::io::Result<()> {
        self.write(&Line::Sent(reservation.clone()))
    }

    /// A request is over.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub(super) fn over(&self, attempt: &Attempt) -> anyhow::Result<()> {
        self.write(&Line::Over(attempt.clone()))
            .with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Puts what was written on the disk.
    ///
    /// # Errors
    /// Where the disk refuses.
    pub(super) fn sync(&self) -> anyhow::Result<()> {
        let file = self.file.lock().unwrap_or_else(|e| e.into_inner());
        file.sync_data()
            .with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Bytes of the list.
    pub(super) fn bytes(&self) -> u64 {
        let file = self.file.lock().unwrap_or_else(|e| e.into_inner());
        file.metadata().map_or(0, |m| m.len())
    }

    /// A line in one write, so that lines of several threads never mix.
    fn write(&self, line: &Line) -> std::io::Result<()> {
        let mut text = serde_json::to_vec(line).map_err(std::io::Error::other)?;
        text.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(|e| e.into_inner());
        file.write_all(&text)
    }
}

/// What was spent so far, without opening the list for writing.
///
/// # Errors
/// Where it cannot be read, or a line of it is not one of ours.
pub(super) fn spent(path: &Path) -> anyhow::Result<Spending> {
    let mut read = read(path)?;
    for reserved in std::mem::take(&mut read.open) {
        add(&mut read.spent, &reserved.charged_in_full());
    }
    Ok(read.spent)
}

struct Read {
    spent: Spending,
    /// Requests that have no second line.
    open: Vec<Reservation>,
    /// Bytes up to the end of the last whole line.
    whole_bytes: u64,
}

fn read(path: &Path) -> anyhow::Result<Read> {
    let mut all = Read {
        spent: Spending::default(),
        open: Vec::new(),
        whole_bytes: 0,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(all),
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    };
    let (mut reader, mut line) = (BufReader::new(file), Vec::new());
    let mut in_flight: BTreeMap<u64, Reservation> = BTreeMap::new();
    let (mut began_ms, mut last_ms, mut number) = (0, 0, 0);
    loop {
        line.clear();
        let bytes = reader
            .read_until(b'\n', &mut line)
            .with_context(|| format!("cannot read {}", path.display()))?;
        if line.last() != Some(&b'\n') {
            break;
        }
        number += 1;
        let parsed: Line = serde_json::from_slice(&line).with_context(|| {
            format!(
                "{}:{number} is not a line of requests, so what was spent is not known: restore the file, or move it away to begin at 0",
                path.display()
            )
        })?;
        all.whole_bytes += bytes as u64;
        match parsed {
            Line::Session { began_unix_ms, .. } => {
                all.open
                    .extend(std::mem::take(&mut in_flight).into_values());
                all.spent.seconds += seconds(began_ms, last_ms);
                (began_ms, last_ms) = (began_unix_ms, began_unix_ms);
            }
            Line::Probed {
                requests,
                billed,
                usd,
            } => {
                all.spent.requests += requests;
                all.spent.tokens += billed.prompt_tokens + billed.completion_tokens;
                all.spent.usd += usd;
            }
            Line::Sent(reserved) => {
                last_ms = last_ms.max(reserved.sent_unix_ms);
                in_flight.insert(reserved.request, reserved);
            }
            Line::Over(attempt) => {
                let over = attempt.sent_unix_ms + (attempt.seconds * 1e3) as u64;
                last_ms = last_ms.max(over);
                in_flight.remove(&attempt.request);
                add(&mut all.spent, &attempt);
            }
        }
    }
    all.open.extend(in_flight.into_values());
    all.spent.seconds += seconds(began_ms, last_ms);
    Ok(all)
}

fn seconds(from_ms: u64, to_ms: u64) -> f64 {
    to_ms.saturating_sub(from_ms) as f64 / 1e3
}

fn add(spent: &mut Spending, attempt: &Attempt) {
    spent.usd += attempt.usd;
    spent.requests += 1;
    if attempt.charge != ChargeBasis::Nothing {
        spent.tokens += attempt.billed.prompt_tokens + attempt.billed.completion_tokens;
    }
}

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(request: u64) -> Reservation {
        Reservation {
            request,
            prompt_id: "p".to_owned(),
            sample_index: 0,
            attempt: 1,
            endpoint: "here".to_owned(),
            reserved: TokenUsage {
                prompt_tokens: 10,
                completion_tokens: 90,
                ..TokenUsage::default()
            },
            reserved_usd: 0.5,
            sent_unix_ms: now_ms(),
        }
    }

    fn over(sent: &Reservation) -> Attempt {
        Attempt {
            request: sent.request,
            prompt_id: sent.prompt_id.clone(),
            sample_index: 0,
            attempt: 1,
            endpoint: sent.endpoint.clone(),
            sent_unix_ms: sent.sent_unix_ms,
            seconds: 2.0,
            status: Some(200),
            bytes: 100,
            failed: None,
            billed: TokenUsage {
                prompt_tokens: 8,
                completion_tokens: 12,
                ..TokenUsage::default()
            },
            usd: 0.125,
            charge: ChargeBasis::Reported,
        }
    }

    /// Killed with one of two requests in flight, and in the middle of a line.
    #[test]
    fn what_was_in_flight_is_charged_in_full_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("requests.jsonl");
        assert_eq!(spent(&path).unwrap(), Spending::default());
        let requests = Requests::open(&path, "collect").unwrap();
        assert_eq!(requests.spent, Spending::default());
        requests.sent(&sent(0)).unwrap();
        requests.sent(&sent(1)).unwrap();
        requests.over(&over(&sent(0))).unwrap();
        let asked = TokenUsage {
            prompt_tokens: 3,
            completion_tokens: 2,
            ..TokenUsage::default()
        };
        requests.probed(4, asked, 0.25).unwrap();
        drop(requests);
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, whole + "{\"over\":{\"request\":1,").unwrap();
        let seen = spent(&path).unwrap();
        assert_eq!((seen.usd, seen.tokens, seen.requests), (0.875, 125, 6));
        for lost in [1, 0] {
            let requests = Requests::open(&path, "collect").unwrap();
            assert_eq!(requests.lost, lost);
            let seen = requests.spent;
            assert_eq!((seen.usd, seen.tokens, seen.requests), (0.875, 125, 6));
            assert!((1.9..3.0).contains(&seen.seconds), "{}", seen.seconds);
        }
    }

    #[test]
    fn a_line_of_something_else_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("requests.jsonl");
        std::fs::write(&path, "{\"stage\":\"import\"}\n").unwrap();
        let message = spent(&path).unwrap_err().to_string();
        assert!(
            message.contains("requests.jsonl:1 is not a line of requests"),
            "{message}"
        );
    }
}
