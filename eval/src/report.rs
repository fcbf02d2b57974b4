//! Content of the report. [`Report::to_markdown`], [`Report::to_json`] and [`Report::to_html`] write it.

use potstill_datasets::{Arm, RunModel, Split, visible_json};
use serde::{Deserialize, Serialize};

use crate::accuracy::Accuracy;
use crate::comparison::Comparison;
use crate::conclusion::Conclusion;
use crate::cost::CostFacts;
use crate::grade::Grader;
use crate::interval::Interval;
use crate::metric::Figure;
use crate::results::{SeedFigures, StudentResult, TeacherResult, TestText, TunedRate};
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
    /// Text that the models were measured on.
    pub test: TestText,
    /// Sizes of the splits, and prompts that occur nearly alike in two of them.
    #[serde(default)]
    pub splits: Option<SplitFacts>,
    /// Rule by which answers were graded, if there are answers.
    pub grader: Option<Grader>,
    /// Figures of the teacher, if the run has one.
    pub teacher: Option<TeacherResult>,
    /// Figures of the base, the unigram, the student and its controls.
    pub students: Vec<StudentResult>,
    /// Paired differences between models.
    pub comparisons: Vec<Comparison>,
    /// Test whether the answers are a sample of the stored distributions; `None` without distributions.
    pub sampling: Option<SamplingCheck>,
    /// Learning rates that were tried for each arm; empty if none was tuned.
    #[serde(default)]
    pub tuning: Vec<TunedRate>,
    /// Figures on dev of the weights of each trained model and of their running mean; empty if none was kept.
    #[serde(default)]
    pub means: Vec<MeanOfWeights>,
    /// Losses of the training, one curve for each trained model.
    pub losses: Vec<LossCurve>,
    /// Test prompts with the answer of every model.
    pub samples: Vec<Sample>,
    /// Counts, time and size of each stage.
    pub stages: Vec<StageFacts>,
    /// Wall-clock seconds of all stages together; less than their sum if some ran at the same time.
    pub seconds: f64,
    /// Cost of the trainings; `None` if no training took time.
    #[serde(default)]
    pub cost: Option<CostFacts>,
    /// Provenance of the numbers.
    pub provenance: Vec<Provenance>,
    /// Commands that reproduce this run.
    pub reproduce: Vec<String>,
}

/// Figures on dev of a trained model and of the running mean of its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MeanOfWeights {
    /// Model that was trained.
    pub name: RunModel,
    /// Seed of the training.
    pub seed: u64,
    /// Step of the checkpoint that is exported.
    pub step: u64,
    /// KL of the weights on the dev prompts, nats per token; the NLL if the teacher's distributions are not stored.
    pub trained: f64,
    /// The same of the running mean of the weights.
    pub mean: f64,
    /// Whether the mean is exported, and is what the figures on test are of.
    pub exports_mean: bool,
}

/// Sizes of the splits, and prompts of dev and test that are nearly in training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SplitFacts {
    /// Size of each split, in the order of training, dev and test.
    pub sizes: Vec<SplitSize>,
    /// Number of prompts of dev and test that are near-duplicates of a training prompt.
    pub near_duplicates: u64,
    /// Number of prompts among `near_duplicates` that belong to test.
    pub near_duplicates_in_test: u64,
    /// The first near-duplicates, those of test before those of dev.
    pub similar: Vec<SimilarPrompts>,
}

/// Size of a split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SplitSize {
    /// The split.
    pub split: Split,
    /// Number of prompts.
    pub prompts: u64,
    /// Number of answers.
    pub sequences: u64,
}

/// A prompt of dev or test, and the training prompt that it is nearly equal to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SimilarPrompts {
    /// Split of the prompt.
    pub split: Split,
    /// Text of the prompt.
    pub prompt: String,
    /// Text of the training prompt.
    pub train_prompt: String,
    /// Similarity of the two, 0 to 1.
    pub similarity: f64,
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
    /// Forward KL to the distributions trained on (for `same_token` and `shuffled`, those of other positions).
    pub forward_kl: f64,
    /// −log q of the target tokens.
    pub cross_entropy: f64,
}

