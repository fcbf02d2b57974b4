//! What a run says, in words: does distillation help here, and how sure is that?
//!
//! The finding is read off one paired interval, the held-out KL of `student` less that of
//! `sft`, which learned from the same text for the same steps without the teacher's
//! distributions. Everything else is said beside it, whichever way it falls.
//!
//! With one seed the interval is over prompts alone, and with many prompts even what chance made
//! of the training stands out from it; with two the scatter of seeds is hardly known. So then a
//! difference must also be larger than what other seeds commonly make ([`SEED_SHARE`]).

use potstill_datasets::RunModel;
use serde::{Deserialize, Serialize};

use crate::report::{Comparison, StudentResult, TeacherResult};
use crate::{Figure, MIN_PROMPTS, Verdict, wording};

/// With fewer than [`MIN_SEEDS`] seeds, a smaller share of `sft`'s KL than this is no finding. In our
/// own runs other seeds moved it by up to 3.4 % (docs/log.md); more `seeds` in `[train]` measure it
/// in place of this.
pub const SEED_SHARE: f64 = 0.05;

/// Fewest seeds whose scatter is taken at its word.
pub const MIN_SEEDS: usize = 3;

/// Does distillation help here?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// The student is closer to the teacher than `sft`, and chance does not explain it.
    Helps,
    /// The interval holds zero, or there are too few prompts to tell.
    NoDifference,
    /// The student is further from the teacher than `sft`, and chance does not explain it.
    Hurts,
    /// There is no `sft` control to compare with.
    NotMeasured,
    /// There are no distributions: the text alone was learned from.
    TextAlone,
}

impl Finding {
    /// Reads the comparison of `student` and `sft` by KL, and the KL of `sft`.
    pub fn of(comparison: Option<&Comparison>, sft: f64) -> Finding {
        let Some(comparison) = comparison else {
            return Finding::NotMeasured;
        };
        match comparison.verdict {
            _ if within_seeds(comparison, sft) => Finding::NoDifference,
            Verdict::Better => Finding::Helps,
            Verdict::NoDifference => Finding::NoDifference,
            Verdict::Worse => Finding::Hurts,
        }
    }

    /// The answer in one sentence.
    pub fn headline(self) -> &'static str {
        match self {
            Finding::Helps => "Distillation helps here.",
            Finding::NoDifference => "No difference shown: distillation may or may not help here.",
            Finding::Hurts => "Distillation hurts here.",
            Finding::NotMeasured => {
                "Whether distillation helps was not measured: there is no `sft` control (`[train] controls`)."
            }
            Finding::TextAlone => {
                "The student learned from text alone, without a teacher's distributions: there is no distillation to judge."
            }
        }
    }
}

/// Whether a difference is so small that other seeds alone may have made it, as far as one or
/// two can tell.
fn within_seeds(comparison: &Comparison, sft: f64) -> bool {
    comparison.seeds < MIN_SEEDS && comparison.difference.mean.abs() < SEED_SHARE * sft
}

/// What a run says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Conclusion {
    /// The answer.
    pub finding: Finding,
    /// The answer in one sentence.
    pub headline: String,
    /// What it rests on and how sure it is, most important first.
    pub sentences: Vec<String>,
    /// Why this run should not be believed as it is; empty where nothing speaks against it.
    pub doubts: Vec<String>,
}

/// What is known of the models, to say sentences about pairs of them.
struct Known<'a> {
    teacher: Option<&'a TeacherResult>,
    students: &'a [StudentResult],
    comparisons: &'a [Comparison],
}

/// Reads the comparisons among `untrained`, `student`, `sft` and `shuffled`; those that are
/// missing are not spoken of.
pub(crate) fn conclude(
    teacher: Option<&TeacherResult>,
    students: &[StudentResult],
    comparisons: &[Comparison],
) -> Conclusion {
    let known = Known {
        teacher,
        students,
        comparisons,
    };
    let main = known.find(Figure::Kl, RunModel::STUDENT, RunModel::SFT);
    let sft = known
        .student(RunModel::SFT)
        .and_then(|sft| sft.kl)
        .map_or(0.0, |kl| kl.mean);
    let finding = match students.iter().any(|student| student.kl.is_some()) {
        true => Finding::of(main, sft),
        false => Finding::TextAlone,
    };
    let mut sentences = Vec::new();
    let mut doubts = Vec::new();
    if let Some(comparison) = main {
        sentences.push(known.closeness(comparison, finding));
        sentences.push(certainty(comparison, finding));
        sentences.push(known.accuracy(finding));
    }
    known.training(&mut sentences, &mut doubts);
    known.controls(&mut sentences, &mut doubts);
    Conclusion {
        finding,
        headline: finding.headline().to_owned(),
        sentences,
        doubts,
    }
}

