//! Accuracy: the share of right answers.
//!
//! The interval is Wilson's, which is not a point if all answers are right. Several answers to a prompt, or of several
//! seeds, are not independent, so the number of answers is divided by the design effect (Kish 1965): the variance of the
//! share, estimated over prompts and seeds, over the variance of as many independent answers.

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::estimate::{Estimate, PromptSums};
use crate::interval::Interval;

/// The 97.5th percentile of the normal distribution.
const NORMAL_95: f64 = 1.959_963_984_540_054;

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

/// Computes the accuracy over the graded answers of each training seed, overall and by group, with 95 % intervals.
///
/// # Errors
/// If there are no answers, or the seeds have answers to different prompts.
pub fn accuracy(seeds: &[&[Graded]]) -> Result<Accuracy, Error> {
    let overall = share(&answer_sums(seeds, |_| true)?);
    let all = || seeds.iter().copied().flatten();
    let mut names: Vec<&str> = all().filter_map(|g| g.group.as_deref()).collect();
    names.sort_unstable();
    names.dedup();
    let mut groups = Vec::new();
    for name in names {
        let sums = answer_sums(seeds, |g| g.group.as_deref() == Some(name))?;
        groups.push(GroupAccuracy {
            group: name.to_owned(),
            accuracy: share(&sums),
        });
    }
    Ok(Accuracy {
        overall,
        answers: all().count() as u64,
        correct: all().filter(|g| g.correct).count() as u64,
        groups,
    })
}

/// Adds up right answers by prompt and seed, with the number of answers as the weight.
///
/// # Errors
/// If no answer passes `filter`, or the seeds have answers to different prompts.
pub(crate) fn answer_sums<'a>(
    seeds: &[&'a [Graded]],
    filter: impl Fn(&Graded) -> bool,
) -> Result<PromptSums<'a>, Error> {
    let mut sums: Option<PromptSums<'_>> = None;
    for graded in seeds {
        let records = graded.iter().filter(|g| filter(g));
        let records = records.map(|g| (g.prompt_id.as_str(), f64::from(u8::from(g.correct)), 1.0));
        let of_seed = PromptSums::of_seed(records);
        sums = Some(match sums {
            None => of_seed,
            Some(sums) => sums.with_seed(of_seed)?,
        });
    }
    sums.filter(|sums| !sums.prompts.is_empty())
        .ok_or(Error::NothingGraded)
}

fn share(sums: &PromptSums<'_>) -> Interval {
    let estimate = Estimate::of(sums);
    let share = estimate.mean;
    let prompts = estimate.prompts as f64;
    let answers: f64 = sums.seeds.iter().flatten().map(|cell| cell.weight).sum();
    // The jackknife divides by prompts − 1; with one answer for each prompt the effective number is then that of answers.
    let squared_error = estimate.error().powi(2) * (1.0 - 1.0 / prompts);
    let effective = match squared_error > 0.0 {
        true => (share * (1.0 - share) / squared_error).min(answers),
        false => prompts,
    };
    let (low, high) = wilson(share, effective, NORMAL_95 * estimate.widening());
    Interval {
        mean: share,
        low,
        high,
        prompts: estimate.prompts,
    }
}

/// Score interval of a share of `count` answers, with critical value `z` (Wilson 1927).
fn wilson(share: f64, count: f64, z: f64) -> (f64, f64) {
    let square = z * z / count;
    let centre = (share + 0.5 * square) / (1.0 + square);
    let half_width = (square * (share * (1.0 - share) + 0.25 * square)).sqrt() / (1.0 + square);
    (
        (centre - half_width).max(0.0),
        (centre + half_width).min(1.0),
    )
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

    fn all(seeds: &[&[Graded]]) -> Interval {
        accuracy(seeds).unwrap().overall
    }

    /// python: scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    #[test]
    fn one_answer_for_each_prompt_has_the_interval_of_scipy() {
        for (correct, answers, low, high) in [
            (18, 20, 0.698_966_354_8, 0.972_133_518_8),
            (20, 20, 0.838_874_841_9, 1.0),
            (0, 20, 0.0, 0.161_125_158_1),
            (150, 200, 0.685_659_016_9, 0.804_918_318_3),
            (300, 400, 0.705_322_867_1, 0.789_921_006_0),
        ] {
            let correct: Vec<bool> = (0..answers).map(|i| i < correct).collect();
            let found = all(&[&graded(&correct)]);
            assert!((found.low - low).abs() < 1e-7, "{found:?} instead of {low}");
            assert!(
                (found.high - high).abs() < 1e-7,
                "{found:?} instead of {high}"
            );
            assert_eq!(found.prompts, answers);
        }
    }

    #[test]
    fn groups_are_counted_separately() {
        let correct: Vec<bool> = (0..40).map(|i| i % 2 == 0 || i < 10).collect();
        let found = accuracy(&[&graded(&correct)]).unwrap();
        assert_eq!((found.answers, found.correct), (40, 25));
        let found: Vec<(&str, f64, usize)> = found
            .groups
            .iter()
            .map(|g| (g.group.as_str(), g.accuracy.mean, g.accuracy.prompts))
            .collect();
        assert_eq!(found, [("add", 1.0, 20), ("multiply", 0.25, 20)]);
        let none: Vec<Graded> = graded(&correct)
            .into_iter()
            .map(|g| Graded { group: None, ..g })
            .collect();
        assert!(accuracy(&[&none]).unwrap().groups.is_empty());
    }

    #[test]
    fn equal_answers_to_one_prompt_count_once() {
        let one = |prompt: usize, correct| Graded {
            prompt_id: format!("p{prompt}"),
            group: None,
            correct,
        };
        let four_each: Vec<Graded> = (0..80).map(|i| one(i / 4, i % 8 < 4)).collect();
        let one_each: Vec<Graded> = (0..20).map(|i| one(i, i % 2 == 0)).collect();
        let (four, single) = (all(&[&four_each]), all(&[&one_each]));
        assert!((four.low - single.low).abs() < 1e-12, "{four:?} {single:?}");
        let seeds = all(&[&one_each, &one_each, &one_each]);
        assert!(
            (seeds.low - single.low).abs() < 1e-9,
            "{seeds:?} {single:?}"
        );
        // Four independent answers for each prompt count four times.
        let independent: Vec<Graded> = (0..400).map(|i| one(i / 4, i * 7 % 10 < 5)).collect();
        let found = all(&[&independent]);
        assert!(found.high - found.low < 0.11, "{found:?}");
    }

    #[test]
    fn errors_name_the_first_difference() {
        let a = graded(&[true, false]);
        assert_eq!(
            accuracy(&[&a, &a[..1]]).unwrap_err().to_string(),
            "two models were not measured over the same sequences: number 1 is p1 for one and absent for the other\nhint: run `eval` again"
        );
        for nothing in [accuracy(&[]), accuracy(&[&[]])] {
            assert!(matches!(nothing, Err(Error::NothingGraded)));
        }
    }
}
