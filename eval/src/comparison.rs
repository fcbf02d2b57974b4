//! Comparisons of two models on a figure, corrected for their number.
//!
//! One comparison is the primary one: the finding rests on it, and it is tested at the level 0.05 by itself. All others
//! are corrected by Holm's method (Holm 1979, Scandinavian Journal of Statistics 6(2)), so that the probability of a
//! wrong verdict among them is at most 5 %.

use potstill_datasets::RunModel;
use serde::{Deserialize, Serialize};

use crate::estimate::{Cell, Estimate, LEVEL, MIN_SEEDS, PromptSums};
use crate::interval::Interval;
use crate::metric::Figure;
use crate::sign_flip::{sign_flip, sign_flip_counts};

/// Smallest number of prompts for a verdict. With five, all five differences have the same sign by chance in
/// 2·2⁻⁵ = 6 % of cases; with six in 3 %.
pub const MIN_PROMPTS: usize = 6;

/// Smallest number of prompts for a finding. With fewer, p-values also count exchanges of signs, but no rule that we
/// measured keeps its level where the differences are skewed to one side (docs/log.md), so a run is exploratory.
pub const MIN_FINDING_PROMPTS: usize = 30;

/// Verdict on the difference between two models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The first model is better.
    Better,
    /// The first model is worse.
    Worse,
    /// Chance may explain the difference, or there are fewer than [`MIN_PROMPTS`] prompts.
    NoDifference,
}

/// A paired difference `left` − `right`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Figure that was compared.
    pub metric: Figure,
    /// The first model.
    pub left: RunModel,
    /// The second model.
    pub right: RunModel,
    /// Difference left − right, in the figure's unit.
    pub difference: Interval,
    /// Verdict on `left`; better or worse needs `adjusted_p` of at most 0.05.
    pub verdict: Verdict,
    /// Probability of a difference at least as large if the true difference is zero.
    pub p_value: f64,
    /// `p_value`, corrected for the number of comparisons of the report unless the comparison is the primary one.
    pub adjusted_p: f64,
    /// Whether the finding rests on this comparison; all others are corrected for their number.
    pub primary: bool,
    /// Number of seeds that both models were trained with. From three on, the interval and the p-value include the
    /// variance between seeds.
    pub seeds: usize,
    /// Smallest true difference that is found with 80 % power with these prompts and seeds, in the figure's unit; `None`
    /// if the prompts are too few to estimate it.
    pub detectable: Option<f64>,
}

/// Two models with their sums of a figure, over the same prompts.
pub(crate) struct Pair<'a> {
    pub(crate) figure: Figure,
    pub(crate) models: (RunModel, RunModel),
    pub(crate) sums: (PromptSums<'a>, PromptSums<'a>),
    pub(crate) is_primary: bool,
}

/// Compares all pairs, with p-values that are corrected for the number of pairs that are not primary.
pub(crate) fn compare(pairs: &[Pair<'_>]) -> Vec<Comparison> {
    let others = pairs.iter().filter(|pair| !pair.is_primary).count();
    let mut comparisons: Vec<Comparison> = pairs.iter().map(|pair| pair.compare(others)).collect();
    let mut corrected: Vec<&mut Comparison> =
        comparisons.iter_mut().filter(|c| !c.primary).collect();
    holm(&mut corrected);
    for comparison in &mut comparisons {
        comparison.verdict = verdict(comparison);
    }
    comparisons
}

impl Pair<'_> {
    /// Compares the two models, without a correction of the p-value. `others` is the number of comparisons that the
    /// smallest detectable difference is corrected for, if this pair is one of them.
    fn compare(&self, others: usize) -> Comparison {
        let (left, right) = &self.sums;
        let estimate = Estimate::difference(left, right);
        let cells = (left.by_prompt(estimate.seeds), right.by_prompt(estimate.seeds));
        let is_accuracy = self.figure == Figure::Accuracy;
        let over_variances = estimate.p_value();
        let p_value = match is_accuracy {
            true if estimate.seeds < MIN_SEEDS => exchange_answers(&cells),
            true => over_variances.max(exchange_answers(&cells)),
            false if estimate.prompts < MIN_FINDING_PROMPTS => {
                over_variances.max(sign_flip(&cells.0, &cells.1))
            }
            false => over_variances,
        };
        let level = match self.is_primary {
            true => LEVEL,
            false => LEVEL / others as f64,
        };
        Comparison {
            metric: self.figure,
            left: self.models.0,
            right: self.models.1,
            difference: match is_accuracy {
                true => accuracy_interval(left, right, &estimate),
                false => estimate.interval(),
            },
            verdict: Verdict::NoDifference,
            p_value,
            adjusted_p: p_value,
            primary: self.is_primary,
            seeds: estimate.seeds,
            detectable: estimate.detectable(level),
        }
    }
}

/// Exact p-value of a difference in right answers.
fn exchange_answers((left, right): &(Vec<Cell>, Vec<Cell>)) -> f64 {
    let both = left.iter().zip(right);
    let differences: Vec<i64> = both.map(|(l, r)| (l.value - r.value).round() as i64).collect();
    sign_flip_counts(&differences)
}

/// Interval of a difference in shares over paired answers: one prompt on which only the left model is right and one on
/// which only the right model is right are added (Bonett & Price 2012, Journal of Educational and Behavioral Statistics
/// 37(4)). Without them the interval is too narrow if the models differ on few prompts, and a point if on none.
fn accuracy_interval(left: &PromptSums<'_>, right: &PromptSums<'_>, raw: &Estimate) -> Interval {
    let weight = |sums: &PromptSums<'_>| {
        let cells = sums.seeds.iter().flatten();
        cells.clone().map(|cell| cell.weight).sum::<f64>() / cells.count() as f64
    };
    let add_two = |sums: &PromptSums<'_>, first: f64, second: f64| {
        let (mut sums, weight) = (sums.clone(), weight(sums));
        sums.prompts.extend(["", ""]);
        for cells in &mut sums.seeds {
            cells.extend([first, second].map(|share| Cell {
                value: share * weight,
                weight,
            }));
        }
        sums
    };
    let estimate = Estimate::difference(&add_two(left, 1.0, 0.0), &add_two(right, 0.0, 1.0));
    let interval = estimate.interval();
    Interval {
        mean: raw.mean,
        low: interval.low.clamp(-1.0, raw.mean),
        high: interval.high.clamp(raw.mean, 1.0),
        prompts: raw.prompts,
    }
}

/// Corrects p-values by Holm's method: the smallest is multiplied by their number, the next by one less, and none is
/// smaller than the one before.
fn holm(comparisons: &mut [&mut Comparison]) {
    comparisons.sort_by(|a, b| a.p_value.total_cmp(&b.p_value));
    let count = comparisons.len();
    let mut largest = 0.0_f64;
    for (rank, comparison) in comparisons.iter_mut().enumerate() {
        largest = largest.max(((count - rank) as f64 * comparison.p_value).min(1.0));
        comparison.adjusted_p = largest;
    }
}

fn verdict(comparison: &Comparison) -> Verdict {
    let Comparison {
        metric, difference, ..
    } = comparison;
    if comparison.adjusted_p > LEVEL || difference.prompts < MIN_PROMPTS {
        return Verdict::NoDifference;
    }
    match (difference.mean < 0.0) == metric.lower_is_better() {
        true => Verdict::Better,
        false => Verdict::Worse,
    }
}
