//! Accuracy: the share of right answers.
//!
//! The interval is a bootstrap over prompts. If all answers are right, or all are wrong, every resample is the same and
//! the interval would be a point. Its open end is then the exact binomial one over prompts, 0.025^(1/n) (Clopper &
//! Pearson, 1934).

use serde::{Deserialize, Serialize};

use crate::bootstrap::{bootstrap, clusters};
use crate::error::Error;
use crate::interval::Interval;

/// One graded answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Graded {
    /// Id of the prompt.
    pub prompt_id: String,
    /// Part of the task that the prompt belongs to, such as "addition".
    pub group: Option<String>,
    /// Whether the answer is right.
    pub correct: bool,
}

/// Accuracy of a model, overall and by group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Share of right answers, 0 to 1.
    pub overall: Interval,
    /// Number of graded answers.
    pub answers: u64,
    /// Number of right answers.
    pub correct: u64,
    /// Accuracy by group, sorted by name; empty if prompts have no groups.
    pub groups: Vec<GroupAccuracy>,
}

/// Accuracy over the answers of one group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupAccuracy {
    /// Name of the group.
    pub group: String,
    /// Share of right answers, 0 to 1.
    pub accuracy: Interval,
}

/// Computes the accuracy over `graded`, overall and by group, with 95 % intervals from `resamples` resamples of
/// prompts.
///
/// # Errors
/// If `graded` is empty.
pub fn accuracy(graded: &[Graded], resamples: usize, seed: u64) -> Result<Accuracy, Error> {
    let overall = share(graded.iter(), resamples, seed)?;
    let mut names: Vec<&str> = graded.iter().filter_map(|g| g.group.as_deref()).collect();
    names.sort_unstable();
    names.dedup();
    let mut groups = Vec::new();
    for name in names {
        let of_group = graded.iter().filter(|g| g.group.as_deref() == Some(name));
        groups.push(GroupAccuracy {
            group: name.to_owned(),
            accuracy: share(of_group, resamples, seed)?,
        });
    }
    Ok(Accuracy {
        overall,
        answers: graded.len() as u64,
        correct: graded.iter().filter(|g| g.correct).count() as u64,
        groups,
    })
}

/// Computes the difference in accuracy a − b over the same prompts, with its 95 % interval.
///
/// # Errors
/// If the two lists do not have the same prompts in the same order, or are empty.
pub fn paired_accuracy(
    a: &[Graded],
    b: &[Graded],
    resamples: usize,
    seed: u64,
) -> Result<Interval, Error> {
    let id = |graded: Option<&Graded>| graded.map(|g| g.prompt_id.clone());
    let absent = || "absent".to_owned();
    let differs = |i: &usize| id(a.get(*i)) != id(b.get(*i));
    if let Some(position) = (0..a.len().max(b.len())).find(differs) {
        return Err(Error::NotPaired {
            position,
            left: id(a.get(position)).unwrap_or_else(absent),
            right: id(b.get(position)).unwrap_or_else(absent),
        });
    }
    let both = a.iter().zip(b).map(|(a, b)| {
        let sums = [f64::from(a.correct), f64::from(b.correct)];
        (a.prompt_id.as_str(), 1.0, sums)
    });
    let difference = |answers, [a, b]: [f64; 2]| (a - b) / answers;
    let ratio =
        bootstrap(&clusters(both), resamples, seed, difference).ok_or(Error::NothingGraded)?;
    Ok(ratio.interval())
}

