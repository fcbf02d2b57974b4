use std::fmt;
use std::path::{Path, PathBuf};

use potstill_datasets::Signal;

/// Reason for which training or evaluation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A stored row cannot be read, or breaks the rules for signals.
    #[error(transparent)]
    Data(#[from] potstill_datasets::Error),
    /// A model cannot be loaded or saved.
    #[error(transparent)]
    Model(#[from] potstill_model::Error),
    /// No row is left to train on.
    #[error(
        "none of the {rows} rows can be trained on: {dropped} are longer than max_length = {max_length}\n\
         hint: raise max_length, or set overlong = \"cut\""
    )]
    NothingToTrain {
        /// Number of rows in the training set.
        rows: usize,
        /// Number of rows longer than `max_length`.
        dropped: usize,
        /// Largest length, in tokens.
        max_length: usize,
    },
    /// The loss has no term.
    #[error("the loss has no term\nhint: give forward_kl or cross_entropy a weight above 0")]
    NoLoss,
    /// The parts of the loss contradict one another, or a value is out of range.
    #[error("the loss cannot be trained: {reason}")]
    InvalidObjective {
        /// Description of the problem, with a hint if there is a remedy.
        reason: String,
    },
    /// The signals cannot be converted to the loss's temperature.
    #[error(
        "the signals of {sequence} have no normaliser for temperature {temperature}\n\
         hint: list {temperature} in `temperatures` where the signals are collected or scored, or train at temperature 1"
    )]
    NoTemperature {
        /// Temperature of the loss.
        temperature: f64,
        /// Sequence without the normaliser.
        sequence: SequenceId,
    },
    /// The signals have no draws from the tail.
    #[error(
        "the signals of {sequence} have no draws from the tail\n\
         hint: set `tail_draws` where the signals are collected or scored, or train with tail = \"bucket\""
    )]
    NoDraws {
        /// Sequence without draws.
        sequence: SequenceId,
    },
    /// A training row has no loss position.
    #[error("row {row} of the training set ({sequence}) has no loss position")]
    NoLossPositions {
        /// Index of the row in the training set.
        row: usize,
        /// Sequence in that row.
        sequence: SequenceId,
    },
    /// A pattern of `freeze` or of another key fits no parameter.
    #[error(
        "{key} = {pattern:?} fits no parameter of the student\n\
         hint: the nearest names are {}",
        near.join(", ")
    )]
    UnknownParameter {
        /// Key of the run file.
        key: &'static str,
        /// The pattern.
        pattern: String,
        /// Names of parameters that are similar.
        near: Vec<String>,
    },
    /// The training needs the prompts of dev and got none.
    #[error(
        "{key} measures the model on dev, and there are no rows of dev\nhint: remove {key}, or split off rows for dev"
    )]
    NoDev {
        /// Key of the run file.
        key: &'static str,
    },
    /// No parameter is left to train.
    #[error(
        "freeze = {freeze:?} freezes all parameters of the student\n\
         hint: remove a pattern"
    )]
    AllFrozen {
        /// The patterns of `freeze`.
        freeze: Vec<String>,
    },
    /// A token id is outside the student's vocabulary.
    #[error(
        "token id {id} is outside the student's vocabulary of {vocab} tokens\n\
         hint: the signals belong to another tokenizer; train a student with the teacher's tokenizer"
    )]
    Vocabulary {
        /// Token id.
        id: u32,
        /// Number of rows of the student's embedding.
        vocab: usize,
    },
    /// The loss or the gradient is NaN or infinite.
    #[error(
        "step {step}: the {quantity} is {value}; not finite are {named} of the {batch} rows of the global batch: {list}\n\
         hint: check the signals of these rows with `potstill check`; where all rows are named, lower learning_rate",
        named = rows.len(),
        list = SequenceList(rows)
    )]
    NotFinite {
        /// Step, counted from 1.
        step: u64,
        /// Quantity that is not finite: the loss or the gradient norm.
        quantity: &'static str,
        /// Value of the quantity.
        value: f64,
        /// Sequences of the global batch whose own loss or gradient is not finite.
        rows: Vec<SequenceId>,
        /// Number of sequences in the global batch.
        batch: usize,
    },
    /// The norm of the gradient jumps.
    #[error(
        "step {step}: the gradient norm is {norm:.3e}, and {mean:.3e} in the mean of the steps before; largest are the gradients of {named} of the {batch} rows of the global batch: {list}\n\
         hint: check the signals of these rows with `potstill check`; where many rows are named, lower learning_rate; where such norms are usual, raise `spike` of [train.guard]",
        named = rows.len(),
        list = SequenceList(rows)
    )]
    GradientJump {
        /// Step, counted from 1.
        step: u64,
        /// Norm of the gradient.
        norm: f64,
        /// Running mean of the norms before.
        mean: f64,
        /// Sequences of the global batch whose own gradient is among the largest.
        rows: Vec<SequenceId>,
        /// Number of sequences in the global batch.
        batch: usize,
    },
    /// A checkpoint belongs to a run with other settings.
    #[error(
        "{path} was made with other settings ({key})\n\
         hint: move the checkpoint away to train from the start again"
    )]
    OtherSettings {
        /// State file of the checkpoint.
        path: PathBuf,
        /// First setting that differs.
        key: String,
    },
    /// A checkpoint is damaged.
    #[error(
        "{path} cannot be read: {reason}\n\
         hint: remove the folder {}, and training resumes from the checkpoint before it, with the same result",
        folder(path).display()
    )]
    DamagedCheckpoint {
        /// Damaged file.
        path: PathBuf,
        /// Description of the damage.
        reason: String,
    },
    /// The replicas of a training cannot be what the settings say.
    #[error("{0}")]
    Replicas(String),
    /// A device cannot be read.
    #[error("the device cannot be read: {0}")]
    Device(String),
    /// A replica of the training does not answer.
    #[error(
        "replica {rank} of {size} does not answer: {reason}\n\
         hint: start the same command again; training resumes from the last checkpoint, with the same result"
    )]
    LostRank {
        /// Number of the replica, from 0.
        rank: usize,
        /// Number of replicas.
        size: usize,
        /// Description of the failure.
        reason: String,
    },
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
}

/// The folder of a checkpoint's file.
fn folder(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

/// Name of a sequence: its prompt, and its number among the samples of that prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceId {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Number of the sample, from 0.
    pub sample_index: u32,
}

impl SequenceId {
    pub(crate) fn of(signal: &Signal) -> Self {
        Self {
            prompt_id: signal.prompt_id.clone(),
            sample_index: signal.sample_index,
        }
    }
}

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "prompt {}, sample {}", self.prompt_id, self.sample_index)
    }
}

/// Displays the first few of a list of sequences, and how many more there are.
struct SequenceList<'a>(&'a [SequenceId]);

impl fmt::Display for SequenceList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        for (i, sequence) in self.0.iter().take(SHOWN).enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{sequence}")?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}
