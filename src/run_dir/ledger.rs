//! `ledger.jsonl`: one line for each run of a stage, and the only file that contains times.

use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use potstill_datasets::{private_file, read_checked_lines, to_checked_line};
use serde::{Deserialize, Serialize};

use super::{Counts, RunDir};

const LEDGER_FILE: &str = "ledger.jsonl";
/// Held while a line is added.
static WRITING: Mutex<()> = Mutex::new(());
/// Remedy for a line that cannot be read.
const DAMAGE_HINT: &str = "restore the file from a copy, or move it away: only the report reads it, for the times of the stages";

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
    /// Adds a line to the ledger, after a check of the lines before it.
    ///
    /// # Errors
    /// When the file cannot be read or written, or a line of it is damaged.
    pub fn log(&self, line: &LedgerLine) -> anyhow::Result<()> {
        let path = self.path(LEDGER_FILE);
        // Students that are trained in parallel log at the same time.
        let _alone = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = read_checked_lines(&path, DAMAGE_HINT, &mut |_: LedgerLine| ())?;
        let text = to_checked_line(line)?;
        let append = || {
            let mut file = private_file().create(true).append(true).open(&path)?;
            // A line that a crash cut off would make this one unreadable.
            file.set_len(whole)?;
            file.write_all(&text)
        };
        append().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads the ledger's lines. A last line that a crash cut off is left out.
    ///
    /// # Errors
    /// When the file cannot be read, or a line of it is damaged.
    pub fn ledger(&self) -> anyhow::Result<Vec<LedgerLine>> {
        let mut lines = Vec::new();
        let path = self.path(LEDGER_FILE);
        read_checked_lines(&path, DAMAGE_HINT, &mut |line| lines.push(line))?;
        Ok(lines)
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
    use std::fs;

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
        assert_eq!(dir.ledger().unwrap(), std::slice::from_ref(&line));
        dir.log(&line).unwrap();
        assert_eq!(dir.ledger().unwrap(), [line.clone(), line.clone()]);
        let text = fs::read_to_string(dir.path(LEDGER_FILE)).unwrap();
        fs::write(dir.path(LEDGER_FILE), text.replacen("0.5", "4.5", 1)).unwrap();
        for message in [
            dir.ledger().unwrap_err().to_string(),
            dir.log(&line).unwrap_err().to_string(),
        ] {
            assert!(message.contains("ledger.jsonl:1 is damaged"), "{message}");
        }
    }
}