fn share<'a>(
    graded: impl Iterator<Item = &'a Graded>,
    resamples: usize,
    seed: u64,
) -> Result<Interval, Error> {
    let sums = graded.map(|g| (g.prompt_id.as_str(), 1.0, [f64::from(g.correct)]));
    let ratio = bootstrap(&clusters(sums), resamples, seed, |answers, [correct]| {
        correct / answers
    });
    let mut interval = ratio.ok_or(Error::NothingGraded)?.interval();
    let exact = 0.025_f64.powf(1.0 / interval.prompts as f64);
    if interval.mean >= 1.0 {
        interval.low = exact;
    } else if interval.mean <= 0.0 {
        interval.high = 1.0 - exact;
    }
    Ok(interval)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graded(correct: &[bool]) -> Vec<Graded> {
        let one = |(i, correct): (usize, &bool)| Graded {
            prompt_id: format!("p{i}"),
            group: Some(["add", "multiply"][i % 2].to_owned()),
            correct: *correct,
        };
        correct.iter().enumerate().map(one).collect()
    }

    #[test]
    fn the_interval_has_the_width_of_the_normal_approximation() {
        let correct: Vec<bool> = (0..400).map(|i| i % 4 != 0).collect();
        let overall = accuracy(&graded(&correct), 4000, 7).unwrap().overall;
        assert_eq!((overall.mean, overall.prompts), (0.75, 400));
        let half = 1.96 * (0.75_f64 * 0.25 / 400.0).sqrt();
        assert!(
            (overall.high - 0.75 - half).abs() < 0.15 * half,
            "{overall:?}"
        );
        assert!(
            (0.75 - overall.low - half).abs() < 0.15 * half,
            "{overall:?}"
        );
    }

    #[test]
    fn groups_are_counted_separately() {
        let correct: Vec<bool> = (0..40).map(|i| i % 2 == 0 || i < 10).collect();
        let all = accuracy(&graded(&correct), 500, 7).unwrap();
        assert_eq!((all.answers, all.correct), (40, 25));
        let found: Vec<(&str, f64, usize)> = all
            .groups
            .iter()
            .map(|g| (g.group.as_str(), g.accuracy.mean, g.accuracy.prompts))
            .collect();
        assert_eq!(found, [("add", 1.0, 20), ("multiply", 0.25, 20)]);
        let none: Vec<Graded> = graded(&correct)
            .into_iter()
            .map(|g| Graded { group: None, ..g })
            .collect();
        assert!(accuracy(&none, 50, 7).unwrap().groups.is_empty());
    }

    #[test]
    fn the_interval_of_all_right_answers_is_not_a_point() {
        let all = accuracy(&graded(&[true; 20]), 500, 7).unwrap().overall;
        assert_eq!((all.mean, all.high), (1.0, 1.0));
        // The Clopper-Pearson bound for 20 of 20 is scipy.stats.beta.ppf(0.025, 20, 1) = 0.8316
        assert!((all.low - 0.8316).abs() < 1e-4, "{all:?}");
        let none = accuracy(&graded(&[false; 20]), 500, 7).unwrap().overall;
        assert!((none.high - 0.1684).abs() < 1e-4 && none.low == 0.0);
    }

    #[test]
    fn samples_of_one_prompt_are_resampled_together() {
        let one = |prompt: usize, correct| Graded {
            prompt_id: format!("p{prompt}"),
            group: None,
            correct,
        };
        let four_each: Vec<Graded> = (0..80).map(|i| one(i / 4, i % 8 < 4)).collect();
        let one_each: Vec<Graded> = (0..20).map(|i| one(i, i % 2 == 0)).collect();
        let overall = |graded: &[Graded]| accuracy(graded, 500, 7).unwrap().overall;
        assert_eq!(overall(&four_each), overall(&one_each));
    }

    #[test]
    fn pairing_cancels_the_difficulty_of_prompts() {
        // b is right on the prompts of a, and on six more.
        let a: Vec<bool> = (0..100).map(|i| i < 50).collect();
        let b: Vec<bool> = (0..100).map(|i| i < 56).collect();
        let (a, b) = (graded(&a), graded(&b));
        let difference = paired_accuracy(&a, &b, 2000, 7).unwrap();
        assert!((difference.mean + 0.06).abs() < 1e-12);
        assert!(difference.high < 0.0, "{difference:?}");
        let (alone_a, alone_b) = (
            accuracy(&a, 2000, 7).unwrap().overall,
            accuracy(&b, 2000, 8).unwrap().overall,
        );
        assert!(alone_a.high > alone_b.low, "unpaired they overlap");
    }

    #[test]
    fn errors_name_the_first_difference() {
        let a = graded(&[true, false]);
        assert_eq!(
            paired_accuracy(&a, &a[..1], 50, 1).unwrap_err().to_string(),
            "two models were not measured over the same sequences: number 1 is p1 for one and absent for the other\nhint: run `eval` again"
        );
        assert_eq!(
            accuracy(&[], 50, 1).unwrap_err().to_string(),
            "no answer was graded\nhint: accuracy needs held-out prompts with a reference, and a grader"
        );
        assert!(paired_accuracy(&[], &[], 50, 1).is_err());
    }
}
