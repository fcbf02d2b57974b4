//! The smallest difference between two models that a run can find, printed before anything is trained.

use potstill_datasets::{Arm, SequenceValues, Split};
use potstill_eval::{Metric, PlannedDetectable, planned_detectable, prompt_deviation};

use super::{Context, curate};

/// Describes the smallest detectable difference in standard deviations; `None` if test has fewer than two prompts.
pub(super) fn in_deviations(prompts: usize, seeds: u32) -> Option<String> {
    let planned = planned_detectable(prompts, seeds as usize)?;
    Some(format!(
        "{:.2} standard deviations between prompts ({prompts} test prompts){}, with 80 % power",
        planned.prompt_deviations,
        match planned.seed_deviations {
            Some(deviations) => {
                format!(", and {deviations:.2} standard deviations between seeds ({seeds} seeds)")
            }
            None => String::new(),
        }
    ))
}

/// Prints the smallest detectable difference before a training starts.
pub(super) fn note(context: &Context) -> anyhow::Result<()> {
    let (prompts, seeds) = (test_prompts(context)?, context.run.settings.train.seeds);
    if let Some(text) = in_deviations(prompts, seeds) {
        let text = format!("smallest detectable difference: {text}");
        context.console.note(&text);
    }
    Ok(())
}

/// Prints the smallest detectable difference in nats, from the values on dev that `tune` measured for each arm. Prints
/// nothing without those of the student or of the SFT control.
pub(super) fn note_in_nats(
    context: &Context,
    measured: &[(Arm, Vec<SequenceValues>)],
    metric: Metric,
) -> anyhow::Result<()> {
    let (prompts, seeds) = (test_prompts(context)?, context.run.settings.train.seeds);
    let Some(planned) = planned_detectable(prompts, seeds as usize) else {
        return Ok(());
    };
    let of_arm = |arm| measured.iter().find(|(of, _)| *of == arm);
    let (Some((_, student)), Some((_, sft))) = (of_arm(Arm::Student), of_arm(Arm::Sft)) else {
        return Ok(());
    };
    let deviation = prompt_deviation(student, sft, metric)?;
    // One prompt has no deviation.
    if !(deviation.is_finite() && deviation > 0.0) {
        return Ok(());
    }
    context.console.note(&format!(
        "on dev, the difference of `student` and `sft` in {} has a standard deviation of {deviation:.4} nats per token between prompts, so the smallest detectable difference is about {:.4} nats per token{}",
        metric.name(),
        planned.in_units(deviation, 0.0),
        match planned {
            PlannedDetectable { seed_deviations: Some(_), .. } => " before the variation between seeds",
            _ => "",
        }
    ));
    Ok(())
}

/// Number of test prompts with an answer.
fn test_prompts(context: &Context) -> anyhow::Result<usize> {
    Ok(curate::split_counts(context, Split::Test)?.prompts as usize)
}
