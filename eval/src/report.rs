//! The report's content; [`Report::to_markdown`] and [`Report::to_json`] write it.

use potstill_datasets::SequenceValues;
use serde::{Deserialize, Serialize};

use crate::{Error, Interval, Metric, Verdict, paired, verdict};

/// Everything a reader needs in order to believe a run, or to doubt it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the run.
    pub run: String,
    /// Version of Potstill that wrote this.
    pub potstill: String,
    /// What the run says, in sentences; see [`Report::conclude`].
    pub verdict: Vec<String>,
    /// What was measured on.
    pub heldout: Heldout,
    /// The start model, the student and its controls.
    pub students: Vec<StudentResult>,
    /// Paired differences.
    pub comparisons: Vec<Comparison>,
    /// What each stage did.
    pub stages: Vec<StageFacts>,
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

/// One model's held-out figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StudentResult {
    /// `untrained`, `student`, or a control's name.
    pub name: String,
    /// What it learned from, in words.
    pub learned_from: String,
    /// Optimizer steps taken.
    pub steps: u64,
    /// Forward KL from the teacher, nats a token.
    pub kl: Interval,
    /// Negative log-likelihood, nats a token.
    pub nll: Interval,
    /// Top-1 agreement with the teacher, 0 to 1.
    pub agreement: Interval,
}

impl StudentResult {
    /// The interval of one metric.
    pub fn metric(&self, metric: Metric) -> &Interval {
        match metric {
            Metric::Kl => &self.kl,
            Metric::Nll => &self.nll,
            Metric::Agreement => &self.agreement,
        }
    }
}

/// A paired difference `left` − `right`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What was compared.
    pub metric: Metric,
    /// The first student's name.
    pub left: String,
    /// The second student's name.
    pub right: String,
    /// left − right, in the metric's unit.
    pub difference: Interval,
    /// What it says about `left`.
    pub verdict: Verdict,
}

/// Compares two students, by name and values, on every metric.
///
/// # Errors
/// Those of [`paired`].
pub fn compare(
    left: (&str, &[SequenceValues]),
    right: (&str, &[SequenceValues]),
    resamples: usize,
    seed: u64,
) -> Result<Vec<Comparison>, Error> {
    let one = |metric| {
        let difference = paired(left.1, right.1, metric, resamples, seed)?;
        Ok(Comparison {
            metric,
            left: left.0.to_owned(),
            right: right.0.to_owned(),
            difference,
            verdict: verdict(metric, &difference),
        })
    };
    Metric::ALL.into_iter().map(one).collect()
}

/// What a stage did, and what it cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageFacts {
    /// The stage's name.
    pub name: String,
    /// Its counts, in the order in which they are shown.
    pub counts: Vec<(String, u64)>,
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

impl Report {
    /// What the comparisons say, in sentences: whether training helped, whether the
    /// teacher's distributions helped over its text, and whether the shuffled control
    /// behaves as it must for that to be believed.
    pub fn conclude(students: &[StudentResult], comparisons: &[Comparison]) -> Vec<String> {
        let kl_of = |name: &str| students.iter().find(|s| s.name == name).map(|s| s.kl.mean);
        let find = |left: &str, right: &str| {
            comparisons
                .iter()
                .find(|c| c.metric == Metric::Kl && c.left == left && c.right == right)
                .zip(kl_of(left).zip(kl_of(right)))
        };
        let mut sentences = Vec::new();
        if let Some((comparison, means)) = find("student", "untrained") {
            let what = match comparison.verdict {
                Verdict::Better => "Training brought the student closer to the teacher",
                Verdict::Worse => "Training took the student further from the teacher",
                Verdict::NoDifference => "Whether training helped cannot be told",
            };
            sentences.push(sentence(what, comparison, means));
        }
        match find("student", "sft") {
            None => sentences.push(
                "Nothing says that the teacher's distributions helped: no `sft` control was measured (`[train] controls`)."
                    .to_owned(),
            ),
            Some((comparison, means)) => {
                let what = match comparison.verdict {
                    Verdict::Better => "Distillation did better than the same text alone",
                    Verdict::Worse => "Distillation did worse than the same text alone",
                    Verdict::NoDifference => {
                        "Whether distillation did better than the same text alone cannot be told"
                    }
                };
                sentences.push(sentence(what, comparison, means));
            }
        }
        if let Some((comparison, means)) = find("sft", "shuffled") {
            let what = match comparison.verdict {
                Verdict::Better => {
                    "The control with shuffled distributions did worse than the text alone, as it must"
                }
                Verdict::Worse => {
                    "Doubt this run: the control with shuffled distributions did better than the text alone"
                }
                Verdict::NoDifference => {
                    "Doubt this run: the control with shuffled distributions cannot be told from the text alone"
                }
            };
            sentences.push(sentence(what, comparison, means));
        }
        sentences
    }

    /// The report as indented JSON, with a newline at the end.
    pub fn to_json(&self) -> String {
        // A report is strings, numbers and lists; serde_json writes even a
        // non-finite number, as null.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// The report as Markdown.
    pub fn to_markdown(&self) -> String {
        crate::report_markdown::write(self)
    }
}

fn sentence(what: &str, comparison: &Comparison, (left, right): (f64, f64)) -> String {
    let Interval {
        mean,
        low,
        high,
        prompts,
    } = comparison.difference;
    format!(
        "{what}: held-out KL {left:.4} against {right:.4} nats a token (difference {mean:+.4}, 95 % interval {low:+.4} to {high:+.4}, {prompts} prompts)."
    )
}
