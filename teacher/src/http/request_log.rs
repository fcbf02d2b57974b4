//! `requests.jsonl`: a line before a request is sent, and a line when the request has ended.
//!
//! A request with only the first line was in flight when the process died. The server may have worked for it, so the
//! request is charged in full, by a line of its own, when the file is opened the next time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use potstill_datasets::{private_file, read_checked_lines, to_checked_line};
use serde::{Deserialize, Serialize};

use super::{Attempt, ChargeBasis, Reservation, Spending, TokenUsage};
use crate::Error;

/// Remedy for a line that cannot be read, with which the spending is not known.
const DAMAGE_HINT: &str = "what was spent so far is not known without this line: restore the file from a copy, or move it away to begin at 0";

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LogLine {
    /// A process begins to send requests; the numbers of requests begin anew.
    Session {
        /// Stage that sends the requests.
        stage: String,
        /// Time of the beginning, milliseconds since 1970.
        began_unix_ms: u64,
    },
    /// All requests of a probe, which are sent one after the other.
    Probed {
        /// Number of requests.
        requests: u64,
        /// Tokens that the server counted.
        billed: TokenUsage,
        /// Cost of these tokens.
        usd: f64,
    },
    /// A request is about to be sent.
    Sent(Reservation),
    /// A request has ended.
    #[serde(rename = "over")]
    Ended(Attempt),
}

/// The list of a run's requests, open for writing.
#[derive(Debug)]
pub struct RequestLog {
    path: PathBuf,
    file: Mutex<File>,
    spent: Spending,
    lost: usize,
}

impl RequestLog {
    /// Opens or creates the file, cuts off a torn last line, charges the requests that were in flight when a process
    /// died, and begins a session of `stage`.
    ///
    /// # Errors
    /// [`Error::RequestLog`] if the file cannot be written; [`Error::Text`] if it cannot be read, or for a line that is
    /// damaged.
    pub fn open(path: &Path, stage: &str) -> Result<RequestLog, Error> {
        let read = read(path)?;
        let file = private_file().create(true).append(true).open(path);
        let file = file.map_err(cannot("write", path))?;
        file.set_len(read.whole_bytes)
            .map_err(cannot("write", path))?;
        let mut log = RequestLog {
            path: path.to_owned(),
            file: Mutex::new(file),
            spent: read.spent,
            lost: read.in_flight.len(),
        };
        for reservation in read.in_flight {
            let charged = reservation.charged_in_full();
            add(&mut log.spent, &charged);
            log.write(&LogLine::Ended(charged))
                .map_err(cannot("write", path))?;
        }
        let session = LogLine::Session {
            stage: stage.to_owned(),
            began_unix_ms: now_ms(),
        };
        log.write(&session).map_err(cannot("write", path))?;
        log.sync()?;
        Ok(log)
    }

    /// Reads what was spent so far, without opening the file for writing.
    ///
    /// # Errors
    /// As [`RequestLog::open`].
    pub fn read_spending(path: &Path) -> Result<Spending, Error> {
        let mut read = read(path)?;
        for reservation in std::mem::take(&mut read.in_flight) {
            add(&mut read.spent, &reservation.charged_in_full());
        }
        Ok(read.spent)
    }

    /// Spending of earlier processes, requests in flight at their end included.
    pub fn spent(&self) -> Spending {
        self.spent
    }

    /// Number of requests that were in flight when an earlier process ended.
    pub fn lost(&self) -> usize {
        self.lost
    }

    /// Notes all requests of a probe.
    ///
    /// # Errors
    /// [`Error::RequestLog`].
    pub fn probed(&self, requests: u64, billed: TokenUsage, usd: f64) -> Result<(), Error> {
        let line = LogLine::Probed {
            requests,
            billed,
            usd,
        };
        self.write(&line).map_err(cannot("write", &self.path))?;
        self.sync()
    }

    /// Notes that a request is about to be sent.
    ///
    /// # Errors
    /// If the line cannot be written; the request must not be sent then.
    pub fn sent(&self, reservation: &Reservation) -> io::Result<()> {
        self.write(&LogLine::Sent(reservation.clone()))
    }

    /// Notes that a request has ended.
    ///
    /// # Errors
    /// [`Error::RequestLog`].
    pub fn ended(&self, attempt: Attempt) -> Result<(), Error> {
        let line = LogLine::Ended(attempt);
        self.write(&line).map_err(cannot("write", &self.path))
    }

    /// Syncs the file to the disk.
    ///
    /// # Errors
    /// [`Error::RequestLog`].
    pub fn sync(&self) -> Result<(), Error> {
        let synced = self.file().sync_data();
        synced.map_err(cannot("write", &self.path))
    }

    /// Length of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.file().metadata().map_or(0, |m| m.len())
    }

    fn file(&self) -> MutexGuard<'_, File> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a line by one call, so that lines of several threads never mix.
    fn write(&self, line: &LogLine) -> io::Result<()> {
        let text = to_checked_line(line).map_err(io::Error::other)?;
        self.file().write_all(&text)
    }
}

