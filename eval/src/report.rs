//! The report's content; [`Report::to_markdown`], [`Report::to_json`] and
//! [`Report::to_html`] write it.

use potstill_datasets::{RunModel, SequenceValues};
use serde::{Deserialize, Serialize};

use crate::{
    Accuracy, Calibration, Conclusion, Error, Figure, Graded, Grader, Interval, Metric,
    SeedFigures, Verdict, conclusion, paired, paired_accuracy, report_html, report_markdown,
    verdict,
};

/// Everything a reader needs in order to believe a run, or to doubt it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the run.
    pub run: String,
    /// Version of Potstill that wrote this.
    pub potstill: String,
    /// What the run says; see [`Report::conclude`].
    pub conclusion: Conclusion,
    /// What was measured on.
    pub heldout: Heldout,
    /// By what rule an answer is right, where answers were graded.
    pub grader: Option<Grader>,
    /// The teacher, where something of it is known.
    pub teacher: Option<TeacherResult>,
    /// The start model, the student and its controls.
    pub students: Vec<StudentResult>,
    /// Paired differences.
    pub comparisons: Vec<Comparison>,
    /// How training went, one a student that was trained.
    pub losses: Vec<LossCurve>,
    /// Held-out prompts with every model's answer.
    pub samples: Vec<Sample>,
    /// What each stage did.
    pub stages: Vec<StageFacts>,
    /// Wall-clock seconds of all stages together; less than their sum where some ran side by side.
    pub seconds: f64,
    /// Where the numbers come from.
    pub provenance: Vec<Provenance>,
    /// Commands that give this run again.
    pub reproduce: Vec<String>,
}

/// The held-out text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Heldout {
    /// Distinct prompts.
    pub prompts: usize,
    /// Sequences, which is prompts times samples less what curation dropped.
    pub sequences: usize,
    /// Tokens that carry loss.
    pub tokens: u64,
    /// The teacher's own negative log-likelihood of them, nats a token: what a student
    /// that equals the teacher would reach.
    pub teacher_nll: f64,
}

impl Heldout {
    /// Counts what `values` hold; any one student's values give the same.
    ///
    /// # Errors
    /// When they hold no token.
    pub fn from_values(values: &[SequenceValues]) -> Result<Heldout, Error> {
        let mut prompts: Vec<&str> = values.iter().map(|v| v.prompt_id.as_str()).collect();
        prompts.sort_unstable();
        prompts.dedup();
        let tokens: u64 = values.iter().map(|v| u64::from(v.tokens)).sum();
        if tokens == 0 {
            return Err(Error::NoTokens);
        }
        let teacher_nll: f64 = values.iter().map(|v| v.teacher_nll_nats).sum();
        Ok(Heldout {
            prompts: prompts.len(),
            sequences: values.len(),
            tokens,
            teacher_nll: teacher_nll / tokens as f64,
        })
    }
}

/// What is known of the teacher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TeacherResult {
    /// The model's name or path.
    pub name: String,
    /// How many numbers it learned.
    pub parameters: Option<u64>,
    /// Negative log-likelihood of its own answers, nats a token; see
    /// [`teacher_nll`](crate::teacher_nll).
    pub nll: Interval,
    /// Share of right answers.
    pub accuracy: Option<Accuracy>,
}

/// One model's held-out figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StudentResult {
    /// The base, the student or a control.
    pub name: RunModel,
    /// What it learned from, in words.
    pub learned_from: String,
    /// How many numbers it learned.
    pub parameters: Option<u64>,
    /// Optimizer steps taken.
    pub steps: u64,
    /// Forward KL from the teacher, nats a token; none where its distributions are not stored.
    pub kl: Option<Interval>,
    /// Negative log-likelihood, nats a token.
    pub nll: Interval,
    /// Top-1 agreement with the teacher, 0 to 1; none where its distributions are not stored.
    pub agreement: Option<Interval>,
    /// Share of right answers.
    pub accuracy: Option<Accuracy>,
    /// Reliability table and expected calibration error.
    pub calibration: Option<Calibration>,
    /// The figures of each seed that it was trained with; those above are over all of them.
    pub seeds: Vec<SeedFigures>,
}

/// A paired difference `left` − `right`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What was compared.
    pub metric: Figure,
    /// The first model.
    pub left: RunModel,
    /// The second model.
    pub right: RunModel,
    /// left − right, in the metric's unit.
    pub difference: Interval,
    /// What it says about `left`.
    pub verdict: Verdict,
    /// With how many seeds both were trained; what seeds do is in the interval from two on.
    pub seeds: usize,
}

/// Compares two students, by name and values, on every metric.
///
/// # Errors
/// Those of [`paired`].
pub fn compare(
    left: (RunModel, &[SequenceValues]),
    right: (RunModel, &[SequenceValues]),
    resamples: usize,
    seed: u64,
) -> Result<Vec<Comparison>, Error> {
    let one = |metric: Metric| {
        let difference = paired(left.1, right.1, metric, resamples, seed)?;
        Ok(comparison(metric.into(), left.0, right.0, difference))
    };
    Metric::ALL.into_iter().map(one).collect()
}

