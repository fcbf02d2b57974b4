//! Verdicts on differences between two models.

use serde::{Deserialize, Serialize};

use crate::interval::Interval;
use crate::metric::Figure;

/// Smallest number of prompts for a verdict. With five, all five differences have the same sign by chance in
/// 2·2⁻⁵ = 6 % of cases; with six in 3 %.
pub const MIN_PROMPTS: usize = 6;

/// Verdict on the difference between two models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The first model is better; the interval excludes zero.
    Better,
    /// The first model is worse; the interval excludes zero.
    Worse,
    /// The interval includes zero, or there are fewer than [`MIN_PROMPTS`] prompts.
    NoDifference,
}

/// Returns the verdict on the interval of a difference a − b. [`Verdict::Better`] and [`Verdict::Worse`] are about
/// a, and need an interval that excludes zero over at least [`MIN_PROMPTS`] prompts.
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
    use crate::Metric;

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
