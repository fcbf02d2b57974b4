//! What is measured: graders, figures of held-out text and answers, intervals, verdicts,
//! the report.
//!
//! Nothing here runs a model or opens a socket. Values come in as [`SequenceValues`], one
//! a sequence, and as [`Graded`], one an answer. A figure of the report is a ratio of sums
//! over them: nats a token, the share of tokens agreed on, the share of answers that are
//! right.
//!
//! - [`Grader`] says whether an answer is right, given a reference.
//! - [`interval`], [`accuracy()`] and [`calibration()`] give figures with 95 % bootstrap
//!   intervals over prompts; [`paired`] and [`paired_accuracy`] the difference of two
//!   models over the same prompts.
//! - [`count_seeds`] makes what other seeds do to training part of those differences.
//! - [`verdict`] says "better" or "worse" only when the interval leaves out zero;
//!   [`Report::conclude`] says whether distillation helps here.
//! - [`Report`] writes itself as HTML, as Markdown and as JSON.

mod accuracy;
mod bootstrap;
mod calibration;
mod conclusion;
mod error;
mod grade;
mod metric;
mod model_results;
mod report;
mod report_html;
mod report_markdown;
mod seeds;
mod settings;
mod wording;

#[cfg(test)]
mod example;

pub use accuracy::{Accuracy, Graded, GroupAccuracy, accuracy, paired_accuracy};
pub use bootstrap::{Interval, MIN_PROMPTS, interval, paired, teacher_nll};
pub use calibration::{BINS, Calibration, ReliabilityBin, SequenceBins, calibration};
pub use conclusion::{Conclusion, Finding, MIN_SEEDS, SEED_SHARE};
pub use error::Error;
pub use grade::{Grade, Grader};
pub use metric::{Figure, Metric, Verdict, verdict};
pub use model_results::{FigureOptions, ModelResults, SeedResults, TrainingFacts, compare_models};
pub use potstill_datasets::SequenceValues;
pub use report::{
    Comparison, Heldout, LossCurve, LossPoint, Provenance, Report, Sample, SampleAnswer,
    StageFacts, StudentResult, TeacherResult, compare, compare_accuracy, covered_seconds,
};
pub use seeds::{SeedFigures, count_seeds};
pub use settings::{EvalAnswers, EvalSettings, GradeSettings};
