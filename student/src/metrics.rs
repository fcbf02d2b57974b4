//! The metrics of training steps, and the file `metrics.jsonl` that holds them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use potstill_datasets::{check_first_lines, private_file, to_checked_line};
use serde::Serialize;

use crate::error::Error;

/// Remedy for a line that cannot be read.
const DAMAGE_HINT: &str = "restore the file from a copy, or move the folder that it is in away, and the training begins anew";

/// One line of `metrics.jsonl`. Losses are means over the rows of the global batch, in nats.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepMetrics {
    /// Step, counted from 1.
    pub step: u64,
    /// Training loss: the weighted sum of the objective's terms.
    pub loss: f64,
    /// Forward KL to the distributions trained on (for the controls `same_token` and `shuffled`, those of other
    /// positions), by the loss's tail and temperature.
    pub forward_kl: f64,
    /// −log q of the target tokens.
    pub cross_entropy: f64,
    /// The loss's other divergences, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub divergences: BTreeMap<String, f64>,
    /// The teacher's −log p of the target tokens; for the control `same_token`, by the distributions trained on.
    pub teacher_nll: f64,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Gradient norm of each weighted term of the loss at the logits, by name: the root of the mean over rows of the square of
    /// |∂(weight · term)/∂logits|. Measured in steps 1, 11, 21, … on the first `chunk_rows` rows, if the loss has several
    /// terms.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub term_gradient_norms: BTreeMap<String, f64>,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Number of loss positions.
    pub loss_tokens: u64,
    /// Number of tokens in the global batch, prompts included.
    pub tokens: u64,
    /// `tokens` divided by the step's wall time.
    pub tokens_per_second: f64,
    /// Model FLOP utilisation: operations of the model, without those that are computed again, over what the device could do in
    /// the step's time. `None` on a CPU and on a device whose peak is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Time for which the step waited for its rows to be read, seconds.
    pub stall_seconds: f64,
    /// Largest memory that the process has held so far, bytes: pages in memory. `None` where the system does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
    /// Why the step was not made: the fault of its loss or gradient, and the rows that are to blame.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

/// Reads the largest memory that this process has held from `/proc`.
pub(crate) fn peak_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The file `metrics.jsonl` of one student, open for the steps to come.
pub(crate) struct MetricsFile {
    file: File,
    path: PathBuf,
}

impl MetricsFile {
    /// Opens the file and truncates it to the length that the checkpoint names: the steps behind the
    /// checkpoint run again and write their lines again.
    ///
    /// # Errors
    /// A line of the earlier steps that is damaged, and failures of the file system.
    pub(crate) fn open(dir: &Path, bytes: u64) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let path = dir.join("metrics.jsonl");
        check_first_lines(&path, bytes, DAMAGE_HINT)?;
        let open = || {
            let file = private_file().create(true).append(true).open(&path)?;
            file.set_len(bytes)?;
            Ok(file)
        };
        let file = open().map_err(Error::io(&path))?;
        Ok(Self { file, path })
    }

    /// Appends the line of a step; returns its length in bytes.
    pub(crate) fn write(&mut self, metrics: &StepMetrics) -> Result<u64, Error> {
        let text = to_checked_line(metrics)
            .map_err(|why| Error::io(&self.path)(std::io::Error::other(why)))?;
        self.file.write_all(&text).map_err(Error::io(&self.path))?;
        Ok(text.len() as u64)
    }

    pub(crate) fn sync(&self) -> Result<(), Error> {
        self.file.sync_all().map_err(Error::io(&self.path))
    }
}
