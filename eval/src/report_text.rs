//! Sentences about a run that the report has in Markdown and in HTML.

use crate::report::{Report, SplitFacts};
use crate::results::StudentResult;
use crate::sampling::{SamplingCheck, SamplingLaw};
use crate::wording::{count, magnitude};

/// Describes what the primary comparison could have found: "with 198 prompts and 3 seeds …".
pub(crate) fn power(report: &Report) -> Option<String> {
    let primary = report.primary()?;
    let seeds = match primary.seeds {
        0 | 1 => "one seed".to_owned(),
        seeds => format!("{seeds} seeds"),
    };
    let smallest = magnitude(primary.metric, primary.detectable?);
    let prompts = count(primary.difference.prompts as u64);
    Some(format!(
        "With {prompts} prompts and {seeds}, a true difference of {smallest} would be found with 80 % probability."
    ))
}

/// Describes the parameters and the steps of the models.
pub(crate) fn sizes(report: &Report) -> String {
    let trained: Vec<&StudentResult> = report.students.iter().filter(|s| s.steps > 0).collect();
    let mut parts = Vec::new();
    let parameters = trained.iter().find_map(|student| student.parameters);
    let teacher = report
        .teacher
        .as_ref()
        .and_then(|teacher| teacher.parameters);
    match (parameters, teacher) {
        (Some(student), Some(teacher)) => parts.push(format!(
            "The student has {} parameters, {:.0} % of the teacher's {}.",
            count(student),
            100.0 * student as f64 / teacher.max(1) as f64,
            count(teacher)
        )),
        (Some(student), None) => {
            parts.push(format!("The student has {} parameters.", count(student)))
        }
        (None, _) => {}
    }
    let steps: Vec<u64> = trained.iter().map(|student| student.steps).collect();
    let all_equal = steps
        .windows(2)
        .all(|pair| matches!(pair, [a, b] if a == b));
    match steps.first() {
        Some(steps) if all_equal => parts.push(format!(
            "Each trained model had {} optimizer steps.",
            count(*steps)
        )),
        Some(_) => {
            let steps = trained
                .iter()
                .map(|s| format!("{} {}", s.name, count(s.steps)));
            let steps = steps.collect::<Vec<_>>().join(", ");
            parts.push(format!("Optimizer steps: {steps}."));
        }
        None => {}
    }
    parts.join(" ")
}

/// Describes the number of near-duplicates.
pub(crate) fn near_duplicates(splits: &SplitFacts) -> String {
    let tested = splits.near_duplicates_in_test;
    let dev = splits.near_duplicates - tested;
    match splits.near_duplicates {
        0 => "No prompt of dev or test is a near-duplicate of a training prompt.".to_owned(),
        _ => format!(
            "Near-duplicates of training prompts: {} in test, {} in dev. They may make all trained models look better than they are.",
            count(tested),
            count(dev)
        ),
    }
}

/// Describes the figures of the sampling test, each by its name.
pub(crate) fn sampling(sampling: &SamplingCheck) -> Vec<(&'static str, String)> {
    let mut rows = vec![
        (
            "text",
            match sampling.law {
                SamplingLaw::Given => "the data's own answers".to_owned(),
                law => format!("sampled at {}", law.describe()),
            },
        ),
        ("tokens", count(sampling.positions)),
        (
            "mean of NLL − entropy",
            format!(
                "{:+.4} nats per token (z = {:.1}), of an entropy of {:.4}",
                sampling.mean_nats, sampling.z, sampling.entropy_nats
            ),
        ),
    ];
    if let (false, Some(mean), Some(z)) = (
        sampling.law.is_plain(),
        sampling.law_mean_nats,
        sampling.law_z,
    ) {
        rows.push((
            "mean of NLL − its expectation",
            format!("{mean:+.4} nats per token (z = {z:.1}) for text that is sampled like this"),
        ));
    }
    rows.extend(sampling.floor_nats.map(|floor| {
        let text = format!(
            "{floor:.4} nats per token from the teacher, for a perfect model of the text's temperature"
        );
        ("smallest KL of SFT", text)
    }));
    rows.extend(sampling.cut_mass.map(|cut| {
        let text = format!("{:.1} % of the teacher's probability", 100.0 * cut);
        ("never drawn", text)
    }));
    rows
}

/// The note above the figures of running means.
pub(crate) fn means_note(report: &Report) -> String {
    let figure = match report.has_distributions() {
        true => "KL",
        false => "NLL",
    };
    format!(
        "{figure} on the dev prompts, nats per token, of the weights that were trained and of their running mean (`ema`), at the checkpoint that is exported. The exported ones are in bold; the figures on test are theirs."
    )
}
