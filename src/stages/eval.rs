//! `eval`: measures the exported students, and the student before training, on `test/`.

use std::collections::BTreeMap;
use std::path::Path;

use potstill_datasets::{RunModel, SequenceValues, Split, read_shard, replace_file, write_shard};
use potstill_eval::{Metric, TestText, interval};
use potstill_model::Decoder;
use potstill_student::{SignalKind, Unigram, evaluate};
use serde_json::json;

use super::models::{load, model_key, results_file, test_home};
use super::rows::SelectedRows;
use super::{
    Context, StageOutcome, StageSummary, answers, checkpoint, counts, for_each_model, known,
    own_text, rows, run_stage, score,
};
use crate::interrupt;
use crate::run_dir::StagePlan;

const SAMPLES_FILE: &str = "samples.parquet";

/// Measures every model of the run on the answers of test and on its own text, and lets it answer the prompts of test.
///
/// # Errors
/// When nothing was curated, or a student is not yet exported.
pub fn eval(context: &Context) -> anyhow::Result<StageOutcome> {
    type Measurement = fn(&Context, RunModel) -> anyhow::Result<StageOutcome>;
    let variants = context.variants().into_iter().map(RunModel::Trained);
    let networks: Vec<RunModel> = [RunModel::Base].into_iter().chain(variants).collect();
    let teacher = context.run.settings.local().map(|_| RunModel::Teacher);
    let with = |measurement: Measurement, extra: Option<RunModel>| {
        let models = extra.into_iter().chain(networks.clone());
        models.map(move |model| (measurement, model))
    };
    let measurements = with(eval_one, Some(RunModel::Unigram))
        .chain(with(answers::answer_one, teacher))
        .chain(with(own_text::own_text_one, None));
    for_each_model(measurements, |(measurement, model)| {
        measurement(context, model)
    })
}

/// Measures one model on test.
fn eval_one(context: &Context, model: RunModel) -> anyhow::Result<StageOutcome> {
    let (stage, home) = (format!("eval {model}"), test_home(model));
    let Some(plan) = known(context, &stage, &home, || plan(context, model))? else {
        return Ok(StageOutcome::WouldRun);
    };
    run_stage(context, &plan, |out| {
        let (stage, home) = (&plan.stage, &plan.home);
        let values = match model {
            RunModel::Unigram => measure_unigram(context, stage, out, home)?,
            _ => {
                let weights = load(context, model)?;
                measure(context, stage, &weights, Split::Test, out, home)?
            }
        };
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
    weights: &Decoder,
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
    let (kind, chunk_rows) = (signal_kind(context), file.train.chunk_rows);
    let values = evaluate(weights, &mut row, len, kind, chunk_rows, &mut on_row)?;
    if let Some(values) = &values {
        write_values(values, out, home)?;
    }
    Ok(values)
}

/// Fits the unigram to the answers in `train/` and measures it as [`measure`] does a model.
fn measure_unigram(
    context: &Context,
    stage: &str,
    out: &Path,
    home: &str,
) -> anyhow::Result<Option<Vec<SequenceValues>>> {
    let kind = signal_kind(context);
    let vocab = checkpoint::tokenizer(&checkpoint::student(&context.run)?)?.vocab_size();
    let mut train = SelectedRows::open(context, Split::Train)?;
    let mut test = SelectedRows::open(context, Split::Test)?;
    let (to_fit, to_measure) = (train.list.len(), test.list.len());
    let console = &context.console;
    let mut progress = console.progress(stage, "sequences", 0, to_measure as u64);
    let unigram = Unigram::fit(&mut |i| train.get(i), to_fit, vocab, kind)?;
    let mut on_row = |done| {
        progress.update(done as u64, 0, "");
        interrupt::control_flow()
    };
    let values = unigram.evaluate(&mut |i| test.get(i), to_measure, kind, &mut on_row)?;
    if let Some(values) = &values {
        write_values(values, out, home)?;
    }
    Ok(values)
}

/// Returns what the rows of the run hold.
fn signal_kind(context: &Context) -> SignalKind {
    match context.run.settings.has_signals() {
        true => SignalKind::Distributions,
        false => SignalKind::Text,
    }
}

/// Writes values to the folder `home` below `out`, and their figures to the file beside it.
fn write_values(values: &[SequenceValues], out: &Path, home: &str) -> anyhow::Result<()> {
    write_shard(&out.join(home).join(SAMPLES_FILE), values, &[])?;
    let figure = |metric| interval(values, metric);
    let results = json!({
        "text": TestText::from_values(values)?,
        "kl": figure(Metric::Kl)?,
        "nll": figure(Metric::Nll)?,
        "agreement": figure(Metric::Agreement)?,
    });
    let results = serde_json::to_string_pretty(&results)? + "\n";
    Ok(replace_file(
        &out.join(results_file(home)),
        results.as_bytes(),
    )?)
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
            "text": rows::text_settings(run)?,
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
    let path = context.dir.verified(home)?.join(SAMPLES_FILE);
    let mut values = Vec::new();
    for value in read_shard::<SequenceValues>(&path)? {
        values.push(value?);
    }
    Ok(values)
}
