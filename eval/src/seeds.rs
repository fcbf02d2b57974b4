//! What other seeds do to a figure, and what that leaves of a difference.
//!
//! An interval over prompts says how a difference would fall with other prompts, for these very
//! weights. Trained again with another seed the same recipe ends elsewhere. Where students were
//! trained with several seeds, that scatter is part of the interval: a t-interval from the
//! variance between seeds, pooled over the models (Snedecor & Cochran, Statistical Methods,
//! 8th ed., §6.9), its half-width added in quadrature to that over prompts.

use potstill_datasets::RunModel;
use serde::{Deserialize, Serialize};

use crate::report::{Comparison, StudentResult};
use crate::{Figure, Interval, verdict};

/// A student's figures of one seed, each over all held-out text or answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SeedFigures {
    /// The seed.
    pub seed: u64,
    /// Forward KL from the teacher, nats a token.
    pub kl: Option<f64>,
    /// Negative log-likelihood, nats a token.
    pub nll: f64,
    /// Top-1 agreement with the teacher, 0 to 1.
    pub agreement: Option<f64>,
    /// Share of right answers, 0 to 1.
    pub accuracy: Option<f64>,
}

impl SeedFigures {
    fn figure(&self, figure: Figure) -> Option<f64> {
        match figure {
            Figure::Kl => self.kl,
            Figure::Nll => Some(self.nll),
            Figure::Agreement => self.agreement,
            Figure::Accuracy => self.accuracy,
        }
    }
}

/// Widens the intervals of differences by what seeds make, and reads their verdicts anew.
/// Nothing changes where no student was trained with two seeds.
pub fn count_seeds(comparisons: &mut [Comparison], students: &[StudentResult]) {
    for comparison in comparisons {
        let figures = |student: &StudentResult| -> Vec<f64> {
            let of = |seed: &SeedFigures| seed.figure(comparison.metric);
            student.seeds.iter().filter_map(of).collect()
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

/// The variance within groups, and its degrees of freedom; none where no group has two.
fn pooled_variance(groups: &[Vec<f64>]) -> Option<(f64, usize)> {
    let (mut squares, mut freedom) = (0.0, 0);
    for group in groups.iter().filter(|group| group.len() > 1) {
        let mean = group.iter().sum::<f64>() / group.len() as f64;
        squares += group.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
        freedom += group.len() - 1;
    }
    (freedom > 0).then(|| (squares / freedom as f64, freedom))
}

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

/// The 97.5th percentile of Student's t: from the table, and from the tenth degree of freedom on
/// by the expansion about the normal (Abramowitz & Stegun 26.7.5), right to 1e-4.
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
    use crate::example::{students_only, with_seeds};
    use crate::{Finding, Report, Verdict};

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
    fn a_difference_over_seeds_is_that_of_a_t_test() {
        // Two groups of three: pooled variance 0.0001 · (2 + 8)/4, standard error √(s²·2/3).
        let mut run = students_only(&[(RunModel::STUDENT, 0.5), (RunModel::SFT, 0.8)], 40);
        with_seeds(&mut run, RunModel::STUDENT, &[0.49, 0.50, 0.51]);
        with_seeds(&mut run, RunModel::SFT, &[0.78, 0.80, 0.82]);
        let before = run.comparisons.clone();
        count_seeds(&mut run.comparisons, &run.students);
        let half = 2.7764 * (0.00025_f64 * 2.0 / 3.0).sqrt();
        let (was, is) = (before[0].difference, run.comparisons[0].difference);
        assert_eq!(was.mean, is.mean);
        let expected = is.mean - ((was.mean - was.low).powi(2) + half * half).sqrt();
        assert!((is.low - expected).abs() < 1e-12);
        assert_eq!(run.comparisons[0].verdict, Verdict::Better);
        assert_eq!(run.comparisons[0].seeds, 3);
    }

    #[test]
    fn what_seeds_alone_may_make_is_no_difference() {
        let mut run = students_only(&[(RunModel::STUDENT, 0.75), (RunModel::SFT, 0.8)], 40);
        let says = |run: &Report| Report::conclude(None, &run.students, &run.comparisons).finding;
        assert_eq!(says(&run), Finding::Helps, "one seed cannot know");
        with_seeds(&mut run, RunModel::STUDENT, &[0.70, 0.80]);
        with_seeds(&mut run, RunModel::SFT, &[0.76, 0.84]);
        count_seeds(&mut run.comparisons, &run.students);
        assert_eq!(says(&run), Finding::NoDifference);
    }

    /// Two and two that happen to lie close together say little of how seeds scatter.
    #[test]
    fn two_seeds_cannot_be_trusted_with_a_small_difference() {
        let mut run = students_only(&[(RunModel::STUDENT, 1.5019), (RunModel::SFT, 1.4569)], 40);
        with_seeds(&mut run, RunModel::STUDENT, &[1.5049, 1.4988]);
        with_seeds(&mut run, RunModel::SFT, &[1.4579, 1.4560]);
        count_seeds(&mut run.comparisons, &run.students);
        assert_eq!(run.comparisons[0].verdict, Verdict::Worse);
        let said = Report::conclude(None, &run.students, &run.comparisons);
        assert_eq!(said.finding, Finding::NoDifference);
    }

    #[test]
    fn one_seed_changes_nothing() {
        let mut run = students_only(&[(RunModel::STUDENT, 0.5), (RunModel::SFT, 0.8)], 40);
        with_seeds(&mut run, RunModel::STUDENT, &[0.5]);
        let before = run.comparisons.clone();
        count_seeds(&mut run.comparisons, &run.students);
        assert_eq!(run.comparisons, before);
    }
}
