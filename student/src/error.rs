use std::path::PathBuf;

/// Why training or evaluation stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A stored row could not be read, or breaks the rules for signals.
    #[error(transparent)]
    Data(#[from] potstill_datasets::Error),
    /// A model could not be loaded or saved.
    #[error(transparent)]
    Model(#[from] potstill_model::Error),
    /// Nothing is left to train on.
    #[error(
        "none of the {rows} rows can be trained on: {dropped} are longer than max_length = {max_length}; \
         raise max_length or set overlong = \"cut\""
    )]
    NothingToTrain {
        /// Rows that were offered.
        rows: usize,
        /// Rows over the length.
        dropped: usize,
        /// The limit, in tokens.
        max_length: usize,
    },
    /// The loss has no term.
    #[error("the loss has no term: give forward_kl or cross_entropy a weight above 0")]
    NoLoss,
    /// The parts of the loss do not go together.
    #[error("the loss cannot be trained: {why}")]
    BadObjective {
        /// What is wrong, and the way out.
        why: String,
    },
    /// The teacher's record cannot be turned to the loss's temperature.
    #[error(
        "prompt {prompt_id}, sample {sample_index}: the signals have no normaliser for temperature {temperature}; \
         list it in `temperatures` where they are collected or scored, or train at temperature 1"
    )]
    NoTemperature {
        /// The loss's.
        temperature: f64,
        /// The row's prompt.
        prompt_id: String,
        /// Its sample.
        sample_index: u32,
    },
    /// The teacher's record has no draws from the tail.
    #[error(
        "prompt {prompt_id}, sample {sample_index}: the signals have no draws from the tail; set `tail_draws` \
         where they are collected or scored, or train with tail = \"bucket\""
    )]
    NoDraws {
        /// The row's prompt.
        prompt_id: String,
        /// Its sample.
        sample_index: u32,
    },
    /// A row has no position that carries loss.
    #[error(
        "row {row} (prompt {prompt_id}, sample {sample_index}) has no position that carries loss"
    )]
    NoLossPositions {
        /// Which row.
        row: usize,
        /// Its prompt.
        prompt_id: String,
        /// Its sample.
        sample_index: u32,
    },
    /// A token id outside the model's embedding.
    #[error(
        "token id {id} is outside the student's vocabulary of {vocab}: the signals belong to another tokenizer"
    )]
    Vocabulary {
        /// The id.
        id: u32,
        /// The embedding's rows.
        vocab: usize,
    },
    /// The loss or the gradient is not a number.
    #[error(
        "step {step}: the {what} is {value}; lower the learning rate, or check the signals with `potstill check`"
    )]
    NotFinite {
        /// The step, from 1.
        step: u64,
        /// Loss or gradient norm.
        what: &'static str,
        /// The value.
        value: f64,
    },
    /// A checkpoint belongs to a run with other settings.
    #[error(
        "{path} was made with other settings ({key}); move it away to train again from the start"
    )]
    OtherSettings {
        /// The checkpoint's state file.
        path: PathBuf,
        /// The first setting that differs.
        key: String,
    },
    /// A checkpoint is damaged.
    #[error("{path} cannot be read: {why}; remove that checkpoint to go on from the one before")]
    BadCheckpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A file could not be written or read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
