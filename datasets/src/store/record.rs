//! Records and entries of a store.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::records::{Completion, Failed};
use crate::signal::Signal;

/// A record that a [`Store`](super::Store) keeps of a unit.
pub trait StoredRecord: Serialize + DeserializeOwned {
    /// The unit: the prompt's id, and which sample of the prompt.
    fn unit(&self) -> (&str, u32);

    /// Index of the record's provenance in the list that belongs to it.
    fn provenance(&self) -> u32;

    /// Sets [`StoredRecord::provenance`].
    fn set_provenance(&mut self, index: u32);

    /// Number of tokens acquired: those of an answer, or the positions of a signal.
    fn tokens(&self) -> usize;
}

/// The entry of a unit: a record, or the reason why there is none.
pub type Entry<T> = Result<T, Failed>;

pub(super) fn unit<T: StoredRecord>(entry: &Entry<T>) -> (&str, u32) {
    match entry {
        Ok(record) => record.unit(),
        Err(failed) => (&failed.prompt_id, failed.sample_index),
    }
}

/// A teacher's answer, with the distributions over it where the teacher gave them together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The answer.
    pub completion: Completion,
    /// The distributions.
    pub signal: Option<Signal>,
}

impl StoredRecord for Answer {
    fn unit(&self) -> (&str, u32) {
        (&self.completion.prompt_id, self.completion.sample_index)
    }

    fn provenance(&self) -> u32 {
        self.completion.provenance
    }

    fn set_provenance(&mut self, index: u32) {
        self.completion.provenance = index;
        if let Some(signal) = &mut self.signal {
            signal.provenance = index;
        }
    }

    fn tokens(&self) -> usize {
        match self.completion.tokens.len() {
            0 => self.completion.usage.completion_tokens as usize,
            tokens => tokens,
        }
    }
}

impl StoredRecord for Signal {
    fn unit(&self) -> (&str, u32) {
        (&self.prompt_id, self.sample_index)
    }

    fn provenance(&self) -> u32 {
        self.provenance
    }

    fn set_provenance(&mut self, index: u32) {
        self.provenance = index;
    }

    fn tokens(&self) -> usize {
        self.rows.len()
    }
}
