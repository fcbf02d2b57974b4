//! Evaluation: graders, figures of test text and of answers, their intervals, verdicts, and the report.
//!
//! This crate runs no model and opens no socket. Its input is [`SequenceValues`], one for each sequence, and
//! [`Graded`], one for each answer. A figure of the report is a ratio of sums over them: nats per token, the share of
//! positions with agreement, or the share of right answers.
//!
//! - [`Grader`] decides whether an answer is right, given a reference.
//! - [`interval`], [`accuracy()`] and [`calibration()`] compute figures with 95 % intervals over prompts and seeds.
//! - [`Measurements::comparisons`] computes the paired differences between models, with p-values that are corrected for
//!   their number; [`conclude`] decides whether distillation helps. [`planned_detectable`] tells before a training which
//!   difference it can find.
//! - [`SamplingTally`] tests whether text is a sample of the distributions that are stored for it ([`SamplingCheck`]).
//! - [`Measurements`] computes all results of a run; [`Report`] writes them as HTML, as Markdown and as JSON.

mod accuracy;
mod bootstrap;
mod calibration;
mod comparison;
mod conclusion;
pub mod cost;
mod error;
mod estimate;
mod figures;
mod finding;
mod grade;
mod interval;
mod measurements;
mod metric;
mod power;
mod report;
mod report_html;
mod report_markdown;
mod report_text;
mod results;
mod sampling;
mod sampling_tally;
mod settings;
mod sign_flip;
mod student_t;
mod wording;

#[cfg(test)]
mod example;

pub use accuracy::{Accuracy, Graded, GroupAccuracy, accuracy};
pub use calibration::{BINS, Calibration, ReliabilityBin, calibration};
pub use comparison::{Comparison, MIN_FINDING_PROMPTS, MIN_PROMPTS, Verdict};
pub use conclusion::{Conclusion, Evidence, conclude};
pub use error::Error;
pub use estimate::{LEVEL, MIN_SEEDS};
pub use figures::{interval, teacher_nll};
pub use finding::Finding;
pub use grade::{Grade, Grader};
pub use interval::Interval;
pub use measurements::{Measurements, ModelFacts, ModelMeasurements, SeedMeasurements};
pub use metric::{Figure, Metric};
pub use potstill_datasets::SequenceValues;
pub use power::{PlannedDetectable, planned_detectable, prompt_deviation};
pub use report::{
    LossCurve, LossPoint, MeanOfWeights, Provenance, Report, Sample, SampleAnswer, SimilarPrompts,
    SplitFacts, SplitSize, StageFacts, covered_seconds,
};
pub use report_markdown::markdown_text;
pub use results::{SeedFigures, StudentResult, TeacherResult, TestText, TunedRate};
pub use sampling::{MAX_Z, MIN_SHARE, SamplingCheck, SamplingLaw};
pub use sampling_tally::SamplingTally;
pub use settings::{EvalAnswers, EvalOwnText, EvalSettings, GradeSettings};