/// Compares two models, by name and graded answers, on accuracy.
///
/// # Errors
/// Those of [`paired_accuracy`].
pub fn compare_accuracy(
    left: (RunModel, &[Graded]),
    right: (RunModel, &[Graded]),
    resamples: usize,
    seed: u64,
) -> Result<Comparison, Error> {
    let difference = paired_accuracy(left.1, right.1, resamples, seed)?;
    Ok(comparison(Figure::Accuracy, left.0, right.0, difference))
}

fn comparison(metric: Figure, left: RunModel, right: RunModel, difference: Interval) -> Comparison {
    Comparison {
        metric,
        left,
        right,
        difference,
        verdict: verdict(metric, &difference),
        seeds: 1,
    }
}

/// How one student's training went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LossCurve {
    /// The student.
    pub name: RunModel,
    /// By step, ascending.
    pub points: Vec<LossPoint>,
}

/// One step of training; means over its loss tokens, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossPoint {
    /// From 1.
    pub step: u64,
    /// What was minimised.
    pub loss: f64,
    /// Forward KL to the distributions trained on (for `shuffled`, the shuffled ones).
    pub forward_kl: f64,
    /// −log q of the realised tokens.
    pub cross_entropy: f64,
}

/// A held-out prompt with every model's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The prompt's id.
    pub prompt_id: String,
    /// Which part of the task it belongs to.
    pub group: Option<String>,
    /// What was asked.
    pub prompt: String,
    /// What is right.
    pub reference: Option<String>,
    /// One a model, in the order in which they are shown.
    pub answers: Vec<SampleAnswer>,
}

/// One model's answer to a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampleAnswer {
    /// The model that answered.
    pub model: RunModel,
    /// What it wrote before the answer.
    pub reasoning: Option<String>,
    /// The answer.
    pub answer: String,
    /// Whether a grader found it right; none where nothing was graded.
    pub correct: Option<bool>,
    /// Whether the model ended it by itself, rather than by the limit of tokens.
    pub finished: bool,
}

/// What a stage did, and what it cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageFacts {
    /// The stage's name.
    pub name: String,
    /// Its counts, in the order in which they are shown.
    pub counts: Vec<(String, u64)>,
    /// Tokens that it read or wrote, where it has to do with tokens.
    pub tokens: Option<u64>,
    /// Wall-clock seconds over all its runs.
    pub seconds: f64,
    /// Bytes of what it published.
    pub bytes: u64,
}

/// One line about where the numbers come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// What it is about, such as "teacher".
    pub what: String,
    /// The value: a path, a hash, a setting.
    pub value: String,
}

/// A model, and its accuracy in each of a list of groups.
pub(crate) type GroupRow<'a> = (RunModel, Vec<Option<&'a Interval>>);

impl Report {
    /// Every group's name, and every model's accuracy in each.
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
            let of = |name: &&str| accuracy.groups.iter().find(|g| g.group == **name);
            let accuracies = names.iter().map(|n| of(n).map(|g| &g.accuracy)).collect();
            rows.push((model, accuracies));
        }
        (names, rows)
    }

    /// Every seed's figures with the model's name; nothing where all had one seed.
    pub(crate) fn by_seed(&self) -> Vec<(RunModel, &SeedFigures)> {
        let several = self.students.iter().filter(|s| s.seeds.len() > 1);
        several
            .flat_map(|s| s.seeds.iter().map(|seed| (s.name, seed)))
            .collect()
    }

    /// What the comparisons say: whether distillation helps here, how sure that is, what
    /// accuracy says beside it, and whether the controls behave as they must for that to be
    /// believed. It reads the base, the student and the controls with the run's own seed,
    /// and the pairs student − sft, student − untrained, student − shuffled and
    /// sft − shuffled; those that are missing are not spoken of.
    pub fn conclude(
        teacher: Option<&TeacherResult>,
        students: &[StudentResult],
        comparisons: &[Comparison],
    ) -> Conclusion {
        conclusion::conclude(teacher, students, comparisons)
    }

    /// Whether the teacher's distributions over the held-out text are stored.
    pub(crate) fn has_distributions(&self) -> bool {
        self.students.iter().any(|student| student.kl.is_some())
    }

    /// The report as indented JSON, with a newline at the end.
    pub fn to_json(&self) -> String {
        // A report is strings, numbers and lists; serde_json writes even a
        // non-finite number, as null.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// The report as Markdown.
    pub fn to_markdown(&self) -> String {
        report_markdown::write(self)
    }

    /// The report as one HTML file that needs no network: styles, plots and script are in
    /// it.
    ///
    /// # Errors
    /// When a plot cannot be drawn.
    pub fn to_html(&self) -> Result<String, Error> {
        report_html::write(self)
    }
}

/// Computes the seconds that stages took together. Each span has a start and a length; time that several
/// spans share counts once.
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
    fn shared_time_counts_once() {
        assert_eq!(covered_seconds(vec![]), 0.0);
        assert_eq!(covered_seconds(vec![(5.0, 2.0), (0.0, 3.0)]), 5.0);
        // The second span overlaps the first, the third is within the second, the last touches its end.
        let spans = vec![(0.0, 4.0), (1.0, 5.0), (2.0, 1.0), (6.0, 1.0)];
        assert_eq!(covered_seconds(spans), 7.0);
    }
}
