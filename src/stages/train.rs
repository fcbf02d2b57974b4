//! `train`: trains the student and its controls in their folders below `students/`.

use std::fs::{self, File};
use std::path::Path;

use anyhow::Context as _;
use potstill_datasets::{Manifest, Variant};

use super::training::{
    Training, exported_checkpoints, outcome_without_training, schedule, train_each,
};
use super::{Context, StageOutcome, known, memory, plan, planned, tune};
use crate::events::Event;
use crate::run_dir::{LedgerLine, StagePlan, now};

/// Trains each student of the run file that is not yet trained.
///
/// # Errors
/// When nothing was curated, the signals belong to another tokenizer than the student's, or the trainer
/// fails. Checkpoints are kept in all cases.
pub fn train(context: &Context) -> anyhow::Result<StageOutcome> {
    let (mut missing, mut all) = (Vec::new(), StageOutcome::UpToDate);
    for variant in context.variants() {
        let (stage, home) = (format!("train {variant}"), format!("students/{variant}"));
        let planned = known(context, &stage, &home, || {
            let training = training(context, variant)?;
            let plan = training.plan(context)?;
            Ok((training, plan))
        })?;
        let Some((training, plan)) = planned else {
            all = StageOutcome::WouldRun;
            continue;
        };
        match outcome_without_training(context, &plan)? {
            Some(outcome) => all = all.and(outcome),
            None => missing.push((training, plan)),
        }
    }
    if missing.is_empty() {
        return Ok(all);
    }
    match context.run.settings.train.learning_rates.is_empty() {
        true => planned::note(context)?,
        false => planned::note_in_nats(
            context,
            &tune::chosen_values(context)?,
            tune::metric(context),
        )?,
    }
    let mut untrained = Vec::new();
    for (training, plan) in missing {
        match tuned(context, &training)? {
            Some((tuned, manifest)) => publish_tuned(context, &training, &plan, &tuned, manifest)?,
            None => untrained.push((training, plan)),
        }
    }
    if !untrained.is_empty() {
        plan::check_fits(context)?;
        memory::reset_peak();
    }
    let one = |(training, plan): &(Training, StagePlan)| training.run(context, plan);
    Ok(match train_each(context, &untrained, one)? {
        StageOutcome::UpToDate => StageOutcome::Done,
        outcome => outcome,
    })
}

/// The training of a model of the run.
fn training(context: &Context, variant: Variant) -> anyhow::Result<Training> {
    Ok(Training {
        stage: format!("train {variant}"),
        home: format!("students/{variant}"),
        variant,
        schedule: schedule(context, tune::rate_of(context, variant.arm)?)?,
    })
}

/// Returns the training by which `tune` trained the same model, if there is one.
fn tuned(context: &Context, training: &Training) -> anyhow::Result<Option<(Training, Manifest)>> {
    let Variant { arm, seed_index } = training.variant;
    if seed_index != 0 || context.run.settings.train.learning_rates.is_empty() {
        return Ok(None);
    }
    let tuned = tune::training(context, arm, training.schedule.learning_rate)?;
    let manifest = context.dir.published(&tuned.home)?;
    let key = tuned.plan(context)?.key();
    Ok(manifest
        .filter(|manifest| manifest.key == key)
        .map(|manifest| (tuned, manifest)))
}

/// Publishes a training of `tune` as a model of the run. The files are links, since a published training does not
/// change.
fn publish_tuned(
    context: &Context,
    training: &Training,
    plan: &StagePlan,
    tuned: &Training,
    manifest: Manifest,
) -> anyhow::Result<()> {
    let Context { dir, console, .. } = context;
    training.prepare_folder(context, plan)?;
    let (from, to) = (dir.path(&tuned.home), dir.path(&training.home));
    for name in ["metrics.jsonl", "tensorboard"] {
        link(&from.join(name), &to.join(name))?;
    }
    let counts = manifest.counts;
    let tuned_folders = exported_checkpoints(&tuned.home, &counts);
    let folders = exported_checkpoints(&training.home, &counts);
    for (from, to) in tuned_folders.iter().zip(&folders) {
        let to = dir.path(to);
        // A checkpoint's folder gets its name when it is complete, as the trainer does it.
        let beside = to.with_file_name(".step-linked.tmp");
        link(&dir.verified(from)?, &beside)?;
        rename(&beside, &to)?;
    }
    training.publish(context, plan, counts.clone())?;
    dir.log(&LedgerLine {
        stage: training.stage.clone(),
        started_unix_seconds: now(),
        seconds: 0.0,
        verify_seconds: context.verify_seconds(&training.stage),
        finished: true,
        counts: counts.clone(),
    })?;
    let (stage, tuned) = (&training.stage, &tuned.stage);
    console.emit(&Event::finished(stage, counts, 0.0));
    console.detail(&format!("{stage}: the training of `{tuned}`"));
    Ok(())
}

/// Links a file, or all files of a folder, under another name. Copies where the file system has no links. What was
/// there before is replaced.
fn link(from: &Path, to: &Path) -> anyhow::Result<()> {
    let cannot = || format!("cannot link {} to {}", from.display(), to.display());
    if from.is_dir() {
        fs::create_dir_all(to).with_context(cannot)?;
        for entry in fs::read_dir(from).with_context(cannot)? {
            let entry = entry.with_context(cannot)?;
            link(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    if to.exists() {
        fs::remove_file(to).with_context(cannot)?;
    }
    fs::hard_link(from, to)
        .or_else(|_| {
            fs::copy(from, to)?;
            File::open(to)?.sync_all()
        })
        .with_context(cannot)
}

/// Renames a complete folder, which replaces the one that an interrupted process left.
fn rename(from: &Path, to: &Path) -> anyhow::Result<()> {
    let parent = to.parent().unwrap_or(Path::new("."));
    if to.exists() {
        fs::remove_dir_all(to).with_context(|| format!("cannot replace {}", to.display()))?;
    }
    fs::rename(from, to)
        .and_then(|()| File::open(parent)?.sync_all())
        .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
}