/// A test prompt with the answer of every model.
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

/// One figure of each model by training seed.
pub(crate) struct SeedTable {
    pub(crate) figure: Figure,
    pub(crate) models: Vec<RunModel>,
    /// Rows in the order of the seeds.
    pub(crate) rows: Vec<SeedRow>,
}

/// Figures of the models that were trained with one seed.
pub(crate) struct SeedRow {
    pub(crate) seed: u64,
    /// Values in the order of [`SeedTable::models`].
    pub(crate) values: Vec<Option<f64>>,
    /// Difference between student and SFT control; `None` without the control.
    pub(crate) difference: Option<f64>,
}

/// Learning rates that were tried, as a table with one row for each arm.
pub(crate) struct TuningTable {
    /// All rates, ascending.
    pub(crate) rates: Vec<f64>,
    /// For each arm and each of `rates`, the trial, if there was one.
    pub(crate) rows: Vec<(Arm, Vec<Option<TunedRate>>)>,
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

    /// Returns the comparison that the finding rests on.
    pub(crate) fn primary(&self) -> Option<&Comparison> {
        self.comparisons.iter().find(|c| c.primary)
    }

    /// Returns the figure of the primary comparison by seed; `None` if the student was trained with one seed.
    pub(crate) fn seed_table(&self) -> Option<SeedTable> {
        let figure = match self.has_distributions() {
            true => Figure::Kl,
            false => Figure::Nll,
        };
        let trained: Vec<&StudentResult> = (self.students.iter())
            .filter(|student| student.seeds.len() > 1)
            .collect();
        let value = |model: RunModel, seed: u64| {
            let student = trained.iter().find(|student| student.name == model)?;
            let figures = student.seeds.iter().find(|figures| figures.seed == seed)?;
            figures.figure(figure)
        };
        let student = trained.iter().find(|s| s.name == RunModel::STUDENT)?;
        let models: Vec<RunModel> = trained.iter().map(|student| student.name).collect();
        let row = |figures: &SeedFigures| {
            let seed = figures.seed;
            let pair = (value(RunModel::STUDENT, seed), value(RunModel::SFT, seed));
            SeedRow {
                seed,
                values: models.iter().map(|model| value(*model, seed)).collect(),
                difference: pair.0.zip(pair.1).map(|(student, sft)| student - sft),
            }
        };
        let rows = student.seeds.iter().map(row).collect();
        Some(SeedTable {
            figure,
            rows,
            models,
        })
    }

    /// Returns the learning rates that were tried; `None` if none was tuned.
    pub(crate) fn tuning_table(&self) -> Option<TuningTable> {
        let mut rates: Vec<f64> = self.tuning.iter().map(|t| t.learning_rate).collect();
        rates.sort_by(f64::total_cmp);
        rates.dedup();
        let trial = |arm: Arm, rate: f64| {
            let mut trials = self.tuning.iter();
            trials
                .find(|t| t.arm == arm && t.learning_rate == rate)
                .copied()
        };
        let rows: Vec<(Arm, Vec<Option<TunedRate>>)> = (Arm::ALL.into_iter())
            .filter(|arm| self.tuning.iter().any(|t| t.arm == *arm))
            .map(|arm| (arm, rates.iter().map(|rate| trial(arm, *rate)).collect()))
            .collect();
        (!rows.is_empty()).then_some(TuningTable { rates, rows })
    }

    /// Whether the teacher's distributions over the test text are stored.
    pub(crate) fn has_distributions(&self) -> bool {
        self.students.iter().any(|student| student.kl.is_some())
    }

    /// Writes the report as indented JSON with a newline at the end.
    pub fn to_json(&self) -> String {
        // Serialising strings, numbers and lists cannot fail; serde_json writes a non-finite number as null.
        let json = serde_json::to_string_pretty(self).unwrap_or_default();
        visible_json(&json).into_owned() + "\n"
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