impl Known<'_> {
    fn find(&self, figure: Figure, left: RunModel, right: RunModel) -> Option<&Comparison> {
        self.comparisons
            .iter()
            .find(|c| c.metric == figure && c.left == left && c.right == right)
    }

    fn student(&self, name: RunModel) -> Option<&StudentResult> {
        self.students.iter().find(|s| s.name == name)
    }

    /// The two models' figures and their difference: "held-out KL 0.5 against 0.8 …".
    fn figures(&self, comparison: &Comparison) -> String {
        let of = |model: RunModel| {
            let student = self.student(model)?;
            let mean = match comparison.metric {
                Figure::Kl => student.kl?.mean,
                Figure::Nll => student.nll.mean,
                Figure::Agreement => student.agreement?.mean,
                Figure::Accuracy => student.accuracy.as_ref()?.overall.mean,
            };
            Some(wording::value(comparison.metric, mean))
        };
        let values = match (of(comparison.left), of(comparison.right)) {
            (Some(left), Some(right)) => format!("{left} against {right}"),
            _ => "not known apart".to_owned(),
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

    fn closeness(&self, comparison: &Comparison, finding: Finding) -> String {
        let share = self
            .student(RunModel::SFT)
            .and_then(|sft| sft.kl)
            .filter(|kl| kl.mean > 0.0)
            .map(|kl| 100.0 * comparison.difference.mean.abs() / kl.mean);
        let by = share.map_or(String::new(), |share| format!("{share:.0} % "));
        let figures = self.figures(comparison);
        match finding {
            Finding::Helps => format!(
                "The student, which learned from the teacher's probabilities, is {by}closer to the teacher than `sft`, which learned from the same text alone, with the same start and as many steps: {figures}."
            ),
            Finding::Hurts => format!(
                "The student, which learned from the teacher's probabilities, is {by}further from the teacher than `sft`, which learned from the same text alone, with the same start and as many steps: {figures}."
            ),
            Finding::NoDifference | Finding::NotMeasured | Finding::TextAlone => format!(
                "The student, which learned from the teacher's probabilities, cannot be told from `sft`, which learned from the same text alone, with the same start and as many steps: {figures}."
            ),
        }
    }

    /// Said whichever way it falls, and even when it was not measured.
    fn accuracy(&self, finding: Finding) -> String {
        let teacher = self.teacher.and_then(|t| t.accuracy.as_ref());
        let teacher = teacher.map_or(String::new(), |accuracy| {
            let share = wording::value(Figure::Accuracy, accuracy.overall.mean);
            format!(" The teacher is right in {share}.")
        });
        let Some(comparison) = self.find(Figure::Accuracy, RunModel::STUDENT, RunModel::SFT) else {
            return format!(
                "Accuracy was not measured for both, so this is about closeness to the teacher, not about right answers.{teacher}"
            );
        };
        let what = match (comparison.verdict, finding) {
            (Verdict::NoDifference, _) => "In right answers no difference is shown",
            (Verdict::Better, Finding::Helps) => "In right answers the student is better too",
            (Verdict::Worse, Finding::Hurts) => "In right answers the student is worse too",
            (Verdict::Better, _) => "But in right answers the student is better",
            (Verdict::Worse, _) => "But in right answers the student is worse",
        };
        format!("{what}: {}.{teacher}", self.figures(comparison))
    }

    fn training(&self, sentences: &mut Vec<String>, doubts: &mut Vec<String>) {
        let with = |figure| self.find(figure, RunModel::STUDENT, RunModel::Base);
        let (comparison, closer, further) = match (with(Figure::Kl), with(Figure::Nll)) {
            (Some(kl), _) => (kl, "closer to the teacher", "further from the teacher"),
            (None, Some(nll)) => (nll, "closer to the text", "further from the text"),
            (None, None) => return,
        };
        let figures = self.figures(comparison);
        match comparison.verdict {
            Verdict::Better => {
                sentences.push(format!("Training brought the student {closer}: {figures}."))
            }
            Verdict::Worse => doubts.push(format!(
                "Training took the student {further} than it started: {figures}."
            )),
            Verdict::NoDifference => doubts.push(format!(
                "Whether training brought the student {closer} at all cannot be told: {figures}."
            )),
        }
    }

    /// A student of shuffled distributions must do worse; else it was not what they say
    /// that made the difference.
    fn controls(&self, sentences: &mut Vec<String>, doubts: &mut Vec<String>) {
        for left in [RunModel::STUDENT, RunModel::SFT] {
            let Some(comparison) = self.find(Figure::Kl, left, RunModel::SHUFFLED) else {
                continue;
            };
            let figures = self.figures(comparison);
            match comparison.verdict {
                Verdict::Better => sentences.push(format!(
                    "The control with shuffled distributions did worse than `{left}`, as it must: {figures}."
                )),
                Verdict::Worse => doubts.push(format!(
                    "The control with shuffled distributions did better than `{left}`, though it must do worse: {figures}."
                )),
                Verdict::NoDifference => doubts.push(format!(
                    "The control with shuffled distributions cannot be told from `{left}`, though it must do worse: {figures}."
                )),
            }
        }
    }
}

/// How sure the finding is, for somebody who does not know what an interval is.
fn certainty(comparison: &Comparison, finding: Finding) -> String {
    let prompts = comparison.difference.prompts;
    let seeds = match comparison.seeds {
        0 | 1 => "It is about other prompts of this kind; how training would end with another seed is not in it (`[train] seeds`).".to_owned(),
        seeds => format!("Other prompts of this kind and other seeds are both in it; {seeds} seeds were trained."),
    };
    if prompts < MIN_PROMPTS {
        return format!(
            "How sure: not at all. {prompts} held-out prompts are too few for any claim; at least {MIN_PROMPTS} are needed (`[curate] heldout`)."
        );
    }
    match (finding, comparison.verdict) {
        (Finding::Helps | Finding::Hurts, _) => format!(
            "How sure: the 95 % interval of the difference leaves out zero, and such an interval misses the truth about one time in twenty. {seeds}"
        ),
        (_, Verdict::NoDifference) => format!(
            "How sure: the 95 % interval of the difference holds zero, so chance alone could have made it. More held-out prompts make the interval narrower. {seeds}"
        ),
        (_, Verdict::Better | Verdict::Worse) => format!(
            "How sure: the 95 % interval of the difference leaves out zero, but the difference is under {:.0} % of the distance of `sft`, and without {MIN_SEEDS} seeds or more so little cannot be told from what another seed makes. Set `seeds = {MIN_SEEDS}` in `[train]` to find out.",
            100.0 * SEED_SHARE
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::{report, students_only};
    use crate::{Interval, Report};

    fn of(kls: &[(RunModel, f64)], prompts: usize) -> Conclusion {
        students_only(kls, prompts).conclusion
    }

    fn said(conclusion: &Conclusion) -> String {
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

    /// Held-out text of 40 prompts on which the two differ by `gap` nats a token on average,
    /// this way or that.
    fn noisy(gap: f64) -> Conclusion {
        let mut run = students_only(&[(RunModel::STUDENT, 1.0), (RunModel::SFT, 1.0)], 40);
        let a: Vec<_> = (0..40).map(|i| values(i, 1.0)).collect();
        let b: Vec<_> = (0..40)
            .map(|i| values(i, 1.0 + gap + 0.2 * ((i * 7 % 13) as f64 - 6.0) / 6.0))
            .collect();
        run.comparisons =
            crate::compare((RunModel::STUDENT, &a), (RunModel::SFT, &b), 2000, 7).unwrap();
        Report::conclude(None, &run.students, &run.comparisons)
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
            bin_tokens: vec![0; 10],
            bin_confidence: vec![0.0; 10],
            bin_correct: vec![0; 10],
        }
    }

    #[test]
    fn distillation_that_helps() {
        let found = of(
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
        insta::assert_snapshot!(said(&found));
        assert_eq!(noisy(0.1).finding, Finding::Helps);
    }

    #[test]
    fn distillation_that_makes_no_difference() {
        let same = of(
            &[
                (RunModel::Base, 4.0),
                (RunModel::STUDENT, 0.5),
                (RunModel::SFT, 0.5),
            ],
            40,
        );
        assert_eq!(same.finding, Finding::NoDifference);
        insta::assert_snapshot!(said(&same));
        for gap in [0.02, -0.02] {
            assert_eq!(noisy(gap).finding, Finding::NoDifference, "{gap}");
        }
        // The interval leaves out zero, and yet another seed alone may have made so little.
        let small = of(&[(RunModel::STUDENT, 0.49), (RunModel::SFT, 0.5)], 40);
        assert_eq!(small.finding, Finding::NoDifference);
        insta::assert_snapshot!(said(&small));
    }

    #[test]
    fn distillation_that_hurts() {
        let found = of(
            &[
                (RunModel::Base, 4.0),
                (RunModel::STUDENT, 4.5),
                (RunModel::SFT, 2.0),
                (RunModel::SHUFFLED, 2.0),
            ],
            40,
        );
        assert_eq!(found.finding, Finding::Hurts);
        insta::assert_snapshot!(said(&found));
        assert_eq!(noisy(-0.1).finding, Finding::Hurts);
    }

    #[test]
    fn four_prompts_or_no_control_are_no_claim() {
        let small = of(
            &[
                (RunModel::Base, 4.0),
                (RunModel::STUDENT, 0.5),
                (RunModel::SFT, 0.8),
            ],
            4,
        );
        assert_eq!(small.finding, Finding::NoDifference);
        insta::assert_snapshot!(said(&small));
        let alone = of(&[(RunModel::Base, 4.0), (RunModel::STUDENT, 0.5)], 40);
        assert_eq!(alone.finding, Finding::NotMeasured);
        insta::assert_snapshot!(said(&alone));
    }

    #[test]
    fn accuracy_is_said_whichever_way_it_falls() {
        let run = report();
        let with = |verdict, mean: f64| {
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
            let found = Report::conclude(run.teacher.as_ref(), &run.students, &comparisons);
            assert_eq!(found.finding, Finding::Helps, "accuracy does not change it");
            found.sentences[2].clone()
        };
        let sentences = [
            with(Verdict::Better, 0.06),
            with(Verdict::NoDifference, 0.01),
            with(Verdict::Worse, -0.06),
        ];
        insta::assert_snapshot!(sentences.join("\n"));
    }
}
