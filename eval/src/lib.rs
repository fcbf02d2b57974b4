//! What is measured: per-token metrics of held-out text, intervals, verdicts, the report.
//!
//! Nothing here runs a model or opens a socket. The values come in as
//! [`SequenceValues`], one a sequence, and a figure of the report is a ratio of
//! sums over them: nats a token, or the share of tokens agreed on.
//!
//! - [`interval`] gives a metric with its 95 % bootstrap interval, [`paired`] the
//!   difference of two students over the same sequences.
//! - [`verdict`] says "better" or "worse" only when the interval leaves out zero.
//! - [`Grader`] says whether an answer is right, given a reference.
//! - [`Report`] writes itself as Markdown and as JSON.

mod accuracy;
mod bootstrap;
mod calibration;
mod error;
mod grade;
mod metric;
mod report;
mod report_markdown;

pub use accuracy::{Accuracy, Graded, GroupAccuracy, accuracy, paired_accuracy};
pub use bootstrap::{Interval, MIN_PROMPTS, interval, paired, teacher_nll};
pub use calibration::{BINS, Calibration, ReliabilityBin, SequenceBins, calibration};
pub use error::Error;
pub use grade::{Grade, Grader};
pub use metric::{Metric, Verdict, verdict};
pub use potstill_datasets::SequenceValues;
pub use report::{Comparison, Heldout, Provenance, Report, StageFacts, StudentResult, compare};
