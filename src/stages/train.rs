//! `train`: trains the student and its controls in their folders below `students/`.

use potstill_datasets::Variant;

use super::training::{Training, outcome_without_training, schedule, train_each};
use super::{Context, StageOutcome};
use crate::run_dir::StagePlan;

/// Trains each student of the run file that is not yet trained.
///
/// # Errors
/// When nothing was curated, the signals belong to another tokenizer than the student's, or the trainer
/// fails. Checkpoints are kept in all cases.
pub fn train(context: &Context) -> anyhow::Result<StageOutcome> {
    let mut missing = Vec::new();
    for variant in context.variants() {
        let training = training(context, variant)?;
        let plan = training.plan(context)?;
        match outcome_without_training(context, &plan)? {
            Some(StageOutcome::UpToDate) => {}
            Some(outcome) => return Ok(outcome),
            None => missing.push((training, plan)),
        }
    }
    train_each(
        context,
        &missing,
        |(training, plan): &(Training, StagePlan)| training.run(context, plan),
    )
}

/// The training of a model of the run.
fn training(context: &Context, variant: Variant) -> anyhow::Result<Training> {
    let file = &context.run.settings;
    let learning_rate = file.train.rates(file.student.default_learning_rate());
    let learning_rate = learning_rate.first().copied().unwrap_or_default();
    Ok(Training {
        stage: format!("train {variant}"),
        home: format!("students/{variant}"),
        variant,
        schedule: schedule(context, learning_rate)?,
    })
}
