//! `report`: combines manifests and results into `report.html`, `report.md` and `report.json`.

mod cost;
mod means;
mod measured;
mod sampling;
mod splits;

use std::collections::BTreeMap;

use potstill_datasets::{Manifest, RunModel, read_checked_lines, replace_file};
use potstill_eval::{
    Evidence, LossCurve, LossPoint, Provenance, Report, SamplingCheck, StageFacts, TestText,
    conclude, covered_seconds,
};
use serde_json::json;

use super::models::{answers_home, export_home, own_text_home, test_home};
use super::{Context, StageOutcome, StageSummary, counts, export, known, run_stage, tune};
use crate::events::Event;
use crate::run_dir::{Counts, StagePlan};

/// Files that the stage writes; the page for people comes first.
const FILES: [&str; 3] = ["report.html", "report.md", "report.json"];

/// Writes the report and prints its conclusion.
///
/// # Errors
/// When a model is not yet measured, or the results do not belong together.
pub fn report(context: &Context) -> anyhow::Result<StageOutcome> {
    let arms = context.arms();
    let models: Vec<RunModel> = ([RunModel::Base, RunModel::Unigram].into_iter())
        .chain(arms.iter().map(|arm| arm.first().into()))
        .collect();
    let Some(plan) = known(context, "report", "", || plan(context, &models))? else {
        return Ok(StageOutcome::WouldRun);
    };
    let mut conclusion = Vec::new();
    let outcome = run_stage(context, &plan, |out| {
        let report = build(context, &models)?;
        replace_file(&out.join("report.html"), report.to_html()?.as_bytes())?;
        replace_file(&out.join("report.md"), report.to_markdown().as_bytes())?;
        replace_file(&out.join("report.json"), report.to_json().as_bytes())?;
        let counts = counts([
            ("models", report.students.len()),
            ("comparisons", report.comparisons.len()),
        ]);
        conclusion.push(report.conclusion.headline);
        conclusion.extend(report.conclusion.sentences);
        conclusion.extend(report.conclusion.doubts);
        Ok(Some(StageSummary::new(counts)))
    })?;
    for text in conclusion {
        context.console.emit(&Event::Verdict { text });
    }
    if outcome == StageOutcome::Done {
        let path = context.dir.path(FILES[0]);
        context.console.note(&format!("report: {}", path.display()));
    }
    Ok(outcome)
}

fn plan(context: &Context, models: &[RunModel]) -> anyhow::Result<StagePlan> {
    let run = &context.run;
    let mut inputs = BTreeMap::new();
    for (home, stage) in homes(context)? {
        let manifest = context.dir.require(&home, &stage, run)?;
        inputs.insert(home, manifest.content_hash());
    }
    Ok(StagePlan {
        stage: "report".to_owned(),
        home: String::new(),
        outputs: FILES.map(str::to_owned).to_vec(),
        settings: json!({
            "name": run.settings.run.name.as_str(),
            "students": models,
            "resamples": run.settings.eval.resamples,
            "seed": run.settings.run.seed,
        }),
        inputs,
    })
}

/// Opens the report in the browser. On a machine without a browser this prints the path instead of
/// failing, since the report is written all the same.
///
/// # Errors
/// When the page is not the one that the stage wrote.
pub fn open(context: &Context) -> anyhow::Result<()> {
    let path = context.dir.verified(FILES[0])?;
    if let Err(error) = open::that_detached(&path) {
        let path = path.display();
        context.console.note(&format!(
            "cannot start a browser ({error})\nhint: open {path} in a browser"
        ));
    }
    Ok(())
}

/// Lists each published folder of a run with the stage that writes it.
pub(super) fn homes(context: &Context) -> anyhow::Result<Vec<(String, String)>> {
    let file = &context.run.settings;
    let mut homes = vec![("prompts", "import"), ("completions", "collect")];
    if file.score.is_some() {
        homes.push(("signals", "score"));
    }
    if file.grade.is_some() {
        homes.push(("verdicts", "grade"));
    }
    homes.push(("train", "curate"));
    let mut homes: Vec<(String, String)> = homes
        .into_iter()
        .map(|(home, stage)| (home.to_owned(), stage.to_owned()))
        .collect();
    for home in tune::homes(context)? {
        homes.push((home, "tune".to_owned()));
    }
    let mut models = vec![RunModel::Base];
    for variant in context.variants() {
        homes.push((format!("students/{variant}"), "train".to_owned()));
        homes.push((export_home(variant), "export".to_owned()));
        models.push(variant.into());
    }
    let on_test = models.iter().copied().chain([RunModel::Unigram]);
    homes.extend(on_test.map(|model| (test_home(model), "eval".to_owned())));
    if file.eval.own_text.is_some() {
        let models = models.iter();
        homes.extend(models.map(|model| (own_text_home(*model), "eval".to_owned())));
    }
    if file.eval.answers.is_some() {
        let teacher = file.local().map(|_| RunModel::Teacher);
        let models = teacher.into_iter().chain(models);
        homes.extend(models.map(|model| (answers_home(model), "eval".to_owned())));
    }
    Ok(homes)
}

