//! `eval`: measures the exported students, and the student before training, on `test/`.

use std::collections::BTreeMap;
use std::path::Path;

use potstill_datasets::{RunModel, SequenceValues, Split, read_shard, replace_file, write_shard};
use potstill_eval::{Heldout, Metric, interval};
use potstill_model::Llama;
use potstill_student::{SignalKind, evaluate};
use serde_json::json;

use super::models::{load, model_key, results_file, test_home};
use super::rows::SelectedRows;
use super::{
    Context, StageOutcome, StageSummary, answers, counts, for_each_model, run_stage, score,
};
use crate::interrupt;
use crate::run_dir::StagePlan;

const SAMPLES_FILE: &str = "samples.parquet";

/// Measures every model of the run on the answers of test, and lets it answer the prompts of test.
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

/// Measures one model on test.
fn eval_one(context: &Context, model: RunModel) -> anyhow::Result<StageOutcome> {
    let plan = plan(context, model)?;
    run_stage(context, &plan, |out| {
        let weights = load(context, model)?;
        let values = measure(context, &plan.stage, &weights, Split::Test, out, &plan.home)?;
        Ok(values.map(|values| {
            let tokens = values.iter().map(|v| v.tokens as usize).sum();
            StageSummary::new(counts([("sequences", values.len()), ("tokens", tokens)]))
        }))
    })
}

/// Measures a model on the answers of a split. Writes the values to the folder `home` below `out` and the figures to
/// the file beside it, and returns the values; `None` if the user stopped it. `stage` is the name in the progress
/// output.
pub(super) fn measure(
    context: &Context,
    stage: &str,
    weights: &Llama,
    split: Split,
    out: &Path,
    home: &str,
) -> anyhow::Result<Option<Vec<SequenceValues>>> {
    let file = &context.run.settings;
    let mut rows = SelectedRows::open(context, split)?;
    let len = rows.list.len();
    let mut progress = context.console.progress(stage, "sequences", 0, len as u64);
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
    let values = evaluate(weights, &mut row, len, kind, chunk_rows, &mut on_row)?;
    let Some(values) = values else {
        return Ok(None);
    };
    write_shard(&out.join(home).join(SAMPLES_FILE), &values, &[])?;
    let figure = |metric| interval(&values, metric);
    let results = json!({
        "text": Heldout::from_values(&values)?,
        "kl": figure(Metric::Kl)?,
        "nll": figure(Metric::Nll)?,
        "agreement": figure(Metric::Agreement)?,
    });
    let results = serde_json::to_string_pretty(&results)? + "\n";
    replace_file(&out.join(results_file(home)), results.as_bytes())?;
    Ok(Some(values))
}

fn plan(context: &Context, model: RunModel) -> anyhow::Result<StagePlan> {
    let run = &context.run;
    let completions = context.dir.require("completions", "collect", run)?;
    let curation = context.dir.require("train", "curate", run)?;
    Ok(StagePlan {
        stage: format!("eval {model}"),
        home: test_home(model),
        outputs: vec![test_home(model), results_file(&test_home(model))],
        settings: json!({
            "chunk_rows": run.settings.train.chunk_rows,
        }),
        inputs: BTreeMap::from([
            ("completions".to_owned(), completions.content_hash()),
            ("test".to_owned(), curation.content_hash()),
            ("model".to_owned(), model_key(context, model)?),
        ])
        .into_iter()
        .chain(score::input(context)?)
        .collect(),
    })
}

/// Reads a model's published values, in the order of `test/`.
pub(crate) fn values(context: &Context, model: RunModel) -> anyhow::Result<Vec<SequenceValues>> {
    published_values(context, &test_home(model))
}

/// Reads the values that [`measure`] wrote to a folder, after its publication.
pub(super) fn published_values(
    context: &Context,
    home: &str,
) -> anyhow::Result<Vec<SequenceValues>> {
    let path = context.dir.path(home).join(SAMPLES_FILE);
    let mut values = Vec::new();
    for value in read_shard::<SequenceValues>(&path)? {
        values.push(value?);
    }
    Ok(values)
}
