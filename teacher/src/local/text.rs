//! A text to score.

use potstill_datasets::Encoded;

/// A prompt with its answer, to be scored.
#[derive(Debug, Clone)]
pub struct ScoringText {
    /// The prompt's id.
    pub prompt_id: String,
    /// Index of the sample among those of its prompt, from 0.
    pub sample_index: u32,
    /// Token ids with a loss mask, which is true where a distribution is wanted.
    pub encoded: Encoded,
}
