//! The finding of a run, from its primary comparison.
//!
//! A method is more than two models that were trained with it. With fewer than [`MIN_SEEDS`] seeds a finding is therefore
//! about these models, and with fewer than [`MIN_FINDING_PROMPTS`] prompts there is none.

use serde::{Deserialize, Serialize};

use crate::comparison::{Comparison, MIN_FINDING_PROMPTS, Verdict};
use crate::estimate::MIN_SEEDS;

/// Answer to the question whether distillation helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// The student is closer to the teacher than the SFT control, and chance does not explain the difference.
    Helps,
    /// Chance may explain the difference.
    NoDifference,
    /// The student is further from the teacher than the SFT control, and chance does not explain the difference.
    Hurts,
    /// With fewer than [`MIN_SEEDS`] seeds: the student is closer to the teacher than the SFT control. This is about these
    /// two models, not about the method.
    StudentCloser,
    /// With fewer than [`MIN_SEEDS`] seeds: the student is further from the teacher than the SFT control. This is about
    /// these two models, not about the method.
    StudentFurther,
    /// With fewer than [`MIN_SEEDS`] seeds: chance may explain the difference between the two models.
    NeitherCloser,
    /// Fewer than [`MIN_FINDING_PROMPTS`] prompts: a direction, but no claim.
    Exploratory,
    /// The run has no SFT control to compare with.
    NotMeasured,
    /// The student was trained on text only: the teacher's distributions are not stored.
    TextAlone,
}

impl Finding {
    /// Returns the finding from the comparison of student and SFT control by KL.
    #[must_use]
    pub fn of(comparison: Option<&Comparison>) -> Finding {
        let Some(comparison) = comparison else {
            return Finding::NotMeasured;
        };
        if comparison.difference.prompts < MIN_FINDING_PROMPTS {
            return Finding::Exploratory;
        }
        match (comparison.seeds >= MIN_SEEDS, comparison.verdict) {
            (true, Verdict::Better) => Finding::Helps,
            (true, Verdict::Worse) => Finding::Hurts,
            (true, Verdict::NoDifference) => Finding::NoDifference,
            (false, Verdict::Better) => Finding::StudentCloser,
            (false, Verdict::Worse) => Finding::StudentFurther,
            (false, Verdict::NoDifference) => Finding::NeitherCloser,
        }
    }

    /// The finding in one sentence.
    #[must_use]
    pub fn headline(self) -> &'static str {
        match self {
            Finding::Helps => "Distillation helps here.",
            Finding::NoDifference => "No difference shown: distillation may or may not help here.",
            Finding::Hurts => "Distillation hurts here.",
            Finding::StudentCloser => {
                "This student is closer to the teacher than this `sft` model; other seeds may differ."
            }
            Finding::StudentFurther => {
                "This student is further from the teacher than this `sft` model; other seeds may differ."
            }
            Finding::NeitherCloser => {
                "No difference shown between this student and this `sft` model."
            }
            Finding::Exploratory => "Exploratory: there are too few test prompts for a finding.",
            Finding::NotMeasured => {
                "Whether distillation helps was not measured: the run has no control `sft` (`controls` in `[train]`)."
            }
            Finding::TextAlone => {
                "The student was trained on text only, without a teacher's distributions, so there is no distillation to evaluate."
            }
        }
    }

    /// Whether the finding speaks for the student.
    pub(crate) fn is_positive(self) -> bool {
        matches!(self, Finding::Helps | Finding::StudentCloser)
    }
}
