//! `eval`: measures the exported students, and the student before training, on `heldout/`.

use std::collections::BTreeMap;

use potstill_datasets::{RunModel, SequenceValues, read_shard, replace_file, write_shard};
use potstill_eval::{Heldout, Metric, interval};
use potstill_student::{SignalKind, evaluate};
use serde_json::json;

use super::models::{heldout_home, load, model_key, results_file};
use super::rows::SelectedRows;
use super::{
    Context, StageOutcome, StageSummary, answers, counts, for_each_model, run_stage, score,
};
use crate::interrupt;
use crate::run_dir::StagePlan;

const SAMPLES_FILE: &str = "samples.parquet";

/// Measures every model of the run on the held-out text, and lets it answer the held-out prompts.
///
/// # Errors
/// When nothing was curated, or a student is not yet exported.
pub fn eval(context: &Context) -> anyhow::Result<StageOutcome> {
    let mut models = vec![RunModel::Base];
    models.extend(context.variants().into_iter().map(RunModel::Trained));
    let measured = for_each_model(&models, |model| eval_one(context, *model))?;
    if matches!(measured, StageOutcome::Stopped | StageOutcome::WouldRun) {
        return Ok(measured);
    }
    if context.run.settings.local().is_some() {
        models.insert(0, RunModel::Teacher);
    }
    let answered = for_each_model(&models, |model| answers::answer_one(context, *model))?;
    Ok(match answered {
        StageOutcome::UpToDate => measured,
        _ => answered,
    })
}

/// Measures one model on the held-out text.
fn eval_one(context: &Context, model: RunModel) -> anyhow::Result<StageOutcome> {
    let plan = plan(context, model)?;
    run_stage(context, &plan, |out| {
        let file = &context.run.settings;
        let weights = load(context, model)?;
        let mut rows = SelectedRows::open(context, "heldout")?;
        let len = rows.list.len();
        let mut progress = context
            .console
            .progress(&plan.stage, "sequences", 0, len as u64);
        let mut on_row = |done| {
            progress.update(done as u64, 0, "");
            interrupt::control_flow()
        };
        let mut row = |i| rows.get(i);
        let chunk_rows = file.train.chunk_rows;
        let kind = match file.has_signals() {
            true => SignalKind::Distributions,
            false => SignalKind::Text,
        };
        let values = evaluate(&weights, &mut row, len, kind, chunk_rows, &mut on_row)?;
        let Some(values) = values else {
            return Ok(None);
        };
        write_shard(&out.join(&plan.home).join(SAMPLES_FILE), &values, &[])?;
        let seed = u64::from(file.run.seed);
        let figure = |metric| interval(&values, metric, file.eval.resamples, seed);
        let results = json!({
            "heldout": Heldout::from_values(&values)?,
            "kl": figure(Metric::Kl)?,
            "nll": figure(Metric::Nll)?,
            "agreement": figure(Metric::Agreement)?,
        });
        let results = serde_json::to_string_pretty(&results)? + "\n";
        replace_file(&out.join(results_file(&plan.home)), results.as_bytes())?;
        let tokens = values.iter().map(|v| v.tokens as usize).sum();
        Ok(Some(StageSummary::new(counts([
            ("sequences", len),
            ("tokens", tokens),
        ]))))
    })
}

fn plan(context: &Context, model: RunModel) -> anyhow::Result<StagePlan> {
    let run = &context.run;
    let completions = context.dir.require("completions", "collect", run)?;
    let curation = context.dir.require("train", "curate", run)?;
    Ok(StagePlan {
        stage: format!("eval {model}"),
        home: heldout_home(model),
        outputs: vec![heldout_home(model), results_file(&heldout_home(model))],
        settings: json!({
            "chunk_rows": run.settings.train.chunk_rows,
            "resamples": run.settings.eval.resamples,
            "seed": u64::from(run.settings.run.seed),
        }),
        inputs: BTreeMap::from([
            ("completions".to_owned(), completions.content_hash()),
            ("heldout".to_owned(), curation.content_hash()),
            ("model".to_owned(), model_key(context, model)?),
        ])
        .into_iter()
        .chain(score::input(context)?)
        .collect(),
    })
}

/// Reads a model's published values, in the order of `heldout/`.
pub(crate) fn values(context: &Context, model: RunModel) -> anyhow::Result<Vec<SequenceValues>> {
    let path = context.dir.path(&heldout_home(model)).join(SAMPLES_FILE);
    let mut values = Vec::new();
    for value in read_shard::<SequenceValues>(&path)? {
        values.push(value?);
    }
    Ok(values)
}
