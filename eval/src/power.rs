//! Smallest difference that a run can find, computed before anything is trained.

use potstill_datasets::SequenceValues;

use crate::error::Error;
use crate::estimate::{Estimate, LEVEL, MIN_SEEDS, multiplier};
use crate::metric::{Metric, sums_of};
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
    let (left, right) = (sums_of(left, metric)?, sums_of(right, metric)?);
    left.check_same_prompts(&right)?;
    Ok(Estimate::difference(&left, &right).prompt_deviation())
}
