//! Content of the report. [`Report::to_markdown`], [`Report::to_json`] and [`Report::to_html`] write it.

use potstill_datasets::RunModel;
use serde::{Deserialize, Serialize};

use crate::accuracy::Accuracy;
use crate::comparison::Comparison;
use crate::conclusion::Conclusion;
use crate::grade::Grader;
use crate::interval::Interval;
use crate::results::{Heldout, SeedFigures, StudentResult, TeacherResult};
use crate::sampling::SamplingCheck;

/// Results of a run, with everything that a reader needs to check them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the run.
    pub run: String,
    /// Version of Potstill that wrote this.
    pub potstill: String,
    /// Conclusion from the comparisons; see [`conclude`](crate::conclude).
    pub conclusion: Conclusion,
    /// Held-out text that the models were measured on.
    pub heldout: Heldout,
    /// Rule by which answers were graded, if there are answers.
    pub grader: Option<Grader>,
    /// Figures of the teacher, if the run has one.
    pub teacher: Option<TeacherResult>,
    /// Figures of the base, the student and its controls.
    pub students: Vec<StudentResult>,
    /// Paired differences between models.
    pub comparisons: Vec<Comparison>,
    /// Test whether the answers are a sample of the stored distributions; `None` without distributions.
    pub sampling: Option<SamplingCheck>,
    /// Losses of the training, one curve for each trained model.
    pub losses: Vec<LossCurve>,
    /// Held-out prompts with the answer of every model.
    pub samples: Vec<Sample>,
    /// Counts, time and size of each stage.
    pub stages: Vec<StageFacts>,
    /// Wall-clock seconds of all stages together; less than their sum if some ran at the same time.
    pub seconds: f64,
    /// Provenance of the numbers.
    pub provenance: Vec<Provenance>,
    /// Commands that reproduce this run.
    pub reproduce: Vec<String>,
}

/// Losses of one model during training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LossCurve {
    /// Model that was trained.
    pub name: RunModel,
    /// Losses by step, in ascending order.
    pub points: Vec<LossPoint>,
}

/// Losses of one training step; means over the rows of its global batch, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossPoint {
    /// Step, counted from 1.
    pub step: u64,
    /// Training loss.
    pub loss: f64,
    /// Forward KL to the distributions trained on (for `shuffled`, the shuffled ones).
    pub forward_kl: f64,
    /// −log q of the target tokens.
    pub cross_entropy: f64,
}

/// A held-out prompt with the answer of every model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Part of the task that the prompt belongs to.
    pub group: Option<String>,
    /// Text of the prompt.
    pub prompt: String,
    /// Right answer.
    pub reference: Option<String>,
    /// Answers, one for each model, in the order of display.
    pub answers: Vec<SampleAnswer>,
}

/// Answer of one model to a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleAnswer {
    /// Model that answered.
    pub model: RunModel,
    /// Reasoning before the answer.
    pub reasoning: Option<String>,
    /// Answer without the reasoning.
    pub answer: String,
    /// Verdict of the grader; `None` if answers were not graded.
    pub correct: Option<bool>,
    /// Whether the model ended the answer, rather than the limit of tokens.
    pub finished: bool,
}

/// Counts, time and size of a stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageFacts {
    /// Name of the stage.
    pub name: String,
    /// Counts of the stage, in the order of display.
    pub counts: Vec<(String, u64)>,
    /// Number of tokens that the stage read or wrote, if it counts tokens.
    pub tokens: Option<u64>,
    /// Wall-clock seconds of all executions of the stage.
    pub seconds: f64,
    /// Size of the published files, in bytes.
    pub bytes: u64,
}

/// One line of the report's provenance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Name of the entry, such as "teacher".
    pub what: String,
    /// Value of the entry: a path, a hash or a setting.
    pub value: String,
}

/// A model with its accuracy in each of a list of groups.
pub(crate) type GroupRow<'a> = (RunModel, Vec<Option<&'a Interval>>);

impl Report {
    /// Returns the names of all groups, and the accuracy of every model in each group.
    pub(crate) fn accuracy_by_group(&self) -> (Vec<&str>, Vec<GroupRow<'_>>) {
        let teacher = self
            .teacher
            .iter()
            .map(|t| (RunModel::Teacher, &t.accuracy));
        let students = self.students.iter().map(|s| (s.name, &s.accuracy));
        let models: Vec<(RunModel, &Accuracy)> = teacher
            .chain(students)
            .filter_map(|(name, accuracy)| Some((name, accuracy.as_ref()?)))
            .collect();
        let mut names: Vec<&str> = models
            .iter()
            .flat_map(|(_, accuracy)| accuracy.groups.iter().map(|g| g.group.as_str()))
            .collect();
        names.sort_unstable();
        names.dedup();
        let mut rows = Vec::new();
        for (model, accuracy) in models {
            let of_group = |name: &&str| accuracy.groups.iter().find(|g| g.group == **name);
            let accuracies = names
                .iter()
                .map(|n| of_group(n).map(|g| &g.accuracy))
                .collect();
            rows.push((model, accuracies));
        }
        (names, rows)
    }

    /// Returns the figures of each seed of the models that were trained with several seeds.
    pub(crate) fn by_seed(&self) -> Vec<(RunModel, &SeedFigures)> {
        let several = self.students.iter().filter(|s| s.seeds.len() > 1);
        several
            .flat_map(|s| s.seeds.iter().map(|seed| (s.name, seed)))
            .collect()
    }

    /// Whether the teacher's distributions over the held-out text are stored.
    pub(crate) fn has_distributions(&self) -> bool {
        self.students.iter().any(|student| student.kl.is_some())
    }

    /// Writes the report as indented JSON with a newline at the end.
    pub fn to_json(&self) -> String {
        // Serialising strings, numbers and lists cannot fail; serde_json writes a non-finite number as null.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }
}

/// Computes how many seconds the spans cover, each given by its start and length. Overlaps count once.
#[must_use]
pub fn covered_seconds(mut spans: Vec<(f64, f64)>) -> f64 {
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut total, mut end) = (0.0, f64::NEG_INFINITY);
    for (start, length) in spans {
        let new = start + length - end.max(start);
        total += new.max(0.0);
        end = end.max(start + length);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::covered_seconds;

    #[test]
    fn overlapping_spans_count_once() {
        assert_eq!(covered_seconds(vec![]), 0.0);
        assert_eq!(covered_seconds(vec![(5.0, 2.0), (0.0, 3.0)]), 5.0);
        // Spans that overlap, a span within another, and a span that begins where another ends.
        let spans = vec![(0.0, 4.0), (1.0, 5.0), (2.0, 1.0), (6.0, 1.0)];
        assert_eq!(covered_seconds(spans), 7.0);
    }
}
