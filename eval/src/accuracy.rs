//! Accuracy: the share of answers that a grader found right.
//!
//! The interval is the bootstrap over prompts of `bootstrap`. Where all answers are right
//! (or all wrong) every draw is the same and that interval would be a point, so its open
//! end is then the exact binomial one over prompts, 0.025^(1/n) (Clopper & Pearson, 1934).

use serde::{Deserialize, Serialize};

use crate::bootstrap::{bootstrap, clusters};
use crate::{Error, Interval};

/// One graded answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Graded {
    /// The prompt's id.
    pub prompt_id: String,
    /// Which part of the task the prompt belongs to, such as "addition".
    pub group: Option<String>,
    /// Whether the answer is right.
    pub correct: bool,
}

/// A model's accuracy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Share of answers that are right, 0 to 1.
    pub overall: Interval,
    /// How many answers were graded.
    pub answers: u64,
    /// How many of them are right.
    pub correct: u64,
    /// The same by group, sorted by name; empty where answers have none.
    pub groups: Vec<GroupAccuracy>,
}

/// Accuracy over the answers of one group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupAccuracy {
    /// The group's name.
    pub group: String,
    /// Share of its answers that are right, 0 to 1.
    pub accuracy: Interval,
}

/// A model's accuracy over `graded`, overall and by group, with 95 % intervals from
/// `resamples` draws of prompts.
///
/// # Errors
/// When nothing was graded.
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

/// The difference in accuracy a − b over the same prompts, with its 95 % interval.
///
/// # Errors
/// When the two lists are not of the same prompts in the same order, or are empty.
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
    let draws =
        bootstrap(&clusters(both), resamples, seed, difference).ok_or(Error::NothingGraded)?;
    Ok(draws.interval())
}

fn share<'a>(
    graded: impl Iterator<Item = &'a Graded>,
    resamples: usize,
    seed: u64,
) -> Result<Interval, Error> {
    let sums = graded.map(|g| (g.prompt_id.as_str(), 1.0, [f64::from(g.correct)]));
    let draws = bootstrap(&clusters(sums), resamples, seed, |answers, [correct]| {
        correct / answers
    });
    let mut interval = draws.ok_or(Error::NothingGraded)?.interval();
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
    fn groups_are_counted_apart() {
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
    fn all_right_is_not_certainty() {
        let all = accuracy(&graded(&[true; 20]), 500, 7).unwrap().overall;
        assert_eq!((all.mean, all.high), (1.0, 1.0));
        // Clopper-Pearson for 20 of 20: scipy.stats.beta.ppf(0.025, 20, 1) = 0.8316
        assert!((all.low - 0.8316).abs() < 1e-4, "{all:?}");
        let none = accuracy(&graded(&[false; 20]), 500, 7).unwrap().overall;
        assert!((none.high - 0.1684).abs() < 1e-4 && none.low == 0.0);
    }

    #[test]
    fn samples_of_one_prompt_are_drawn_together() {
        let one = |prompt: usize, correct| Graded {
            prompt_id: format!("p{prompt}"),
            group: None,
            correct,
        };
        let four_each: Vec<Graded> = (0..80).map(|i| one(i / 4, i % 8 < 4)).collect();
        let one_each: Vec<Graded> = (0..20).map(|i| one(i, i % 2 == 0)).collect();
        let of = |graded: &[Graded]| accuracy(graded, 500, 7).unwrap().overall;
        assert_eq!(of(&four_each), of(&one_each));
    }

    #[test]
    fn pairing_takes_the_prompts_difficulty_out() {
        // b is right where a is, and on six prompts more.
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
    fn what_cannot_be_compared_is_named() {
        let a = graded(&[true, false]);
        insta::assert_snapshot!(
            paired_accuracy(&a, &a[..1], 50, 1).unwrap_err(),
            @"the two students were not measured over the same sequences: number 1 is p1 on one side and absent on the other; run `eval` for both again"
        );
        insta::assert_snapshot!(
            accuracy(&[], 50, 1).unwrap_err(),
            @"no answer was graded: accuracy needs held-out prompts with a reference, and a grader"
        );
        assert!(paired_accuracy(&[], &[], 50, 1).is_err());
    }
}
