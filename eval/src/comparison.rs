//! Comparisons of two models on a figure, corrected for their number.
//!
//! One comparison is the primary one: the finding rests on it, and it is tested at the level 0.05 by itself. All others
//! are corrected by Holm's method (Holm 1979, Scandinavian Journal of Statistics 6(2)), so that the probability of a
//! wrong verdict among them is at most 5 %.

use potstill_datasets::RunModel;
use serde::{Deserialize, Serialize};

use crate::estimate::{Estimate, LEVEL, MIN_SEEDS, PromptSums, WeightedSum};
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
        let cells = (
            left.by_prompt(estimate.seeds),
            right.by_prompt(estimate.seeds),
        );
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
fn exchange_answers((left, right): &(Vec<WeightedSum>, Vec<WeightedSum>)) -> f64 {
    let both = left.iter().zip(right);
    let differences: Vec<i64> = both
        .map(|(l, r)| (l.value - r.value).round() as i64)
        .collect();
    sign_flip_counts(&differences)
}

/// Interval of a difference in shares over paired answers: one prompt on which only the left model is right and one on
/// which only the right model is right are added (Bonett & Price 2012, Journal of Educational and Behavioral Statistics
/// 37(4)). Without them the interval is too narrow if the models differ on few prompts, and a point if on none.
fn accuracy_interval(left: &PromptSums<'_>, right: &PromptSums<'_>, raw: &Estimate) -> Interval {
    let estimate = Estimate::difference(
        &with_two_prompts(left, [1.0, 0.0]),
        &with_two_prompts(right, [0.0, 1.0]),
    );
    let interval = estimate.interval();
    Interval {
        mean: raw.mean,
        low: interval.low.clamp(-1.0, raw.mean),
        high: interval.high.clamp(raw.mean, 1.0),
        prompts: raw.prompts,
    }
}

