/// Error of a measurement or of the report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No sequence of test has a loss position.
    #[error(
        "no answer of test has a token to measure\nhint: raise `test` in [curate], or import more prompts"
    )]
    NoTokens,
    /// A value is not a finite number.
    #[error(
        "prompt {prompt_id}, sample {sample_index}: {metric} is {value}\nhint: the model's weights or its outputs are not finite; train with a lower learning_rate"
    )]
    NotFinite {
        /// Id of the prompt.
        prompt_id: String,
        /// Number of the sample, from 0.
        sample_index: u32,
        /// Name of the metric.
        metric: &'static str,
        /// Value of the metric.
        value: f64,
    },
    /// No answer was graded.
    #[error(
        "no answer was graded\nhint: accuracy needs test prompts with a reference, and a grader"
    )]
    NothingGraded,
    /// The probabilities of a sequence are not in 0 to 1, or their number is not that of the sequence's tokens.
    #[error(
        "prompt {prompt_id}, sample {sample_index}: the probabilities for calibration are not one in 0 to 1 for each token\nhint: run `eval` again"
    )]
    Probabilities {
        /// Id of the prompt.
        prompt_id: String,
        /// Number of the sample, from 0.
        sample_index: u32,
    },
    /// A plot of the report cannot be drawn.
    #[error(
        "cannot draw the plot \"{plot}\" of report.html: {reason}\nhint: report.md and report.json have the same figures"
    )]
    Plot {
        /// Title of the plot.
        plot: String,
        /// Message of the drawing library.
        reason: String,
    },
    /// Two models were measured over different sequences.
    #[error(
        "two models were not measured over the same sequences: number {position} is {left} for one and {right} for the other\nhint: run `eval` again"
    )]
    NotPaired {
        /// Index in the lists of sequences.
        position: usize,
        /// Sequence of the first model at that index.
        left: String,
        /// Sequence of the second model at that index.
        right: String,
    },
}
