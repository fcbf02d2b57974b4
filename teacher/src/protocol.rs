//! The protocol between a stage and a teacher: units are asked for, and each is completed once, as a record or as a
//! failure.

use std::ops::ControlFlow;
use std::sync::Arc;

use potstill_datasets::{Completion, Entry, Prompt, PromptedAnswer};

use crate::SignalSettings;
use crate::http::{CallbackError, CollectProgress};

/// A unit for which an answer is asked.
#[derive(Debug, Clone)]
pub struct AnswerRequest {
    /// The unit's ordinal.
    pub ordinal: u32,
    /// The prompt, shared by its samples.
    pub prompt: Arc<Prompt>,
    /// Index of the sample among those of its prompt, from 0.
    pub sample_index: u32,
    /// The answer that the data has, for [`Teacher::Given`](crate::Teacher::Given).
    pub given: Option<Completion>,
}

/// A unit for which the distributions over an answer are asked.
#[derive(Debug, Clone)]
pub struct ScoreRequest {
    /// The unit's ordinal.
    pub ordinal: u32,
    /// The answer and its prompt.
    pub answer: PromptedAnswer,
}

/// The distributions that are kept of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoringOptions {
    /// Parts of each distribution to store.
    pub signals: SignalSettings,
    /// Seed of the draws.
    pub seed: u64,
    /// Number of texts that a local teacher scores together.
    pub batch: usize,
    /// Largest number of tokens that is sent to a server at once; a longer text is sent in parts. `None` for the
    /// server's whole context.
    pub window: Option<usize>,
}

/// Entries that completed together, each with its unit's ordinal.
pub type CompletedEntries<T> = Vec<(u32, Entry<T>)>;

/// A stage's side of the protocol: requests of type `Q`, completed as records of type `T`. All functions are called on
/// the thread that the teacher was called on.
pub struct Exchange<'a, Q, T> {
    /// Returns the next unit to ask for. It is called when the teacher can take a unit, so that units are not held in
    /// memory.
    pub next: &'a mut dyn FnMut() -> Result<Option<Q>, CallbackError>,
    /// Takes entries that completed together. They count when this returns; `Break` with the reason ends the work.
    pub completed:
        &'a mut dyn FnMut(CompletedEntries<T>) -> Result<ControlFlow<String>, CallbackError>,
    /// Shows the progress. It is called a few times a second.
    pub progress: &'a mut dyn FnMut(&CollectProgress),
    /// Whether the user asked for a stop. What is in flight still completes.
    pub stop: &'a dyn Fn() -> bool,
}
