//! `tune`: trains every arm at each of `learning_rates` with the run's first seed, and chooses the rate of each arm by
//! its figure on dev. Test is not read.
//!
//! A rate is trained in `tuning/<arm>-<rate>/`, as a model is in `students/`, and its values on dev are in `eval/dev/`
//! below it. `tuning.json` lists all rates and the choice. `train` publishes the trainings at the chosen rates without
//! training them again.

mod choice;

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, bail};
use choice::{Choice, TriedRate, choose_lowest, mean};
use potstill_datasets::{Arm, SequenceValues, Split, replace_file};
use potstill_eval::{Metric, TunedRate};
use serde_json::json;

use super::collect::is_published;
use super::eval::{measure, published_values};
use super::models::results_file;
use super::training::{Training, exported_model, outcome_without_training, schedule, train_each};
use super::{
    Context, StageOutcome, StageSummary, counts, curate, for_each_model, known, planned, run_stage,
    score,
};
use crate::events::Event;
use crate::run_dir::{StagePlan, settings_of};
use crate::run_file::ExportedWeights;

/// Folder of the trainings, below the run directory.
const HOME: &str = "tuning";
const CHOICE_FILE: &str = "tuning.json";
/// Count in the manifest of a training that diverged.
const DIVERGED: &str = "steps until the loss was not finite";

/// Trains every arm at each rate, measures the trained models on dev, and writes the choice.
///
/// # Errors
/// When the run file names no rates, dev is empty, the trainer fails for another reason than a loss that is not finite,
/// or all trainings of an arm diverged.
pub fn tune(context: &Context) -> anyhow::Result<StageOutcome> {
    let run = &context.run;
    if run.settings.train.learning_rates.is_empty() {
        bail!(
            "{} has no `learning_rates` in [train], so there is nothing to choose\nhint: set `learning_rates = [1e-3, 2e-3, 4e-3]` in place of `learning_rate`",
            run.path.display()
        );
    }
    if known(context, "tune", HOME, || check_dev(context))?.is_none() {
        return say_trainings(context);
    }
    let trainings = trainings(context)?;
    let trained = train_rates(context, &trainings)?;
    if trained == StageOutcome::Stopped {
        return Ok(trained);
    }
    let measured = measure_rates(context, &trainings)?;
    if measured == StageOutcome::Stopped {
        return Ok(measured);
    }
    let chosen = choose(context, &trainings)?;
    Ok(trained.and(measured).and(chosen))
}

/// Says in a dry run which trainings would run, where what they learn from is not there yet.
fn say_trainings(context: &Context) -> anyhow::Result<StageOutcome> {
    for arm in context.arms() {
        for rate in &context.run.settings.train.learning_rates {
            let (stage, home) = (format!("tune {}", name(arm, *rate)), home(arm, *rate));
            let (dev_stage, dev_home) = (dev_stage(&stage), dev_home(&home));
            known(context, &stage, &home, || check_dev(context))?;
            known(context, &dev_stage, &dev_home, || check_dev(context))?;
        }
    }
    Ok(StageOutcome::WouldRun)
}

/// Checks that there is something to choose on.
fn check_dev(context: &Context) -> anyhow::Result<()> {
    if curate::selected_count(context, Split::Dev)? == 0 {
        bail!(
            "dev has no answers, so no learning rate can be chosen on it\nhint: raise `dev` in [curate], or import more prompts"
        );
    }
    Ok(())
}

/// The learning rate of an arm: the one that `tune` chose, or without `learning_rates` the one of the run file.
///
/// # Errors
/// When `tune` has not chosen from the rates of the run file.
pub(super) fn rate_of(context: &Context, arm: Arm) -> anyhow::Result<f64> {
    let file = &context.run.settings;
    let rates = file.train.rates(file.student.default_learning_rate());
    if let [rate] = rates.as_slice() {
        return Ok(*rate);
    }
    let choice = published_choice(context)?;
    let is_chosen = |rate: &&f64| {
        let home = home(arm, **rate);
        let tried = choice.rates.iter();
        tried.filter(|t| t.training == home).any(|t| t.chosen)
    };
    let chosen = rates.iter().find(is_chosen).copied();
    chosen.with_context(|| {
        format!(
            "{} has no choice for `{}` among the rates of the run file\nhint: `potstill tune {}` chooses again",
            context.dir.path(CHOICE_FILE).display(),
            arm.name(),
            context.run.path.display()
        )
    })
}

