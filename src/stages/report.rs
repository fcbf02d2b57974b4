//! `report`: what the run found, from manifests and results, as `report.md` and
//! `report.json`.

use std::collections::BTreeMap;

use potstill_datasets::{Manifest, replace_file};
use potstill_eval::{
    Comparison, Heldout, Metric, Provenance, Report, SequenceValues, StageFacts, StudentResult,
    compare, interval,
};
use serde_json::json;

use super::eval::{UNTRAINED, home, values};
use super::{Context, Done, Outcome, counts, export, stage};
use crate::events::Event;
use crate::run_dir::{Counts, Plan};

/// The pairs that are compared: left less right.
const PAIRS: [(&str, &str); 3] = [
    ("student", UNTRAINED),
    ("student", "sft"),
    ("sft", "shuffled"),
];

/// Writes the report, and says its verdict.
///
/// # Errors
/// When a model is not measured yet, or results do not fit together.
pub fn report(context: &Context) -> anyhow::Result<Outcome> {
    let run = &context.run;
    let names: Vec<&str> = [UNTRAINED].into_iter().chain(context.students()).collect();
    let mut inputs = BTreeMap::new();
    for (home, stage) in homes(&names) {
        let manifest = context.dir.require(&home, &stage, run)?;
        inputs.insert(home, manifest.content_hash());
    }
    let plan = Plan {
        stage: "report".to_owned(),
        home: String::new(),
        outputs: vec!["report.md".to_owned(), "report.json".to_owned()],
        settings: json!({ "name": run.file.run.name.as_str(), "students": names }),
        inputs,
    };
    let mut verdict = Vec::new();
    let outcome = stage(context, &plan, |out| {
        let report = build(context, &names)?;
        replace_file(&out.join("report.md"), report.to_markdown().as_bytes())?;
        replace_file(&out.join("report.json"), report.to_json().as_bytes())?;
        let counts = counts([
            ("models", report.students.len()),
            ("comparisons", report.comparisons.len()),
        ]);
        verdict = report.verdict;
        Ok(Some(Done::new(counts)))
    })?;
    for text in verdict {
        context.talk.say(&Event::Verdict { text });
    }
    if outcome == Outcome::Done {
        let path = context.dir.path("report.md");
        context.talk.line(&format!("report: {}", path.display()));
    }
    Ok(outcome)
}

/// Every published folder of a run with these models, and the stage that writes it.
fn homes(names: &[&str]) -> Vec<(String, String)> {
    let mut homes: Vec<(String, String)> = [
        ("prompts", "import"),
        ("completions", "collect"),
        ("train", "curate"),
    ]
    .map(|(home, stage)| (home.to_owned(), stage.to_owned()))
    .to_vec();
    for name in names.iter().filter(|name| **name != UNTRAINED) {
        homes.push((format!("students/{name}"), "train".to_owned()));
        homes.push((format!("students/{name}/export"), "export".to_owned()));
    }
    homes.extend(names.iter().map(|name| (home(name), "eval".to_owned())));
    homes
}

fn build(context: &Context, names: &[&str]) -> anyhow::Result<Report> {
    let resamples = context.run.file.eval.resamples.get();
    let seed = u64::from(context.run.file.run.seed);
    let mut measured: Vec<(&str, Vec<SequenceValues>)> = Vec::new();
    for name in names {
        measured.push((name, values(context, name)?));
    }
    let mut students = Vec::new();
    for (name, values) in &measured {
        let trained = Manifest::read(&context.dir.path(&format!("students/{name}")))?;
        let figure = |metric| interval(values, metric, resamples, seed);
        students.push(StudentResult {
            name: (*name).to_owned(),
            learned_from: export::learned_from(name).to_owned(),
            steps: trained
                .and_then(|m| m.counts.get("steps").copied())
                .unwrap_or_default(),
            kl: figure(Metric::Kl)?,
            nll: figure(Metric::Nll)?,
            agreement: figure(Metric::Agreement)?,
        });
    }
    let of = |name: &str| {
        measured
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(n, v)| (*n, v.as_slice()))
    };
    let mut comparisons: Vec<Comparison> = Vec::new();
    for (left, right) in PAIRS {
        if let (Some(left), Some(right)) = (of(left), of(right)) {
            comparisons.extend(compare(left, right, resamples, seed)?);
        }
    }
    Ok(Report {
        run: context.run.file.run.name.as_str().to_owned(),
        potstill: env!("CARGO_PKG_VERSION").to_owned(),
        verdict: Report::conclude(&students, &comparisons),
        heldout: Heldout::from_values(measured.first().map_or(&[], |(_, v)| v.as_slice()))?,
        students,
        comparisons,
        stages: stages(context, names)?,
        provenance: provenance(context)?,
        reproduce: vec![format!("potstill run {}", context.run.path.display())],
    })
}

fn stages(context: &Context, names: &[&str]) -> anyhow::Result<Vec<StageFacts>> {
    let ledger = context.dir.ledger()?;
    let mut facts = Vec::new();
    for (home, _) in homes(names) {
        let Some(Manifest {
            stage,
            counts,
            files,
            ..
        }) = Manifest::read(&context.dir.path(&home))?
        else {
            continue;
        };
        let lines = ledger.iter().filter(|line| line.stage == stage);
        facts.push(StageFacts {
            seconds: lines.map(|line| line.seconds).sum(),
            bytes: files.values().map(|f| f.bytes).sum(),
            counts: listed(counts),
            name: stage,
        });
    }
    Ok(facts)
}

fn listed(counts: Counts) -> Vec<(String, u64)> {
    counts.into_iter().collect()
}

fn provenance(context: &Context) -> anyhow::Result<Vec<Provenance>> {
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
