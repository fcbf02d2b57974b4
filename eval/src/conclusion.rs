//! Conclusion of a run: whether distillation helps, and how certain that is.
//!
//! The finding depends on one paired comparison: the test KL of the student minus that of the SFT control, which learned
//! from the same text for the same number of steps without the teacher's distributions. All other comparisons are reported
//! beside the finding, whatever their verdict.

use potstill_datasets::RunModel;
use serde::{Deserialize, Serialize};

use crate::comparison::{Comparison, MIN_FINDING_PROMPTS, Verdict};
use crate::estimate::{LEVEL, MIN_SEEDS};
use crate::finding::Finding;
use crate::metric::Figure;
use crate::results::{StudentResult, TeacherResult, TunedRate};
use crate::sampling::SamplingCheck;
use crate::wording;

/// Number of seeds that is recommended for a finding about the method.
const GOOD_SEEDS: usize = 5;

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
/// accuracy, whether the student learned anything, and whether the controls behave as expected. Skips the pairs of models
/// that are missing.
#[must_use]
pub fn conclude(evidence: &Evidence<'_>) -> Conclusion {
    let with_sft = evidence.find(Figure::Kl, RunModel::STUDENT, RunModel::SFT);
    let has_distributions = evidence.students.iter().any(|student| student.kl.is_some());
    let finding = match has_distributions {
        true => Finding::of(with_sft),
        false => Finding::TextAlone,
    };
    let mut sentences = Vec::new();
    let mut doubts = Vec::new();
    if let Some(comparison) = with_sft {
        sentences.push(evidence.closeness(comparison, finding));
        sentences.push(certainty(comparison));
        sentences.push(evidence.accuracy(finding));
        sentences.push(evidence.rates());
        doubts.extend(evidence.disagreement(comparison));
    }
    evidence.training(&mut sentences, &mut doubts);
    evidence.controls(finding, &mut sentences, &mut doubts);
    evidence.tuned_ends(&mut doubts);
    if let Some(sampling) = evidence.sampling {
        doubts.extend(sampling.fault());
        doubts.extend(with_sft.and_then(|_| sampling.sft_bias()));
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

    /// Finds the comparison of the distance to the teacher; without distributions, to the text.
    fn find_distance(&self, left: RunModel, right: RunModel) -> Option<&Comparison> {
        let kl = self.find(Figure::Kl, left, right);
        kl.or_else(|| self.find(Figure::Nll, left, right))
    }

    fn student(&self, name: RunModel) -> Option<&StudentResult> {
        self.students.iter().find(|s| s.name == name)
    }

    /// Formats the figures of the two models and their difference: "test KL 0.5 against 0.8 …".
    fn figures(&self, comparison: &Comparison) -> String {
        let mean = |model: RunModel| {
            let student = self.student(model)?;
            let value = match comparison.metric {
                Figure::Kl => student.kl?.mean,
                Figure::Nll => student.nll.mean,
                Figure::Agreement => student.agreement?.mean,
                Figure::Accuracy => student.accuracy.as_ref()?.overall.mean,
                Figure::OwnTextKl => student.own_text_kl?.mean,
                Figure::Calibration => student.calibration.as_ref()?.distance?.mean,
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
        let seeds = match comparison.seeds {
            0 | 1 => String::new(),
            seeds => format!(", {seeds} seeds"),
        };
        // An interval is not corrected for the number of comparisons, so it can exclude zero where p is large.
        let p_value = match comparison.primary {
            true => wording::p_value(comparison.adjusted_p),
            false => format!("corrected {}", wording::p_value(comparison.adjusted_p)),
        };
        format!(
            "test {} {values}{} (difference {}, 95 % interval {}, {p_value}, {} prompts{seeds})",
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
        let direction = match comparison.difference.mean < 0.0 {
            true => "closer to",
            false => "further from",
        };
        let result = match finding {
            Finding::Helps | Finding::Hurts | Finding::StudentCloser | Finding::StudentFurther => {
                format!("The student is {by}{direction} the teacher than the control `sft`")
            }
            Finding::Exploratory => format!(
                "On these few prompts the student was {by}{direction} the teacher than the control `sft`"
            ),
            Finding::NoDifference
            | Finding::NeitherCloser
            | Finding::NotMeasured
            | Finding::TextAlone => {
                "The student shows no difference from the control `sft` in its distance to the teacher"
                    .to_owned()
            }
        };
        format!("{result}: {}. {CONTROL}", self.figures(comparison))
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
        let is_negative = matches!(finding, Finding::Hurts | Finding::StudentFurther);
        let result = match comparison.verdict {
            Verdict::NoDifference => "Accuracy shows no difference",
            Verdict::Better if finding.is_positive() => "The student's accuracy is better too",
            Verdict::Worse if is_negative => "The student's accuracy is worse too",
            Verdict::Better => "However, the student's accuracy is better",
            Verdict::Worse => "However, the student's accuracy is worse",
        };
        let figures = self.figures(comparison);
        let missed = missed(comparison);
        format!("{result}: {figures}.{missed}{teacher}")
    }

    /// Tells how the learning rates were chosen.
    fn rates(&self) -> String {
        match self.tuning.is_empty() {
            true => "No learning rate was tuned, so another rate may suit one of the models better (`learning_rates` in `[train]`).".to_owned(),
            false => "Each model was trained with the learning rate that was best on the dev prompts.".to_owned(),
        }
    }

    /// Doubt if KL and NLL point in opposite directions. On text that the teacher sampled, their differences between two
    /// models have the same expectation.
    fn disagreement(&self, kl: &Comparison) -> Option<String> {
        let nll = self.find(Figure::Nll, kl.left, kl.right)?;
        let are_opposite = kl.difference.mean * nll.difference.mean < 0.0;
        (are_opposite && kl.p_value <= LEVEL && nll.p_value <= LEVEL).then(|| {
            format!(
                "KL and NLL disagree: {}, but {}. On text that the teacher sampled at temperature 1 both differences should be equal.",
                self.figures(kl),
                self.figures(nll)
            )
        })
    }

    /// Compares the student with the base.
    fn training(&self, sentences: &mut Vec<String>, doubts: &mut Vec<String>) {
        let Some(comparison) = self.find_distance(RunModel::STUDENT, RunModel::Base) else {
            return;
        };
        let what = match comparison.metric {
            Figure::Nll => "text",
            _ => "teacher",
        };
        let figures = self.figures(comparison);
        match comparison.verdict {
            Verdict::Better => sentences.push(format!(
                "Training moved the student closer to the {what}: {figures}."
            )),
            Verdict::Worse => doubts.push(format!(
                "Training moved the student further from the {what}: {figures}."
            )),
            Verdict::NoDifference => doubts.push(format!(
                "It is not shown that training moved the student closer to the {what}: {figures}."
            )),
        }
    }

    /// Checks that the controls are worse than the student, and than the SFT control. If they are not, a difference between
    /// student and SFT control is not due to the teacher's distributions in their context.
    fn controls(&self, finding: Finding, sentences: &mut Vec<String>, doubts: &mut Vec<String>) {
        const CONTROLS: [(RunModel, RunModel, &str); 6] = [
            (
                RunModel::STUDENT,
                RunModel::SAME_TOKEN,
                "trained on distributions of other positions with the same target token",
            ),
            (
                RunModel::STUDENT,
                RunModel::SMOOTHING,
                "trained on the text with label smoothing",
            ),
            (
                RunModel::STUDENT,
                RunModel::SHUFFLED,
                "trained on shuffled distributions",
            ),
            (
                RunModel::STUDENT,
                RunModel::Unigram,
                "which ignores the context",
            ),
            (
                RunModel::SFT,
                RunModel::Unigram,
                "which ignores the context",
            ),
            (
                RunModel::SFT,
                RunModel::SHUFFLED,
                "trained on shuffled distributions",
            ),
        ];
        for (model, control, description) in CONTROLS {
            let Some(comparison) = self.find_distance(model, control) else {
                continue;
            };
            let figures = self.figures(comparison);
            let named = format!("The control `{control}`, {description},");
            if comparison.verdict == Verdict::Better {
                sentences.push(format!(
                    "{named} is worse than `{model}`, as expected: {figures}."
                ));
                continue;
            }
            let result = match comparison.verdict {
                Verdict::Worse => "is better than",
                _ => "shows no difference from",
            };
            // These two may well be as good as a student that is not better than `sft`.
            let explains_less = [RunModel::SAME_TOKEN, RunModel::SMOOTHING].contains(&control);
            match explains_less && !finding.is_positive() {
                true => sentences.push(format!("{named} {result} `{model}`: {figures}.")),
                false => doubts.push(format!(
                    "{named} {result} `{model}`, although it should be worse: {figures}."
                )),
            }
        }
    }

    /// Doubts about rates that were chosen at an end of the list.
    fn tuned_ends(&self, doubts: &mut Vec<String>) {
        for chosen in self.tuning.iter().filter(|rate| rate.chosen) {
            let same_arm = self.tuning.iter().filter(|rate| rate.arm == chosen.arm);
            let rates: Vec<f64> = same_arm.map(|rate| rate.learning_rate).collect();
            let end = match chosen.learning_rate {
                rate if rates.iter().all(|other| *other <= rate) => "largest",
                rate if rates.iter().all(|other| *other >= rate) => "smallest",
                _ => continue,
            };
            if rates.len() > 1 {
                doubts.push(format!(
                    "The best learning rate of `{}` on the dev prompts is {}, the {end} of the {} that were tried, so a better one may lie outside (`learning_rates` in `[train]`).",
                    chosen.arm.name(),
                    chosen.learning_rate,
                    rates.len(),
                ));
            }
        }
    }
}

/// Describes the certainty of the finding for readers who do not know confidence intervals.
fn certainty(comparison: &Comparison) -> String {
    let prompts = comparison.difference.prompts;
    let p = wording::p_value(comparison.p_value);
    let covers = match comparison.seeds >= MIN_SEEDS {
        true => format!(
            "The interval covers the variation between prompts and between training seeds, of which there were {}.",
            comparison.seeds
        ),
        false => format!(
            "The interval covers the variation between prompts, but not between training seeds, so it is about these models and not about the method: set `seeds` in `[train]` to at least {MIN_SEEDS}, better {GOOD_SEEDS}."
        ),
    };
    let result = if prompts < MIN_FINDING_PROMPTS {
        format!(
            "{p}, but {prompts} test prompts are too few for a finding, which needs at least {MIN_FINDING_PROMPTS} (`test` in `[curate]`)."
        )
    } else if comparison.verdict == Verdict::NoDifference {
        format!("{p}, so the difference may be due to chance.")
    } else {
        format!("{p}: chance alone would rarely make a difference this large.")
    };
    format!("Certainty: {result} {covers}{}", missed(comparison))
}

/// Names the smallest difference that the comparison would usually find.
fn missed(comparison: &Comparison) -> String {
    comparison.detectable.map_or(String::new(), |detectable| {
        let difference = wording::magnitude(comparison.metric, detectable);
        format!(" A true difference of less than {difference} would often be missed.")
    })
}

#[cfg(test)]
mod tests {
    use potstill_datasets::Arm;

    use super::*;
    use crate::example::{measurements, report, report_of, students_only};
    use crate::interval::Interval;

    const RUN: [(RunModel, f64); 6] = [
        (RunModel::Base, 4.0),
        (RunModel::Unigram, 3.0),
        (RunModel::STUDENT, 0.5),
        (RunModel::SFT, 0.8),
        (RunModel::SAME_TOKEN, 0.9),
        (RunModel::SHUFFLED, 2.0),
    ];

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

    #[test]
    fn distillation_that_helps() {
        let found = conclusion_of(&RUN, 40);
        assert_eq!(found.finding, Finding::Helps);
        assert!(found.doubts.is_empty(), "{:?}", found.doubts);
        insta::assert_snapshot!(text(&found));
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
    }

    #[test]
    fn distillation_that_hurts() {
        let found = conclusion_of(
            &[
                (RunModel::Base, 4.0),
                (RunModel::STUDENT, 4.5),
                (RunModel::SFT, 2.0),
                (RunModel::SAME_TOKEN, 2.0),
                (RunModel::SHUFFLED, 2.0),
            ],
            40,
        );
        assert_eq!(found.finding, Finding::Hurts);
        insta::assert_snapshot!(text(&found));
    }

    /// The differences that are a finding about the method with three seeds are about the models with two.
    #[test]
    fn with_two_seeds_the_finding_is_about_the_models() {
        for (student, finding) in [
            (0.5, Finding::StudentCloser),
            (0.9, Finding::StudentFurther),
            (0.806, Finding::NeitherCloser),
        ] {
            for seeds in [1, 2] {
                let models = [(RunModel::STUDENT, student), (RunModel::SFT, 0.8)];
                let found = report_of(&measurements(&models, 40, seeds)).conclusion;
                assert_eq!(found.finding, finding, "{}", text(&found));
                assert!(
                    !found.headline.contains("istillation"),
                    "{}",
                    found.headline
                );
            }
        }
        insta::assert_snapshot!(text(&report_of(&measurements(&RUN, 40, 1)).conclusion));
    }

    #[test]
    fn with_few_prompts_or_without_a_control_there_is_no_finding() {
        for prompts in [4, 29] {
            let few = conclusion_of(&RUN, prompts);
            assert_eq!(few.finding, Finding::Exploratory);
        }
        insta::assert_snapshot!(text(&conclusion_of(&RUN, 12)));
        let alone = conclusion_of(&[(RunModel::Base, 4.0), (RunModel::STUDENT, 0.5)], 40);
        assert_eq!(alone.finding, Finding::NotMeasured);
        insta::assert_snapshot!(text(&alone));
    }

    /// Each doubt of `kls` by the words that name it.
    fn doubts(change: impl Fn(&mut Vec<(RunModel, f64)>)) -> Vec<String> {
        let mut kls = RUN.to_vec();
        change(&mut kls);
        conclusion_of(&kls, 40).doubts
    }

    #[test]
    fn a_student_that_is_not_better_than_a_control_is_doubted() {
        for (control, kl) in [
            (RunModel::Base, 0.5),
            (RunModel::Base, 0.3),
            (RunModel::Unigram, 0.5),
            (RunModel::SAME_TOKEN, 0.5),
            (RunModel::SAME_TOKEN, 0.4),
            (RunModel::SHUFFLED, 0.5),
        ] {
            let found = doubts(|kls| {
                let model = kls.iter_mut().find(|(model, _)| *model == control).unwrap();
                model.1 = kl;
            });
            let expected = match control {
                RunModel::Base => "training moved the student".to_owned(),
                _ => format!("The control `{control}`"),
            };
            let named = found
                .iter()
                .filter(|doubt| doubt.to_lowercase().contains(&expected.to_lowercase()));
            assert!(named.count() >= 1, "{control}: {found:?}");
        }
    }

    #[test]
    fn kl_and_nll_that_disagree_are_doubted() {
        let mut measured = measurements(&RUN, 40, 3);
        let student = measured
            .models
            .iter_mut()
            .find(|m| m.model == RunModel::STUDENT)
            .unwrap();
        for seed in &mut student.seeds {
            for value in &mut seed.values {
                value.nll_nats += 0.6 * f64::from(value.tokens);
            }
        }
        let found = report_of(&measured).conclusion;
        let disagree =
            |doubts: &[String]| doubts.iter().any(|d| d.starts_with("KL and NLL disagree"));
        assert!(disagree(&found.doubts), "{:?}", found.doubts);
        assert!(!disagree(&conclusion_of(&RUN, 40).doubts));
    }

    #[test]
    fn a_tuned_rate_at_an_end_of_the_list_is_doubted() {
        let run = students_only(&RUN, 40);
        let doubts = |chosen: usize, count: usize| {
            let rate = |i: usize| TunedRate {
                arm: Arm::Sft,
                learning_rate: [0.00075, 0.0015, 0.003][i],
                dev: Some(0.1),
                chosen: i == chosen,
            };
            let tuning: Vec<TunedRate> = (0..count).map(rate).collect();
            let evidence = Evidence {
                tuning: &tuning,
                ..Evidence::of(&run.students, &run.comparisons)
            };
            conclude(&evidence).doubts
        };
        assert_eq!(
            doubts(2, 3),
            [
                "The best learning rate of `sft` on the dev prompts is 0.003, the largest of the 3 that were tried, so a better one may lie outside (`learning_rates` in `[train]`)."
            ]
        );
        assert!(doubts(0, 3)[0].contains("the smallest of the 3"));
        assert!(doubts(1, 3).is_empty());
        assert!(doubts(0, 1).is_empty());
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
