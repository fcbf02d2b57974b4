//! `ledger.jsonl`: one line for each run of a stage, and the only file that contains times.

use std::fs;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use potstill_datasets::private_file;
use serde::{Deserialize, Serialize};

use super::{Counts, RunDir};

const LEDGER_FILE: &str = "ledger.jsonl";

/// A line of the ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LedgerLine {
    /// The stage's name.
    pub stage: String,
    /// Start, seconds since 1970.
    pub started_unix_seconds: u64,
    /// Duration, seconds.
    pub seconds: f64,
    /// Seconds of them that went into comparing published files with their manifests.
    pub verify_seconds: f64,
    /// Whether the stage finished.
    pub finished: bool,
    /// Counts of this run.
    pub counts: Counts,
}

impl RunDir {
    /// Adds a line to the ledger.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn log(&self, line: &LedgerLine) -> anyhow::Result<()> {
        let path = self.path(LEDGER_FILE);
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        let mut file = private_file().create(true).append(true).open(&path);
        file.as_mut()
            .map_err(|e| std::io::Error::new(e.kind(), e.to_string()))
            .and_then(|file| file.write_all(text.as_bytes()))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads the ledger's lines. A line that a crash cut off is left out.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn ledger(&self) -> anyhow::Result<Vec<LedgerLine>> {
        let path = self.path(LEDGER_FILE);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text
                .lines()
                .filter_map(|l| serde_json::from_str(l).ok())
                .collect()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(e).with_context(|| format!("cannot read {}", path.display())),
        }
    }
}

/// The current time, seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests {
    use super::super::tests::open;
    use super::*;

    #[test]
    fn a_line_that_was_cut_off_is_left_out() {
        let temp = tempfile::tempdir().unwrap();
        let dir = open(temp.path());
        assert!(dir.ledger().unwrap().is_empty());
        let line = LedgerLine {
            stage: "import".to_owned(),
            started_unix_seconds: now(),
            seconds: 0.5,
            verify_seconds: 0.25,
            finished: true,
            counts: Counts::new(),
        };
        dir.log(&line).unwrap();
        let text = fs::read_to_string(dir.path(LEDGER_FILE)).unwrap();
        fs::write(dir.path(LEDGER_FILE), text + "{\"stage\":").unwrap();
        assert_eq!(dir.ledger().unwrap(), [line]);
    }
}
