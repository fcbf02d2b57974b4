//! Conclusion of a run: whether distillation helps, and how certain that is.
//!
//! The finding depends on one paired interval: the held-out KL of the student minus that of the SFT control, which
//! learned from the same text for the same number of steps without the teacher's distributions. All other
//! comparisons are reported beside the finding, whatever their verdict.
//!
//! With one seed the interval covers the variance between prompts only, so with many prompts it can exclude zero for a
//! difference that is due to the seed. With two seeds the estimate of the variance between seeds is poor. With fewer
//! than [`MIN_SEEDS`] seeds a difference must therefore also exceed the usual variation between seeds
//! ([`SEED_SHARE`]).

use potstill_datasets::RunModel;
use serde::{Deserialize, Serialize};

use crate::metric::Figure;
use crate::results::{Comparison, StudentResult, TeacherResult, TunedRate};
use crate::sampling::SamplingCheck;
use crate::verdict::{MIN_PROMPTS, Verdict};
use crate::wording;

/// Smallest difference that is a finding with fewer than [`MIN_SEEDS`] seeds, as a share of the KL of the SFT control. In
/// our own runs other seeds changed the KL by up to 3.4 % (docs/log.md). With more `seeds` in `[train]` the variation is
/// measured instead.
pub const SEED_SHARE: f64 = 0.05;

/// Smallest number of seeds whose variance is a sufficient estimate.
pub const MIN_SEEDS: usize = 3;

/// Answer to the question whether distillation helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// The student is closer to the teacher than the SFT control, and chance does not explain the difference.
    Helps,
    /// The interval includes zero, or there are too few prompts or seeds.
    NoDifference,
    /// The student is further from the teacher than the SFT control, and chance does not explain the difference.
    Hurts,
    /// With fewer than 3 seeds: the student is closer to the teacher than the SFT control. This is about these two models,
    /// not about the method.
    StudentCloser,
    /// With fewer than 3 seeds: the student is further from the teacher than the SFT control. This is about these two
    /// models, not about the method.
    StudentFurther,
    /// With fewer than 3 seeds: neither model is shown to be closer to the teacher.
    NeitherCloser,
    /// Fewer than 30 prompts: a direction, but no claim.
    Exploratory,
    /// The run has no SFT control to compare with.
    NotMeasured,
    /// The student was trained on text only: the teacher's distributions are not stored.
    TextAlone,
}

impl Finding {
    /// Returns the finding from the comparison of student and SFT control by KL, and the KL of the SFT control.
    pub fn of(comparison: Option<&Comparison>, sft: f64) -> Finding {
        let Some(comparison) = comparison else {
            return Finding::NotMeasured;
        };
        match comparison.verdict {
            _ if is_within_seed_variation(comparison, sft) => Finding::NoDifference,
            Verdict::Better => Finding::Helps,
            Verdict::NoDifference => Finding::NoDifference,
            Verdict::Worse => Finding::Hurts,
        }
    }

    /// The finding in one sentence.
    pub fn headline(self) -> &'static str {
        match self {
            Finding::Helps => "Distillation helps here.",
            Finding::NoDifference => "No difference shown: distillation may or may not help here.",
            Finding::Hurts => "Distillation hurts here.",
            Finding::StudentCloser => {
                "The student is closer to the teacher than the control `sft`."
            }
            Finding::StudentFurther => {
                "The student is further from the teacher than the control `sft`."
            }
            Finding::NeitherCloser => "Neither model is shown to be closer to the teacher.",
            Finding::Exploratory => "Exploratory: too few prompts for a finding.",
            Finding::NotMeasured => {
                "Whether distillation helps was not measured: the run has no control `sft` (`controls` in `[train]`)."
            }
            Finding::TextAlone => {
                "The student was trained on text only, without a teacher's distributions, so there is no distillation to evaluate."
            }
        }
    }
}

