//! `eval`: measures the exported students, and the student before training, on `heldout/`.

use std::collections::BTreeMap;

use potstill_datasets::{CONFIDENCE_BINS, SequenceValues, read_shard, replace_file, write_shard};
use potstill_eval::{Heldout, Metric, interval};
use potstill_model::{DType, Llama};
use serde_json::json;

use super::rows::Rows;
use super::{Context, Done, Outcome, answers, counts, each, score, stage, train};
use crate::interrupt;
use crate::run_dir::Plan;

/// Name of the student before training.
pub(crate) const UNTRAINED: &str = "untrained";
const SAMPLES_FILE: &str = "samples.parquet";

/// Measures every model of the run on the held-out answers.
///
/// # Errors
/// When nothing was curated, or a student is not yet exported.
pub fn eval(context: &Context) -> anyhow::Result<Outcome> {
    let mut names = vec![UNTRAINED.to_owned()];
    names.extend(context.trained());
    let measured = each(&names, |name| eval_one(context, name))?;
    if matches!(measured, Outcome::Stopped | Outcome::WouldRun) {
        return Ok(measured);
    }
    if context.run.file.local().is_some() {
        names.insert(0, answers::TEACHER.to_owned());
    }
    let answered = each(&names, |name| answers::answer_one(context, name))?;
    Ok(match answered {
        Outcome::UpToDate => measured,
        _ => answered,
    })
}

/// Computes the hash that identifies a measured model.
pub(super) fn model_key(context: &Context, name: &str) -> anyhow::Result<String> {
    let run = &context.run;
    match name {
        UNTRAINED => train::start_key(run, name),
        _ => Ok(context
            .dir
            .require(&export_home(name), "export", run)?
            .content_hash()),
    }
}

/// Loads an exported student.
pub(super) fn load_export(context: &Context, name: &str) -> anyhow::Result<Llama> {
    let folder = context.dir.path(&export_home(name));
    Ok(potstill_model::load(&folder, DType::F32, &context.device)?)
}

fn export_home(name: &str) -> String {
    format!("students/{name}/export")
}

/// Folder of a model's figures, in the run directory.
pub(crate) fn home(name: &str) -> String {
    format!("students/{name}/eval/heldout")
}

/// File of the figures as JSON, beside the table and not in its folder, so that other tools can read the folder.
fn results_file(name: &str) -> String {
    format!("{}_results.json", home(name))
}

fn eval_one(context: &Context, name: &str) -> anyhow::Result<Outcome> {
    let run = &context.run;
    let completions = context.dir.require("completions", "collect", run)?;
    let curation = context.dir.require("train", "curate", run)?;
    let model = model_key(context, name)?;
    let resamples = run.file.eval.resamples.get();
    let chunk_rows = run.file.train.chunk_rows.get();
    let seed = u64::from(run.file.run.seed);
    let plan = Plan {
        stage: format!("eval {name}"),
        home: home(name),
        outputs: vec![home(name), results_file(name)],
        settings: json!({
            "chunk_rows": chunk_rows,
            "confidence_bins": CONFIDENCE_BINS,
            "resamples": resamples,
            "seed": seed,
        }),
        inputs: BTreeMap::from([
            ("completions".to_owned(), completions.content_hash()),
            ("heldout".to_owned(), curation.content_hash()),
            ("model".to_owned(), model),
        ])
        .into_iter()
        .chain(score::input(context)?)
        .collect(),
    };
    stage(context, &plan, |out| {
        let model: Llama = match name {
            UNTRAINED => train::start(context, name)?,
            _ => load_export(context, name)?,
        };
        let mut rows = Rows::open(context, "heldout")?;
        let len = rows.list.len();
        let mut work = context.talk.work(&plan.stage, "sequences", 0, len as u64);
        let mut on_row = |done| {
            work.show(done as u64, 0, "");
            interrupt::flow()
        };
        let values =
            potstill_student::evaluate(&model, &mut |i| rows.get(i), len, chunk_rows, &mut on_row)?;
        let Some(values) = values else {
            return Ok(None);
        };
        write_shard(&out.join(home(name)).join(SAMPLES_FILE), &values, &[])?;
        let figure = |metric| interval(&values, metric, resamples, seed);
        let results = json!({
            "heldout": Heldout::from_values(&values)?,
            "kl": figure(Metric::Kl)?,
            "nll": figure(Metric::Nll)?,
            "agreement": figure(Metric::Agreement)?,
        });
        let results = serde_json::to_string_pretty(&results)? + "\n";
        replace_file(&out.join(results_file(name)), results.as_bytes())?;
        let tokens = values.iter().map(|v| v.tokens as usize).sum();
        Ok(Some(Done::new(counts([
            ("sequences", len),
            ("tokens", tokens),
        ]))))
    })
}

/// Reads a model's published values, in the order of `heldout/`.
pub(crate) fn values(context: &Context, name: &str) -> anyhow::Result<Vec<SequenceValues>> {
    let path = context.dir.path(&home(name)).join(SAMPLES_FILE);
    let mut values = Vec::new();
    for value in read_shard::<SequenceValues>(&path)? {
        values.push(value?);
    }
    Ok(values)
}