/// The training of an arm at one of the rates.
pub(super) fn training(context: &Context, arm: Arm, rate: f64) -> anyhow::Result<Training> {
    Ok(Training {
        stage: format!("tune {}", name(arm, rate)),
        home: home(arm, rate),
        variant: arm.first(),
        schedule: schedule(context, rate)?,
    })
}

/// Metric by which rates are chosen: KL, or NLL without distributions.
pub(super) fn metric(context: &Context) -> Metric {
    match context.run.settings.has_signals() {
        true => Metric::Kl,
        false => Metric::Nll,
    }
}

/// All rates with their figures on dev; none if the run file names no rates. A training that
/// diverged has no figure.
pub(super) fn tuned_rates(context: &Context) -> anyhow::Result<Vec<TunedRate>> {
    if context.run.settings.train.learning_rates.is_empty() {
        return Ok(Vec::new());
    }
    let mut tuned = Vec::new();
    for tried in published_choice(context)?.rates {
        let arm = Arm::ALL.into_iter().find(|arm| arm.name() == tried.arm);
        tuned.push(TunedRate {
            arm: arm.with_context(|| format!("{CHOICE_FILE} names an unknown arm"))?,
            learning_rate: tried.learning_rate,
            dev: tried.dev,
            chosen: tried.chosen,
        });
    }
    Ok(tuned)
}

/// Values on dev of the trainings at the chosen rates, by arm; empty if the run file names no rates.
pub(super) fn chosen_values(context: &Context) -> anyhow::Result<Vec<(Arm, Vec<SequenceValues>)>> {
    let tuned = tuned_rates(context)?;
    let chosen = tuned.iter().filter(|rate| rate.chosen);
    chosen
        .map(|rate| {
            let home = home(rate.arm, rate_of(context, rate.arm)?);
            Ok((rate.arm, published_values(context, &dev_home(&home))?))
        })
        .collect()
}

/// Each folder that `tune` publishes, for the report; none if the run file names no rates.
pub(super) fn homes(context: &Context) -> anyhow::Result<Vec<String>> {
    let mut homes = trained_homes(context, &trainings(context)?)?;
    if !homes.is_empty() {
        homes.push(HOME.to_owned());
    }
    Ok(homes)
}

/// Folders of the trainings and, of those that did not diverge, of their values on dev.
fn trained_homes(context: &Context, trainings: &[Training]) -> anyhow::Result<Vec<String>> {
    let mut homes = Vec::new();
    for training in trainings {
        homes.push(training.home.clone());
        if !has_diverged(context, training)? {
            homes.push(dev_home(&training.home));
        }
    }
    Ok(homes)
}

/// Name of a training, such as `student-3e-3`.
fn name(arm: Arm, rate: f64) -> String {
    format!("{}-{rate:e}", arm.name())
}

fn home(arm: Arm, rate: f64) -> String {
    format!("{HOME}/{}", name(arm, rate))
}

/// Name of the stage that measures a training on dev.
fn dev_stage(stage: &str) -> String {
    format!("{stage} on dev")
}

fn dev_home(home: &str) -> String {
    format!("{home}/eval/dev")
}

/// The trainings of all arms and rates, in the order of the run file; none if it names no rates.
fn trainings(context: &Context) -> anyhow::Result<Vec<Training>> {
    let rates = &context.run.settings.train.learning_rates;
    let arms = context.arms().into_iter();
    arms.flat_map(|arm| rates.iter().map(move |rate| (arm, *rate)))
        .map(|(arm, rate)| training(context, arm, rate))
        .collect()
}