/// Whether a difference from fewer than [`MIN_SEEDS`] seeds is within the usual variation between seeds.
fn is_within_seed_variation(comparison: &Comparison, sft: f64) -> bool {
    comparison.seeds < MIN_SEEDS && comparison.difference.mean.abs() < SEED_SHARE * sft
}

/// Conclusion of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Conclusion {
    /// The finding.
    pub finding: Finding,
    /// The finding in one sentence.
    pub headline: String,
    /// Evidence for the finding and its certainty, most important first.
    pub sentences: Vec<String>,
    /// Reasons to doubt the run; empty if there are none.
    pub doubts: Vec<String>,
}

/// Evidence that a conclusion is drawn from.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    /// Figures of the teacher, if the run has one.
    pub teacher: Option<&'a TeacherResult>,
    /// Figures of the base, the student and its controls.
    pub students: &'a [StudentResult],
    /// Paired differences between models.
    pub comparisons: &'a [Comparison],
    /// Learning rates that were tried; empty if none was tuned.
    pub tuning: &'a [TunedRate],
    /// Result of the sampling test, if distributions are stored.
    pub sampling: Option<&'a SamplingCheck>,
}

impl<'a> Evidence<'a> {
    /// Evidence that consists of the figures of the models and their differences.
    #[must_use]
    pub fn of(students: &'a [StudentResult], comparisons: &'a [Comparison]) -> Evidence<'a> {
        Evidence {
            teacher: None,
            students,
            comparisons,
            tuning: &[],
            sampling: None,
        }
    }
}

/// Draws the conclusion from the comparisons: whether distillation helps, how certain that is, the difference in
/// accuracy, and whether the controls behave as expected. Uses the pairs student − sft, student − untrained,
/// student − shuffled and sft − shuffled, and skips the pairs that are missing.
#[must_use]
pub fn conclude(results: &Evidence<'_>) -> Conclusion {
    let comparison_with_sft = results.find(Figure::Kl, RunModel::STUDENT, RunModel::SFT);
    let sft = results
        .student(RunModel::SFT)
        .and_then(|sft| sft.kl)
        .map_or(0.0, |kl| kl.mean);
    let finding = match results.students.iter().any(|student| student.kl.is_some()) {
        true => Finding::of(comparison_with_sft, sft),
        false => Finding::TextAlone,
    };
    let mut sentences = Vec::new();
    let mut doubts = Vec::new();
    if let Some(comparison) = comparison_with_sft {
        sentences.push(results.closeness(comparison, finding));
        sentences.push(certainty(comparison, finding));
        sentences.push(results.accuracy(finding));
    }
    results.training(&mut sentences, &mut doubts);
    results.controls(&mut sentences, &mut doubts);
    if let Some(sampling) = results.sampling {
        doubts.extend(sampling.fault());
        let bias = comparison_with_sft.and_then(|_| sampling.sft_bias());
        doubts.extend(bias);
    }
    Conclusion {
        finding,
        headline: finding.headline().to_owned(),
        sentences,
        doubts,
    }
}

