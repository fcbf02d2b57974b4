//! Variance between training seeds as part of the intervals of differences.
//!
//! An interval over prompts covers the variance between prompts for fixed weights. Training with another seed gives
//! other weights. If models were trained with several seeds, the interval also covers the variance between seeds: the
//! half-width of a t-interval from the variance between seeds, pooled over the models (Snedecor & Cochran, Statistical
//! Methods, 8th ed., §6.9), is added in quadrature to the half-width over prompts.

use potstill_datasets::RunModel;

use crate::interval::Interval;
use crate::results::{Comparison, SeedFigures, StudentResult};
use crate::verdict::verdict;

/// Widens the intervals of differences by the variance between seeds, and computes the verdicts again. Changes nothing
/// if no model was trained with two seeds.
pub fn include_seed_variance(comparisons: &mut [Comparison], students: &[StudentResult]) {
    for comparison in comparisons {
        let figures = |student: &StudentResult| -> Vec<f64> {
            let figure = |seed: &SeedFigures| seed.figure(comparison.metric);
            student.seeds.iter().filter_map(figure).collect()
        };
        let seeds = |name: RunModel| {
            let student = students.iter().find(|s| s.name == name);
            student.map_or(1, |s| s.seeds.len().max(1))
        };
        let all: Vec<Vec<f64>> = students.iter().map(figures).collect();
        let Some((variance, freedom)) = pooled_variance(&all) else {
            continue;
        };
        let (left, right) = (seeds(comparison.left), seeds(comparison.right));
        let error = (variance * (1.0 / left as f64 + 1.0 / right as f64)).sqrt();
        comparison.difference = widened(&comparison.difference, student_t(freedom) * error);
        comparison.seeds = left.min(right);
        comparison.verdict = verdict(comparison.metric, &comparison.difference);
    }
}

/// Computes the variance within groups and its degrees of freedom; `None` if no group has two members.
fn pooled_variance(groups: &[Vec<f64>]) -> Option<(f64, usize)> {
    let (mut squares, mut freedom) = (0.0, 0);
    for group in groups.iter().filter(|group| group.len() > 1) {
        let mean = group.iter().sum::<f64>() / group.len() as f64;
        squares += group.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
        freedom += group.len() - 1;
    }
    (freedom > 0).then(|| (squares / freedom as f64, freedom))
}

/// Adds a half-width in quadrature to both sides of an interval.
fn widened(interval: &Interval, half_width: f64) -> Interval {
    let Interval {
        mean, low, high, ..
    } = *interval;
    Interval {
        low: mean - (mean - low).hypot(half_width),
        high: mean + (high - mean).hypot(half_width),
        ..*interval
    }
}

/// Returns the 97.5th percentile of Student's t, from a table up to nine degrees of freedom, and by the expansion about
/// the normal distribution (Abramowitz & Stegun 26.7.5) from ten on, with an error below 1e-4.
fn student_t(freedom: usize) -> f64 {
    const TABLE: [f64; 9] = [
        12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622,
    ];
    if let Some(t) = freedom.checked_sub(1).and_then(|i| TABLE.get(i)) {
        return *t;
    }
    let (z, n) = (1.959_964_f64, freedom as f64);
    let first = (z.powi(3) + z) / 4.0;
    let second = (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0;
    let third = (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0;
    z + first / n + second / n.powi(2) + third / n.powi(3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conclusion::{Evidence, Finding, conclude};
    use crate::example::{students_only, with_seeds};
    use crate::report::Report;
    use crate::verdict::Verdict;

    #[test]
    fn quantiles_of_t() {
        for (freedom, expected) in [
            (1, 12.706),
            (4, 2.776),
            (10, 2.228),
            (20, 2.086),
            (120, 1.980),
        ] {
            let found = student_t(freedom);
            assert!((found - expected).abs() < 6e-4, "{freedom}: {found}");
        }
    }

    #[test]
    fn the_half_width_over_seeds_equals_that_of_a_t_test() {
        // For two groups of three: pooled variance 0.0001 · (2 + 8)/4, standard error √(s²·2/3).
        let mut run = students_only(&[(RunModel::STUDENT, 0.5), (RunModel::SFT, 0.8)], 40);
        with_seeds(&mut run, RunModel::STUDENT, &[0.49, 0.50, 0.51]);
        with_seeds(&mut run, RunModel::SFT, &[0.78, 0.80, 0.82]);
        let before = run.comparisons.clone();
        include_seed_variance(&mut run.comparisons, &run.students);
        let half = 2.7764 * (0.00025_f64 * 2.0 / 3.0).sqrt();
        let (was, is) = (before[0].difference, run.comparisons[0].difference);
        assert_eq!(was.mean, is.mean);
        let expected = is.mean - ((was.mean - was.low).powi(2) + half * half).sqrt();
        assert!((is.low - expected).abs() < 1e-12);
        assert_eq!(run.comparisons[0].verdict, Verdict::Better);
        assert_eq!(run.comparisons[0].seeds, 3);
    }

    #[test]
    fn a_difference_within_the_variance_of_seeds_is_no_difference() {
        let mut run = students_only(&[(RunModel::STUDENT, 0.75), (RunModel::SFT, 0.8)], 40);
        let finding =
            |run: &Report| conclude(&Evidence::of(&run.students, &run.comparisons)).finding;
        assert_eq!(finding(&run), Finding::Helps, "one seed has no variance");
        with_seeds(&mut run, RunModel::STUDENT, &[0.70, 0.80]);
        with_seeds(&mut run, RunModel::SFT, &[0.76, 0.84]);
        include_seed_variance(&mut run.comparisons, &run.students);
        assert_eq!(finding(&run), Finding::NoDifference);
    }

    /// Two seeds that are close together by chance are a bad estimate of the variance between seeds.
    #[test]
    fn with_two_seeds_a_small_difference_is_no_finding() {
        let mut run = students_only(&[(RunModel::STUDENT, 1.5019), (RunModel::SFT, 1.4569)], 40);
        with_seeds(&mut run, RunModel::STUDENT, &[1.5049, 1.4988]);
        with_seeds(&mut run, RunModel::SFT, &[1.4579, 1.4560]);
        include_seed_variance(&mut run.comparisons, &run.students);
        assert_eq!(run.comparisons[0].verdict, Verdict::Worse);
        let conclusion = conclude(&Evidence::of(&run.students, &run.comparisons));
        assert_eq!(conclusion.finding, Finding::NoDifference);
    }

    #[test]
    fn one_seed_changes_nothing() {
        let mut run = students_only(&[(RunModel::STUDENT, 0.5), (RunModel::SFT, 0.8)], 40);
        with_seeds(&mut run, RunModel::STUDENT, &[0.5]);
        let before = run.comparisons.clone();
        include_seed_variance(&mut run.comparisons, &run.students);
        assert_eq!(run.comparisons, before);
    }
}