fn train_rates(context: &Context, trainings: &[Training]) -> anyhow::Result<StageOutcome> {
    let (mut missing, mut all) = (Vec::new(), StageOutcome::UpToDate);
    for training in trainings {
        let plan = training.plan(context)?;
        match outcome_without_training(context, &plan)? {
            Some(outcome) => all = all.and(outcome),
            None => missing.push((training, plan)),
        }
    }
    if !missing.is_empty() {
        planned::note(context)?;
    }
    let trained = train_each(
        context,
        &missing,
        |(training, plan): &(&Training, StagePlan)| match training.run(context, plan) {
            Err(error) => match error.downcast_ref() {
                Some(potstill_student::Error::NotFinite { step, .. }) => {
                    publish_diverged(context, training, plan, "loss is not finite", *step)
                }
                Some(potstill_student::Error::GradientJump { step, .. }) => {
                    publish_diverged(context, training, plan, "gradient jumps", *step)
                }
                _ => Err(error),
            },
            outcome => outcome,
        },
    )?;
    Ok(all.and(trained))
}

/// Records that a training diverged at a step. It is not chosen, and not trained again.
fn publish_diverged(
    context: &Context,
    training: &Training,
    plan: &StagePlan,
    fault: &str,
    step: u64,
) -> anyhow::Result<StageOutcome> {
    let counts = counts([(DIVERGED, step as usize)]);
    training.write_manifest(context, plan, BTreeMap::new(), counts)?;
    let text = format!(
        "{}: the {fault} at step {step}, so this learning rate is not chosen",
        training.stage
    );
    context.console.emit(&Event::Warning { text });
    Ok(StageOutcome::Done)
}

fn has_diverged(context: &Context, training: &Training) -> anyhow::Result<bool> {
    let manifest = context.dir.require(&training.home, "tune", &context.run)?;
    Ok(manifest.counts.contains_key(DIVERGED))
}

fn measure_rates(context: &Context, trainings: &[Training]) -> anyhow::Result<StageOutcome> {
    let (mut done, mut missing) = (Vec::new(), Vec::new());
    let mut all = StageOutcome::UpToDate;
    for training in trainings {
        let (stage, home) = (dev_stage(&training.stage), dev_home(&training.home));
        let plan = known(context, &stage, &home, || {
            match has_diverged(context, training)? {
                true => Ok(None),
                false => dev_plan(context, training).map(Some),
            }
        })?;
        let plan = match plan {
            Some(Some(plan)) => plan,
            Some(None) => continue,
            None => {
                all = StageOutcome::WouldRun;
                continue;
            }
        };
        match is_published(context, &plan)? {
            true => done.push((training, plan)),
            false => missing.push((training, plan)),
        }
    }
    let one = |(training, plan): &(&Training, StagePlan)| measure_rate(context, training, plan);
    for_each_model(&done, one)?;
    Ok(all.and(train_each(context, &missing, one)?))
}

/// Measures the trained model of one rate on dev.
fn measure_rate(
    context: &Context,
    training: &Training,
    plan: &StagePlan,
) -> anyhow::Result<StageOutcome> {
    let measured = run_stage(context, plan, |out| {
        let trained = context.dir.require(&training.home, "tune", &context.run)?;
        let seed_index = training.variant.seed_index;
        let weights = exported_model(context, seed_index, &training.home, &trained.counts)?;
        let values = measure(context, &plan.stage, &weights, Split::Dev, out, &plan.home)?;
        Ok(values.map(|values| {
            let tokens = values.iter().map(|v| v.tokens as usize).sum();
            StageSummary::new(counts([("sequences", values.len()), ("tokens", tokens)]))
        }))
    });
    match measured {
        // The last step may have left weights that are not finite.
        Err(error) => match error.downcast_ref() {
            Some(potstill_eval::Error::NotFinite { .. }) => {
                let plan = training.plan(context)?;
                publish_diverged(
                    context,
                    training,
                    &plan,
                    "loss on dev is not finite",
                    training.schedule.steps,
                )
            }
            _ => Err(error),
        },
        outcome => outcome,
    }
}