impl Evidence<'_> {
    fn find(&self, figure: Figure, left: RunModel, right: RunModel) -> Option<&Comparison> {
        self.comparisons
            .iter()
            .find(|c| c.metric == figure && c.left == left && c.right == right)
    }

    fn student(&self, name: RunModel) -> Option<&StudentResult> {
        self.students.iter().find(|s| s.name == name)
    }

    /// Formats the figures of the two models and their difference: "held-out KL 0.5 against 0.8 …".
    fn figures(&self, comparison: &Comparison) -> String {
        let mean = |model: RunModel| {
            let student = self.student(model)?;
            let value = match comparison.metric {
                Figure::Kl => student.kl?.mean,
                Figure::Nll => student.nll.mean,
                Figure::Agreement => student.agreement?.mean,
                Figure::Accuracy => student.accuracy.as_ref()?.overall.mean,
                Figure::OwnTextKl => student.own_text_kl?.mean,
                Figure::Calibration => return None,
            };
            Some(wording::value(comparison.metric, value))
        };
        let values = match (mean(comparison.left), mean(comparison.right)) {
            (Some(left), Some(right)) => format!("{left} against {right}"),
            _ => "(unknown for one of the models)".to_owned(),
        };
        let Comparison {
            metric, difference, ..
        } = comparison;
        format!(
            "held-out {} {values}{} (difference {}, 95 % interval {}, {} prompts)",
            metric.name(),
            wording::unit(*metric),
            wording::signed(*metric, difference.mean),
            wording::from_to(*metric, difference),
            difference.prompts,
        )
    }

    /// Distance of the student from the teacher, compared with the SFT control.
    fn closeness(&self, comparison: &Comparison, finding: Finding) -> String {
        const CONTROL: &str = "Both models have the same start, text and number of steps, and `sft` was trained without the teacher's probabilities.";
        let share = self
            .student(RunModel::SFT)
            .and_then(|sft| sft.kl)
            .filter(|kl| kl.mean > 0.0)
            .map(|kl| 100.0 * comparison.difference.mean.abs() / kl.mean);
        let by = share.map_or(String::new(), |share| format!("{share:.0} % "));
        let figures = self.figures(comparison);
        let result = match finding {
            Finding::Helps => format!("is {by}closer to the teacher than the control `sft`"),
            Finding::Hurts => format!("is {by}further from the teacher than the control `sft`"),
            _ => "shows no difference from the control `sft` in its distance to the teacher"
                .to_owned(),
        };
        format!("The student {result}: {figures}. {CONTROL}")
    }

    /// Accuracy, reported whatever its verdict, and also if it was not measured.
    fn accuracy(&self, finding: Finding) -> String {
        let teacher = self.teacher.and_then(|t| t.accuracy.as_ref());
        let teacher = teacher.map_or(String::new(), |accuracy| {
            let share = wording::value(Figure::Accuracy, accuracy.overall.mean);
            format!(" The teacher's accuracy is {share}.")
        });
        let Some(comparison) = self.find(Figure::Accuracy, RunModel::STUDENT, RunModel::SFT) else {
            return format!(
                "Accuracy was not measured for both models, so the finding is about the distance to the teacher and not about right answers.{teacher}"
            );
        };
        let result = match (comparison.verdict, finding) {
            (Verdict::NoDifference, _) => "Accuracy shows no difference",
            (Verdict::Better, Finding::Helps) => "The student's accuracy is better too",
            (Verdict::Worse, Finding::Hurts) => "The student's accuracy is worse too",
            (Verdict::Better, _) => "However, the student's accuracy is better",
            (Verdict::Worse, _) => "However, the student's accuracy is worse",
        };
        format!("{result}: {}.{teacher}", self.figures(comparison))
    }

    /// Compares the student with the base.
    fn training(&self, sentences: &mut Vec<String>, doubts: &mut Vec<String>) {
        let with_base = |figure| self.find(figure, RunModel::STUDENT, RunModel::Base);
        let (comparison, closer, further) = match (with_base(Figure::Kl), with_base(Figure::Nll)) {
            (Some(kl), _) => (kl, "closer to the teacher", "further from the teacher"),
            (None, Some(nll)) => (nll, "closer to the text", "further from the text"),
            (None, None) => return,
        };
        let figures = self.figures(comparison);
        match comparison.verdict {
            Verdict::Better => {
                sentences.push(format!("Training moved the student {closer}: {figures}."))
            }
            Verdict::Worse => {
                doubts.push(format!("Training moved the student {further}: {figures}."))
            }
            Verdict::NoDifference => doubts.push(format!(
                "It is not shown that training moved the student {closer}: {figures}."
            )),
        }
    }

    /// Checks that the shuffled control is worse than the others. If it is not, the differences are not due to the
    /// content of the teacher's distributions.
    fn controls(&self, sentences: &mut Vec<String>, doubts: &mut Vec<String>) {
        for left in [RunModel::STUDENT, RunModel::SFT] {
            let Some(comparison) = self.find(Figure::Kl, left, RunModel::SHUFFLED) else {
                continue;
            };
            let figures = self.figures(comparison);
            match comparison.verdict {
                Verdict::Better => sentences.push(format!(
                    "The control `shuffled`, trained on shuffled distributions, is worse than `{left}`, as expected: {figures}."
                )),
                Verdict::Worse => doubts.push(format!(
                    "The control `shuffled`, trained on shuffled distributions, is better than `{left}`, although it should be worse: {figures}."
                )),
                Verdict::NoDifference => doubts.push(format!(
                    "The control `shuffled`, trained on shuffled distributions, shows no difference from `{left}`, although it should be worse: {figures}."
                )),
            }
        }
    }
}

