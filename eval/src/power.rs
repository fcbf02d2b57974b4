//! Smallest difference that a run can find, computed before anything is trained.

use potstill_datasets::SequenceValues;

use crate::error::Error;
use crate::estimate::{Estimate, LEVEL, MIN_SEEDS, multiplier};
use crate::figures::metric_sums;
use crate::metric::Metric;
use crate::student_t::two_sided;

/// Smallest true difference between two models that a run finds with 80 % power, in standard deviations of the paired
/// difference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlannedDetectable {
    /// In standard deviations between prompts, if seeds do not matter.
    pub prompt_deviations: f64,
    /// In standard deviations between training seeds, if prompts do not matter; `None` with fewer than 3 seeds, whose
    /// variance does not count.
    pub seed_deviations: Option<f64>,
}

/// Computes the smallest detectable difference of a run with this number of test prompts and seeds; `None` with fewer
/// than two prompts.
#[must_use]
pub fn planned_detectable(prompts: usize, seeds: usize) -> Option<PlannedDetectable> {
    let over = |count: usize| {
        let tail = |t| two_sided(t, (count - 1) as f64);
        multiplier(LEVEL, tail) / (count as f64).sqrt()
    };
    (prompts > 1).then(|| PlannedDetectable {
        prompt_deviations: over(prompts),
        seed_deviations: (seeds >= MIN_SEEDS).then(|| over(seeds)),
    })
}

impl PlannedDetectable {
    /// Converts to the figure's unit, from the standard deviations between prompts and between seeds. Pass 0 for a
    /// deviation that is not known; the true detectable difference is then larger.
    #[must_use]
    pub fn in_units(&self, prompt_deviation: f64, seed_deviation: f64) -> f64 {
        let prompts = self.prompt_deviations * prompt_deviation;
        prompts.hypot(self.seed_deviations.unwrap_or_default() * seed_deviation)
    }
}

/// Computes the standard deviation between prompts of the difference of two models in a metric, such as of student and
/// SFT control on the dev prompts, for [`PlannedDetectable::in_units`].
///
/// # Errors
/// If the two lists do not have the same prompts, no sequence has a token, or a value is not finite.
pub fn prompt_deviation(
    left: &[SequenceValues],
    right: &[SequenceValues],
    metric: Metric,
) -> Result<f64, Error> {
    let (left, right) = (metric_sums(left, metric)?, metric_sums(right, metric)?);
    left.check_same_prompts(&right)?;
    Ok(Estimate::difference(&left, &right).prompt_deviation())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// python: (t.ppf(0.975) + t.ppf(0.8)) / sqrt(n) with t = scipy.stats.t(n - 1)
    #[test]
    fn multiples_equal_those_of_scipy() {
        for (count, expected) in [
            (6, 1.424_837_816),
            (40, 0.454_360_156),
            (200, 0.199_077_979),
        ] {
            let planned = planned_detectable(count, 1).unwrap();
            assert!(
                (planned.prompt_deviations - expected).abs() < 1e-8,
                "{planned:?}"
            );
            assert_eq!(planned.seed_deviations, None);
        }
        for (seeds, expected) in [(3, 3.096_510_147), (5, 1.662_476_150)] {
            let planned = planned_detectable(200, seeds).unwrap();
            assert!(
                (planned.seed_deviations.unwrap() - expected).abs() < 1e-8,
                "{planned:?}"
            );
            let both = planned.in_units(0.3, 0.02);
            assert!((both - (0.199_077_979_f64 * 0.3).hypot(0.02 * expected)).abs() < 1e-8);
        }
        assert_eq!(planned_detectable(1, 3), None);
    }
}