fn build(context: &Context, models: &[RunModel]) -> anyhow::Result<Report> {
    let measured = measured::Measured::read(context, models)?;
    let teacher = measured.teacher(context)?;
    let students = measured.students(context)?;
    let comparisons = measured.measurements.comparisons()?;
    let sampling = sampling::for_report(context)?;
    let provenance = provenance(context, sampling.as_ref())?;
    let (stages, seconds) = stages(context)?;
    let tuning = tune::tuned_rates(context)?;
    Ok(Report {
        run: context.run.settings.run.name.as_str().to_owned(),
        potstill: env!("CARGO_PKG_VERSION").to_owned(),
        conclusion: conclude(&Evidence {
            teacher: teacher.as_ref(),
            tuning: &tuning,
            sampling: sampling.as_ref(),
            ..Evidence::of(&students, &comparisons)
        }),
        test: TestText::from_values(measured.measurements.test_values())?,
        grader: context.run.settings.eval.answers.as_ref().map(|a| a.grader),
        teacher,
        students,
        comparisons,
        splits: Some(splits::splits(context)?),
        sampling,
        tuning,
        means: means::means(context)?,
        losses: losses(context, models)?,
        samples: measured.samples(context)?,
        stages,
        seconds,
        cost: cost::facts(context)?,
        provenance,
        reproduce: vec![format!("potstill run {}", context.run.path.display())],
    })
}

/// Reads the loss curves from the metrics of each training step.
fn losses(context: &Context, models: &[RunModel]) -> anyhow::Result<Vec<LossCurve>> {
    let mut curves = Vec::new();
    let is_trained = |model: &&RunModel| matches!(model, RunModel::Trained(_));
    for model in models.iter().filter(is_trained) {
        let path = context.dir.path(&format!("students/{model}/metrics.jsonl"));
        let mut points = Vec::new();
        let hint =
            "restore the file from a copy, or move the folder that it is in away and train again";
        read_checked_lines(&path, hint, &mut |point: LossPoint| points.push(point))?;
        curves.push(LossCurve {
            name: *model,
            points,
        });
    }
    Ok(curves)
}

/// Collects counts, sizes and times of each stage, and the total time in seconds.
fn stages(context: &Context) -> anyhow::Result<(Vec<StageFacts>, f64)> {
    let ledger = context.dir.ledger()?;
    let mut facts = Vec::new();
    let mut spans = Vec::new();
    for (home, _) in homes(context)? {
        let Some(Manifest {
            stage,
            counts,
            files,
            ..
        }) = Manifest::read(&context.dir.path(&home))?
        else {
            continue;
        };
        let lines = || ledger.iter().filter(|line| line.stage == stage);
        spans.extend(lines().map(|line| (line.started_unix_seconds as f64, line.seconds)));
        facts.push(StageFacts {
            // The sum of no numbers is −0.0, which would be shown with its sign.
            seconds: lines().fold(0.0, |sum, line| sum + line.seconds),
            bytes: files.values().map(|f| f.bytes).sum(),
            tokens: ["tokens", "answer tokens"]
                .iter()
                .find_map(|name| counts.get(*name).copied()),
            counts: listed(counts),
            name: stage,
        });
    }
    Ok((facts, covered_seconds(spans)))
}

fn listed(counts: Counts) -> Vec<(String, u64)> {
    counts.into_iter().collect()
}

fn provenance(
    context: &Context,
    sampling: Option<&SamplingCheck>,
) -> anyhow::Result<Vec<Provenance>> {
    let mut lines = Vec::new();
    let mut line = |what: &str, value: String| {
        lines.push(Provenance {
            what: what.to_owned(),
            value,
        });
    };
    for teacher in export::provenance(context)? {
        line("teacher", teacher.teacher);
        line("revision", teacher.revision);
        line("engine", teacher.engine);
        line("dtype", teacher.dtype);
        line("tokenizer", teacher.tokenizer);
        line("template", teacher.template);
        line("sampling", teacher.sampling);
        if let Some(licence) = teacher.licence {
            line("licence", licence);
        }
    }
    if let Some(sampling) = sampling {
        line("sampling test", sampling.summary());
    }
    for (home, what) in [
        ("prompts", "prompts"),
        ("completions", "answers"),
        ("train", "split"),
    ] {
        if let Some(manifest) = Manifest::read(&context.dir.path(home))? {
            line(what, format!("sha256 {}", manifest.content_hash()));
        }
    }
    Ok(lines)
}