fn cannot(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::RequestLog {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Content of the file.
#[derive(Default)]
struct LogContent {
    spent: Spending,
    /// Requests that have no second line.
    in_flight: Vec<Reservation>,
    /// Bytes up to the end of the last whole line.
    whole_bytes: u64,
}

fn read(path: &Path) -> Result<LogContent, Error> {
    let mut sessions = Sessions::default();
    let whole_bytes = read_checked_lines(path, DAMAGE_HINT, &mut |line| sessions.add(line))?;
    sessions.end_session();
    Ok(LogContent {
        spent: sessions.spent,
        in_flight: sessions.lost,
        whole_bytes,
    })
}

/// Sums over the sessions of a file.
#[derive(Default)]
struct Sessions {
    spent: Spending,
    /// Requests that were in flight when their session ended.
    lost: Vec<Reservation>,
    /// Requests of the present session that have no second line.
    in_flight: BTreeMap<u64, Reservation>,
    /// Beginning of the present session, and the last time known in it.
    began_ms: u64,
    last_ms: u64,
}

impl Sessions {
    fn add(&mut self, line: LogLine) {
        match line {
            LogLine::Session { began_unix_ms, .. } => {
                self.end_session();
                (self.began_ms, self.last_ms) = (began_unix_ms, began_unix_ms);
            }
            LogLine::Probed {
                requests,
                billed,
                usd,
            } => {
                self.spent.requests += requests;
                self.spent.tokens += billed.total();
                self.spent.usd += usd;
            }
            LogLine::Sent(reservation) => {
                self.last_ms = self.last_ms.max(reservation.sent_unix_ms);
                self.in_flight.insert(reservation.request, reservation);
            }
            LogLine::Ended(attempt) => {
                let ended = attempt.sent_unix_ms + (attempt.seconds * 1e3) as u64;
                self.last_ms = self.last_ms.max(ended);
                self.in_flight.remove(&attempt.request);
                add(&mut self.spent, &attempt);
            }
        }
    }

    fn end_session(&mut self) {
        let in_flight = std::mem::take(&mut self.in_flight);
        self.lost.extend(in_flight.into_values());
        self.spent.seconds += self.last_ms.saturating_sub(self.began_ms) as f64 / 1e3;
    }
}

fn add(spent: &mut Spending, attempt: &Attempt) {
    spent.usd += attempt.usd;
    spent.requests += 1;
    if attempt.charge != ChargeBasis::Nothing {
        spent.tokens += attempt.billed.total();
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

    fn attempt(sent: &Reservation) -> Attempt {
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

    /// The process was killed with one of two requests in flight, and while it wrote a line.
    #[test]
    fn requests_in_flight_are_charged_in_full_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("requests.jsonl");
        assert_eq!(
            RequestLog::read_spending(&path).unwrap(),
            Spending::default()
        );
        let requests = RequestLog::open(&path, "collect").unwrap();
        assert_eq!(requests.spent, Spending::default());
        requests.sent(&sent(0)).unwrap();
        requests.sent(&sent(1)).unwrap();
        requests.ended(attempt(&sent(0))).unwrap();
        let asked = TokenUsage {
            prompt_tokens: 3,
            completion_tokens: 2,
            ..TokenUsage::default()
        };
        requests.probed(4, asked, 0.25).unwrap();
        drop(requests);
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, whole + "{\"over\":{\"request\":1,").unwrap();
        let seen = RequestLog::read_spending(&path).unwrap();
        assert_eq!((seen.usd, seen.tokens, seen.requests), (0.875, 125, 6));
        for lost in [1, 0] {
            let requests = RequestLog::open(&path, "collect").unwrap();
            assert_eq!(requests.lost, lost);
            let seen = requests.spent;
            assert_eq!((seen.usd, seen.tokens, seen.requests), (0.875, 125, 6));
            assert!((1.9..3.0).contains(&seen.seconds), "{}", seen.seconds);
        }
    }

    #[test]
    fn a_line_that_was_changed_is_an_error_with_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("requests.jsonl");
        let requests = RequestLog::open(&path, "collect").unwrap();
        requests.sent(&sent(0)).unwrap();
        requests.ended(attempt(&sent(0))).unwrap();
        drop(requests);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("0.125", "0.025")).unwrap();
        for message in [
            RequestLog::read_spending(&path).unwrap_err().to_string(),
            RequestLog::open(&path, "collect").unwrap_err().to_string(),
        ] {
            assert!(
                message.contains("requests.jsonl:3 is damaged or was changed"),
                "{message}"
            );
        }
        let other = to_checked_line(&serde_json::json!({"stage": "import"})).unwrap();
        std::fs::write(&path, other).unwrap();
        let message = RequestLog::read_spending(&path).unwrap_err().to_string();
        assert!(message.contains("requests.jsonl:1 is damaged"), "{message}");
    }
}