/// Adds two prompts with these shares of right answers, each with as many answers as a prompt has on average.
fn with_two_prompts<'a>(sums: &PromptSums<'a>, shares: [f64; 2]) -> PromptSums<'a> {
    let mut sums = sums.clone();
    let cells = sums.seeds.iter().flatten();
    let weight = cells.clone().map(|cell| cell.weight).sum::<f64>() / cells.count() as f64;
    sums.prompts.extend(["", ""]);
    for cells in &mut sums.seeds {
        cells.extend(shares.map(|share| WeightedSum {
            value: share * weight,
            weight,
        }));
    }
    sums
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

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(cells: impl Iterator<Item = f64>) -> PromptSums<'static> {
        let cells = cells.map(|value| WeightedSum { value, weight: 1.0 });
        let seeds = vec![cells.collect::<Vec<_>>()];
        PromptSums {
            prompts: vec!["p"; seeds[0].len()],
            seeds,
        }
    }

    fn pair(
        figure: Figure,
        left: PromptSums<'static>,
        right: PromptSums<'static>,
        is_primary: bool,
    ) -> Pair<'static> {
        Pair {
            figure,
            models: (RunModel::STUDENT, RunModel::SFT),
            sums: (left, right),
            is_primary,
        }
    }

    fn one(figure: Figure, left: &[f64], right: &[f64]) -> Comparison {
        let sums = |values: &[f64]| sums(values.iter().copied());
        compare(&[pair(figure, sums(left), sums(right), true)]).remove(0)
    }

    #[test]
    fn p_values_are_corrected_by_holm() {
        let mut all: Vec<Comparison> = [0.01, 0.04, 0.03, 0.005, 0.5]
            .map(|p_value| Comparison {
                p_value,
                ..one(Figure::Kl, &[1.0, 2.0], &[1.0, 2.0])
            })
            .to_vec();
        holm(&mut all.iter_mut().collect::<Vec<_>>());
        // python: statsmodels.stats.multitest.multipletests(p, method="holm")
        for (found, expected) in all.iter().zip([0.04, 0.09, 0.09, 0.025, 0.5]) {
            assert!((found.adjusted_p - expected).abs() < 1e-12, "{found:?}");
        }
    }

    #[test]
    fn the_primary_comparison_is_not_corrected() {
        let values = |shift: f64| sums((0..40).map(move |i| f64::from(i * 7 % 13) + shift));
        let noise = || sums((0..40).map(|i| f64::from(i * 7 % 13) + f64::from(i * 5 % 11)));
        let all = [
            pair(Figure::Kl, values(4.1), noise(), true),
            pair(Figure::Nll, values(4.1), noise(), false),
            pair(Figure::Agreement, values(4.1), noise(), false),
        ];
        let found = compare(&all);
        assert_eq!(found[0].adjusted_p, found[0].p_value);
        assert_eq!(found[1].adjusted_p, 2.0 * found[1].p_value);
        assert!(
            found[1].detectable > found[0].detectable,
            "the level is halved"
        );
    }

    #[test]
    fn lower_kl_is_better_and_higher_agreement_is_better() {
        let low: Vec<f64> = (0..30).map(|i| f64::from(i % 5) / 10.0).collect();
        let high: Vec<f64> = (0..30).map(|i| f64::from(i % 5) / 10.0 + 0.2).collect();
        for (figure, low_is) in [
            (Figure::Kl, Verdict::Better),
            (Figure::Nll, Verdict::Better),
            (Figure::OwnTextKl, Verdict::Better),
            (Figure::Calibration, Verdict::Better),
            (Figure::Agreement, Verdict::Worse),
        ] {
            assert_eq!(one(figure, &low, &high).verdict, low_is, "{figure:?}");
            assert_ne!(one(figure, &high, &low).verdict, low_is, "{figure:?}");
            assert_eq!(one(figure, &low, &low).verdict, Verdict::NoDifference);
        }
        let (wrong, right) = ([0.0; 30], [1.0; 30]);
        assert_eq!(
            one(Figure::Accuracy, &right, &wrong).verdict,
            Verdict::Better
        );
        assert_eq!(
            one(Figure::Accuracy, &wrong, &right).verdict,
            Verdict::Worse
        );
    }

    #[test]
    fn five_prompts_are_too_few_for_any_verdict() {
        for (prompts, verdict) in [(5, Verdict::NoDifference), (6, Verdict::Better)] {
            let low: Vec<f64> = (0..prompts).map(f64::from).collect();
            let high: Vec<f64> = low.iter().map(|value| value + 1.0).collect();
            assert_eq!(one(Figure::Kl, &low, &high).verdict, verdict);
        }
    }

    /// With few prompts the p-value is that of the sign-flip test, if it is larger.
    #[test]
    fn six_prompts_with_one_sign_have_p_of_two_in_64() {
        let low = [1.0; 6];
        let found = one(Figure::Kl, &low, &low.map(|value| value + 1.0));
        assert_eq!(found.p_value, 2.0 / 64.0);
    }

    #[test]
    fn a_difference_in_accuracy_has_the_interval_of_bonett_and_price() {
        // The student alone is right on 3 of 100 prompts, the control alone on 9.
        let answers = |range: std::ops::Range<i32>| -> Vec<f64> {
            (0..100)
                .map(|i| f64::from(u8::from(i < 50 || range.contains(&i))))
                .collect()
        };
        let found = one(Figure::Accuracy, &answers(50..53), &answers(53..62));
        let Interval {
            mean,
            low,
            high,
            prompts,
        } = found.difference;
        assert!((mean + 0.06).abs() < 1e-12 && prompts == 100);
        // python: p12 = 4/102; p21 = 10/102; se = sqrt((p12 + p21 − (p12 − p21)²)/102) is 0.036218; the jackknife has 101 for
        // 102, and t for z
        let half_width = 0.036_217_574 * (102.0_f64 / 101.0).sqrt() * 1.983_731;
        assert!((low - (-0.058_823_529 - half_width)).abs() < 1e-6, "{low}");
        assert!(
            (high - (-0.058_823_529 + half_width)).abs() < 1e-6,
            "{high}"
        );
        // python: scipy.stats.binomtest(3, 12).pvalue
        assert!((found.p_value - 0.145_996_093_75).abs() < 1e-12);
        let same = one(Figure::Accuracy, &answers(50..53), &answers(50..53));
        assert!(
            same.difference.low < -0.01 && same.difference.high > 0.01,
            "not a point"
        );
    }
}
