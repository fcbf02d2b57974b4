//! Figures that models are compared by.

use potstill_datasets::SequenceValues;
use serde::{Deserialize, Serialize};

/// A metric of the text of test, averaged over tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Forward KL from teacher to student on the coarse vocabulary, nats per token.
    Kl,
    /// Negative log-likelihood of the target tokens, nats per token.
    Nll,
    /// Share of positions at which teacher and student have the same most likely token, 0 to 1.
    Agreement,
}

impl Metric {
    /// All metrics, in the order of the report.
    pub const ALL: [Metric; 3] = [Metric::Kl, Metric::Nll, Metric::Agreement];

    /// Name in reports and messages.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Kl => "KL",
            Metric::Nll => "NLL",
            Metric::Agreement => "agreement",
        }
    }

    /// Sum over all tokens of all sequences: nats, or a count.
    pub fn total(self, values: &[SequenceValues]) -> f64 {
        values.iter().map(|v| self.sum(v)).sum()
    }

    /// Sum over the tokens of a sequence: nats, or a count.
    pub(crate) fn sum(self, values: &SequenceValues) -> f64 {
        match self {
            Metric::Kl => values.kl_nats,
            Metric::Nll => values.nll_nats,
            Metric::Agreement => f64::from(values.agree),
        }
    }
}

/// A figure that two models are compared by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Figure {
    /// [`Metric::Kl`], nats per token.
    Kl,
    /// [`Metric::Nll`], nats per token.
    Nll,
    /// [`Metric::Agreement`], 0 to 1.
    Agreement,
    /// Share of answers that a grader found right, 0 to 1.
    Accuracy,
    /// Reverse KL from the teacher on text that the model itself generated, nats per token.
    OwnTextKl,
    /// Mean of |q − p| over loss positions, 0 to 1: the model's probability q against the teacher's probability p of the
    /// teacher's most likely token.
    Calibration,
}

impl From<Metric> for Figure {
    fn from(metric: Metric) -> Figure {
        match metric {
            Metric::Kl => Figure::Kl,
            Metric::Nll => Figure::Nll,
            Metric::Agreement => Figure::Agreement,
        }
    }
}

impl Figure {
    /// Name in reports and messages.
    pub fn name(self) -> &'static str {
        match self {
            Figure::Kl => Metric::Kl.name(),
            Figure::Nll => Metric::Nll.name(),
            Figure::Agreement => Metric::Agreement.name(),
            Figure::Accuracy => "accuracy",
            Figure::OwnTextKl => "own-text KL",
            Figure::Calibration => "distance in probability",
        }
    }

    /// Whether the figure is computed from the stored distributions of the teacher.
    pub(crate) fn needs_distributions(self) -> bool {
        match self {
            Figure::Kl | Figure::Agreement | Figure::Calibration => true,
            Figure::Nll | Figure::Accuracy | Figure::OwnTextKl => false,
        }
    }

    /// Whether a smaller figure is better.
    pub fn lower_is_better(self) -> bool {
        match self {
            Figure::Kl | Figure::Nll | Figure::OwnTextKl | Figure::Calibration => true,
            Figure::Agreement | Figure::Accuracy => false,
        }
    }
}
