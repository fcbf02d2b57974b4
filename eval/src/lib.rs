//! Evaluation: graders, figures of held-out text and of answers, their intervals, verdicts, and the report.
//!
//! This crate runs no model and opens no socket. Its input is [`SequenceValues`], one for each sequence, and
//! [`Graded`], one for each answer. A figure of the report is a ratio of sums over them: nats per token, the share of
//! positions with agreement, or the share of right answers.
//!
//! - [`Grader`] decides whether an answer is right, given a reference.
//! - [`interval`], [`accuracy()`] and [`calibration()`] compute figures with 95 % bootstrap intervals over prompts;
//!   [`paired`] and [`paired_accuracy`] compute the difference of two models over the same prompts.
//! - [`include_seed_variance`] adds the variance between training seeds to the intervals of differences.
//! - [`verdict`] is "better" or "worse" only if the interval excludes zero; [`conclude`] decides whether distillation
//!   helps.
//! - [`SamplingTally`] tests whether text is a sample of the distributions that are stored for it ([`SamplingCheck`]).
//! - [`Measurements`] computes all results of a run; [`Report`] writes them as HTML, as Markdown and as JSON.

mod accuracy;
mod bootstrap;
mod calibration;
mod conclusion;
mod error;
mod grade;
mod interval;
mod measurements;
mod metric;
mod report;
mod report_html;
mod report_markdown;
mod report_text;
mod results;
mod sampling;
mod sampling_tally;
mod seeds;
mod settings;
mod verdict;
mod wording;

#[cfg(test)]
mod example;

pub use accuracy::{Accuracy, Graded, GroupAccuracy, accuracy, paired_accuracy};
pub use bootstrap::{interval, paired, teacher_nll};
pub use calibration::{BINS, Calibration, ReliabilityBin, calibration};
pub use conclusion::{Conclusion, Evidence, Finding, MIN_SEEDS, SEED_SHARE, conclude};
pub use error::Error;
pub use grade::{Grade, Grader};
pub use interval::Interval;
pub use measurements::{Measurements, ModelFacts, ModelMeasurements, SeedMeasurements};
pub use metric::{Figure, Metric};
pub use potstill_datasets::SequenceValues;
pub use report::{
    LossCurve, LossPoint, Provenance, Report, Sample, SampleAnswer, SimilarPrompts, SplitFacts,
    SplitSize, StageFacts, covered_seconds,
};
pub use results::{
    Comparison, SeedFigures, StudentResult, TeacherResult, TestText, TunedRate, compare,
    compare_accuracy,
};
pub use sampling::{MAX_Z, MIN_SHARE, SamplingCheck, SamplingLaw};
pub use sampling_tally::SamplingTally;
pub use seeds::include_seed_variance;
pub use settings::{EvalAnswers, EvalOwnText, EvalSettings, GradeSettings};
pub use verdict::{MIN_PROMPTS, Verdict, verdict};