fn dev_plan(context: &Context, training: &Training) -> anyhow::Result<StagePlan> {
    let (dir, run) = (&context.dir, &context.run);
    let home = dev_home(&training.home);
    let completions = dir.require("completions", "collect", run)?;
    let curation = dir.require("train", "curate", run)?;
    let trained = dir.require(&training.home, "tune", run)?;
    let mut settings = json!({
        "chunk_rows": run.settings.train.chunk_rows,
        "resamples": run.settings.eval.resamples,
        "seed": u64::from(run.settings.run.seed),
    });
    if run.settings.export.weights != ExportedWeights::default() {
        settings["weights"] = settings_of(&run.settings.export.weights)?;
    }
    Ok(StagePlan {
        stage: dev_stage(&training.stage),
        outputs: vec![home.clone(), results_file(&home)],
        home,
        settings,
        inputs: BTreeMap::from([
            ("completions".to_owned(), completions.content_hash()),
            ("dev".to_owned(), curation.content_hash()),
            ("model".to_owned(), trained.content_hash()),
        ])
        .into_iter()
        .chain(score::input(context)?)
        .collect(),
    })
}

/// Chooses the rate of each arm and writes `tuning.json`.
fn choose(context: &Context, trainings: &[Training]) -> anyhow::Result<StageOutcome> {
    let metric = metric(context);
    let plan = known(context, "tune", HOME, || {
        choice_plan(context, trainings, metric)
    })?;
    let Some(plan) = plan else {
        return Ok(StageOutcome::WouldRun);
    };
    run_stage(context, &plan, |out| {
        let mut rates = Vec::new();
        for training in trainings {
            let dev = match has_diverged(context, training)? {
                true => None,
                false => {
                    let values = published_values(context, &dev_home(&training.home))?;
                    Some(mean(&values, metric))
                }
            };
            rates.push(TriedRate {
                arm: training.variant.arm.name().to_owned(),
                learning_rate: training.schedule.learning_rate,
                training: training.home.clone(),
                dev: dev.filter(|dev| dev.is_finite()),
                chosen: false,
            });
        }
        for arm in context.arms() {
            choose_lowest(&mut rates, arm.name())?;
        }
        let tried = rates.len();
        let choice = Choice { metric, rates };
        let text = serde_json::to_string_pretty(&choice)? + "\n";
        replace_file(&out.join(CHOICE_FILE), text.as_bytes())?;
        Ok(Some(StageSummary::new(counts([("trainings", tried)]))))
    })
}

fn choice_plan(
    context: &Context,
    trainings: &[Training],
    metric: Metric,
) -> anyhow::Result<StagePlan> {
    let mut inputs = BTreeMap::new();
    for home in trained_homes(context, trainings)? {
        let manifest = context.dir.require(&home, "tune", &context.run)?;
        inputs.insert(home, manifest.content_hash());
    }
    Ok(StagePlan {
        stage: "tune".to_owned(),
        home: HOME.to_owned(),
        outputs: vec![CHOICE_FILE.to_owned()],
        settings: json!({ "metric": metric }),
        inputs,
    })
}

fn published_choice(context: &Context) -> anyhow::Result<Choice> {
    context.dir.require(HOME, "tune", &context.run)?;
    let path = context.dir.verified(CHOICE_FILE)?;
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| {
        format!(
            "{} is damaged\nhint: delete it and run `tune` again",
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_names_that_differ() {
        let names = [3e-3, 1.5e-3, 1e-4, 0.1, 1.0].map(|rate| name(Arm::SameToken, rate));
        assert_eq!(
            names.join(" "),
            "same_token-3e-3 same_token-1.5e-3 same_token-1e-4 same_token-1e-1 same_token-1e0"
        );
    }
}
