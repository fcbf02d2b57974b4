//! What can be wrong with the values that are measured.

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is nothing to average over.
    #[error(
        "no held-out sequence has a token to measure: raise `[curate] heldout`, or the number of prompts"
    )]
    NoTokens,
    /// A value is not a finite number.
    #[error(
        "sequence {sample_index} of prompt {prompt_id} has {metric} {value}: the model that was measured is broken there"
    )]
    NotFinite {
        /// The prompt's id.
        prompt_id: String,
        /// Which sample of the prompt.
        sample_index: u32,
        /// The metric's name.
        metric: &'static str,
        /// The value found.
        value: f64,
    },
    /// No answer was graded.
    #[error("no answer was graded: accuracy needs held-out prompts with a reference, and a grader")]
    NothingGraded,
    /// The confidence bins of a sequence contradict one another.
    #[error(
        "the confidence bins of prompt {prompt_id} are no counts of the same tokens in 10 bins: run `eval` again"
    )]
    Bins {
        /// The prompt's id.
        prompt_id: String,
    },
    /// A plot of the report could not be drawn.
    #[error(
        "the plot \"{plot}\" of report.html could not be drawn ({reason}): report.md and report.json hold the same figures"
    )]
    Plot {
        /// The plot's title.
        plot: String,
        /// What the drawing library says.
        reason: String,
    },
    /// Two students were measured over different sequences.
    #[error(
        "the two students were not measured over the same sequences: number {position} is {left} on one side and {right} on the other; run `eval` for both again"
    )]
    NotPaired {
        /// Position in the list, from 0.
        position: usize,
        /// What the first side has there.
        left: String,
        /// What the second side has there.
        right: String,
    },
}