/// Describes the certainty of the finding for readers who do not know confidence intervals.
fn certainty(comparison: &Comparison, finding: Finding) -> String {
    let prompts = comparison.difference.prompts;
    let seeds = match comparison.seeds {
        0 | 1 => "The interval covers the variation between prompts, but not the variation between training seeds (`seeds` in `[train]`).".to_owned(),
        seeds => format!("The interval covers the variation between prompts and between training seeds, of which there were {seeds}."),
    };
    if prompts < MIN_PROMPTS {
        return format!(
            "Certainty: none. {prompts} held-out prompts are too few for a finding; at least {MIN_PROMPTS} are needed (`heldout` in `[curate]`)."
        );
    }
    match (finding, comparison.verdict) {
        (Finding::Helps | Finding::Hurts, _) => format!(
            "Certainty: the 95 % interval of the difference excludes zero; about one in twenty such intervals misses the true difference. {seeds}"
        ),
        (_, Verdict::NoDifference) => format!(
            "Certainty: the 95 % interval of the difference includes zero, so the difference may be due to chance. More held-out prompts make the interval narrower. {seeds}"
        ),
        (_, Verdict::Better | Verdict::Worse) => format!(
            "Certainty: the 95 % interval of the difference excludes zero, but the difference is less than {:.0} % of the KL of `sft`, and with fewer than {MIN_SEEDS} seeds such a small difference may be due to the seed. Set `seeds = {MIN_SEEDS}` in `[train]` to measure the variation between seeds.",
            100.0 * SEED_SHARE
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare;
    use crate::example::{report, students_only};
    use crate::interval::Interval;

    fn conclusion_of(kls: &[(RunModel, f64)], prompts: usize) -> Conclusion {
        students_only(kls, prompts).conclusion
    }

    fn text(conclusion: &Conclusion) -> String {
        let Conclusion {
            headline,
            sentences,
            doubts,
            ..
        } = conclusion;
        format!(
            "{headline}\n\n{}\n\nDoubts:\n{}",
            sentences.join("\n"),
            doubts.join("\n")
        )
    }

    /// Concludes from 40 prompts on which student and control differ by `gap` nats per token on average, with noise.
    fn noisy(gap: f64) -> Conclusion {
        let mut run = students_only(&[(RunModel::STUDENT, 1.0), (RunModel::SFT, 1.0)], 40);
        let a: Vec<_> = (0..40).map(|i| values(i, 1.0)).collect();
        let b: Vec<_> = (0..40)
            .map(|i| values(i, 1.0 + gap + 0.2 * ((i * 7 % 13) as f64 - 6.0) / 6.0))
            .collect();
        run.comparisons = compare((RunModel::STUDENT, &a), (RunModel::SFT, &b), 2000, 7).unwrap();
        conclude(&Evidence::of(&run.students, &run.comparisons))
    }

    fn values(i: usize, kl: f64) -> potstill_datasets::SequenceValues {
        potstill_datasets::SequenceValues {
            prompt_id: format!("p{i}"),
            sample_index: 0,
            tokens: 10,
            kl_nats: 10.0 * kl,
            nll_nats: 10.0 * kl,
            agree: 5,
            teacher_nll_nats: 1.0,
            teacher_entropy_nats: 1.0,
            confidence: Vec::new(),
            expected: Vec::new(),
        }
    }

    #[test]
    fn distillation_that_helps() {
        let found = conclusion_of(
            &[
                (RunModel::Base, 4.0),
                (RunModel::STUDENT, 0.5),
                (RunModel::SFT, 0.8),
                (RunModel::SHUFFLED, 2.0),
            ],
            40,
        );
        assert_eq!(found.finding, Finding::Helps);
        assert!(found.doubts.is_empty());
        insta::assert_snapshot!(text(&found));
        assert_eq!(noisy(0.1).finding, Finding::Helps);
    }

    #[test]
    fn distillation_that_makes_no_difference() {
        let same = conclusion_of(
            &[
                (RunModel::Base, 4.0),
                (RunModel::STUDENT, 0.5),
                (RunModel::SFT, 0.5),
            ],
            40,
        );
        assert_eq!(same.finding, Finding::NoDifference);
        insta::assert_snapshot!(text(&same));
        for gap in [0.02, -0.02] {
            assert_eq!(noisy(gap).finding, Finding::NoDifference, "{gap}");
        }
        // The interval excludes zero, but the difference is within the usual variation between seeds.
        let small = conclusion_of(&[(RunModel::STUDENT, 0.49), (RunModel::SFT, 0.5)], 40);
        assert_eq!(small.finding, Finding::NoDifference);
        insta::assert_snapshot!(text(&small));
    }

    #[test]
    fn distillation_that_hurts() {
        let found = conclusion_of(
            &[
                (RunModel::Base, 4.0),
                (RunModel::STUDENT, 4.5),
                (RunModel::SFT, 2.0),
                (RunModel::SHUFFLED, 2.0),
            ],
            40,
        );
        assert_eq!(found.finding, Finding::Hurts);
        insta::assert_snapshot!(text(&found));
        assert_eq!(noisy(-0.1).finding, Finding::Hurts);
    }

    #[test]
    fn with_four_prompts_or_without_a_control_there_is_no_finding() {
        let small = conclusion_of(
            &[
                (RunModel::Base, 4.0),
                (RunModel::STUDENT, 0.5),
                (RunModel::SFT, 0.8),
            ],
            4,
        );
        assert_eq!(small.finding, Finding::NoDifference);
        insta::assert_snapshot!(text(&small));
        let alone = conclusion_of(&[(RunModel::Base, 4.0), (RunModel::STUDENT, 0.5)], 40);
        assert_eq!(alone.finding, Finding::NotMeasured);
        insta::assert_snapshot!(text(&alone));
    }

    #[test]
    fn accuracy_is_reported_whatever_its_verdict() {
        let run = report();
        let sentence = |verdict, mean: f64| {
            let mut comparisons = run.comparisons.clone();
            let accuracy = comparisons
                .iter_mut()
                .find(|c| c.metric == Figure::Accuracy && c.right == RunModel::SFT)
                .unwrap();
            accuracy.verdict = verdict;
            accuracy.difference = Interval {
                mean,
                low: mean - 0.05,
                high: mean + 0.05,
                prompts: 198,
            };
            let found = conclude(&Evidence {
                teacher: run.teacher.as_ref(),
                ..Evidence::of(&run.students, &comparisons)
            });
            assert_eq!(
                found.finding,
                Finding::Helps,
                "accuracy does not change the finding"
            );
            found.sentences[2].clone()
        };
        let sentences = [
            sentence(Verdict::Better, 0.06),
            sentence(Verdict::NoDifference, 0.01),
            sentence(Verdict::Worse, -0.06),
        ];
        insta::assert_snapshot!(sentences.join("\n"));
    }
}
