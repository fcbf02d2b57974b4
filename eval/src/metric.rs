//! The figures that models are compared by, and what "better" means for each.

use potstill_datasets::SequenceValues;
use serde::{Deserialize, Serialize};

use crate::{Interval, MIN_PROMPTS};

/// A figure of held-out text, averaged over tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Forward KL from teacher to student on the coarsened vocabulary, nats a token.
    Kl,
    /// Negative log-likelihood of the teacher's own tokens, nats a token.
    Nll,
    /// Share of tokens where the two most likely tokens are the same, 0 to 1.
    Agreement,
}

impl Metric {
    /// All three, in the order in which the report shows them.
    pub const ALL: [Metric; 3] = [Metric::Kl, Metric::Nll, Metric::Agreement];

    /// What a person reads.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Kl => "KL",
            Metric::Nll => "NLL",
            Metric::Agreement => "agreement",
        }
    }

    /// The sum over all tokens of all sequences: nats, or a count.
    pub fn total(self, values: &[SequenceValues]) -> f64 {
        values.iter().map(|v| self.sum(v)).sum()
    }

    /// The sum over a sequence's tokens: nats, or a count.
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
    /// [`Metric::Kl`], nats a token.
    Kl,
    /// [`Metric::Nll`], nats a token.
    Nll,
    /// [`Metric::Agreement`], 0 to 1.
    Agreement,
    /// Share of answers that a grader found right, 0 to 1.
    Accuracy,
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
    /// What a person reads.
    pub fn name(self) -> &'static str {
        match self {
            Figure::Kl => Metric::Kl.name(),
            Figure::Nll => Metric::Nll.name(),
            Figure::Agreement => Metric::Agreement.name(),
            Figure::Accuracy => "accuracy",
        }
    }

    fn lower_is_better(self) -> bool {
        matches!(self, Figure::Kl | Figure::Nll)
    }
}

/// What a difference says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The first of the two is better, and chance does not explain it.
    Better,
    /// The first of the two is worse, and chance does not explain it.
    Worse,
    /// The interval holds zero, or there are too few prompts to tell.
    NoDifference,
}

/// Reads the interval of a difference a − b: [`Verdict::Better`] or
/// [`Verdict::Worse`] is about a, and is said only when the interval leaves out zero
/// and at least [`MIN_PROMPTS`] prompts stand behind it.
pub fn verdict(figure: impl Into<Figure>, difference: &Interval) -> Verdict {
    if difference.prompts < MIN_PROMPTS {
        return Verdict::NoDifference;
    }
    let below = difference.high < 0.0;
    let above = difference.low > 0.0;
    match (below, above, figure.into().lower_is_better()) {
        (true, _, true) | (_, true, false) => Verdict::Better,
        (true, _, false) | (_, true, true) => Verdict::Worse,
        (false, false, _) => Verdict::NoDifference,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(low: f64, high: f64, prompts: usize) -> Interval {
        let mean = (low + high) / 2.0;
        Interval {
            mean,
            low,
            high,
            prompts,
        }
    }

    #[test]
    fn lower_kl_is_better_and_higher_agreement_is_better() {
        let below = difference(-0.2, -0.1, 20);
        let above = difference(0.1, 0.2, 20);
        assert_eq!(verdict(Metric::Kl, &below), Verdict::Better);
        assert_eq!(verdict(Metric::Nll, &above), Verdict::Worse);
        assert_eq!(verdict(Metric::Agreement, &below), Verdict::Worse);
        assert_eq!(verdict(Metric::Agreement, &above), Verdict::Better);
        assert_eq!(verdict(Figure::Accuracy, &above), Verdict::Better);
    }

    #[test]
    fn an_interval_that_touches_zero_says_nothing() {
        for (low, high) in [(-0.2, 0.0), (0.0, 0.2), (-0.1, 0.1), (0.0, 0.0)] {
            assert_eq!(
                verdict(Metric::Kl, &difference(low, high, 20)),
                Verdict::NoDifference
            );
        }
    }

    #[test]
    fn five_prompts_are_too_few_for_any_claim() {
        assert_eq!(
            verdict(Metric::Kl, &difference(-0.2, -0.1, 5)),
            Verdict::NoDifference
        );
    }
}
