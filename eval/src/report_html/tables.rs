//! The tables of the report.

use std::fmt::Write;

use potstill_datasets::RunModel;

use super::colour::{colour, swatch};
use super::html::{Cell, escape, table};
use crate::comparison::{Comparison, Verdict};
use crate::interval::Interval;
use crate::metric::Figure;
use crate::report::{Provenance, Report};
use crate::results::SeedFigures;
use crate::wording;

/// Returns a cell with a figure and its interval in small type.
fn figure(figure: Figure, interval: &Interval) -> Cell {
    Cell::Figure(format!(
        "{} <small>{}</small>",
        wording::value(figure, interval.mean),
        wording::range(figure, interval)
    ))
}

fn interval(kind: Figure, interval: Option<&Interval>) -> Cell {
    interval.map_or_else(none, |interval| figure(kind, interval))
}

fn share(share: Option<&Interval>) -> Cell {
    interval(Figure::Accuracy, share)
}

fn none() -> Cell {
    Cell::Figure("–".to_owned())
}

fn model(report: &Report, model: RunModel) -> Cell {
    Cell::Head(format!("{}{model}", swatch(colour(report, model))))
}

/// Returns a cell with a model and a description in small type.
fn model_from(report: &Report, model: RunModel, what: &str) -> Cell {
    Cell::Head(format!(
        "{}{model} <small>{}</small>",
        swatch(colour(report, model)),
        escape(what)
    ))
}

pub(super) fn models(out: &mut String, report: &Report) {
    let head = [
        "model",
        "KL, nats per token",
        "agreement",
        "accuracy",
        "calibration error",
        "NLL, nats per token",
        "parameters",
        "steps",
    ];
    let count = |count: Option<u64>| Cell::Number(count.map_or("–".to_owned(), wording::count));
    let by_definition = |what: &str| Cell::Figure(format!("{what} <small>by definition</small>"));
    let mut rows = Vec::new();
    if let Some(teacher) = &report.teacher {
        rows.push(vec![
            model_from(report, RunModel::Teacher, &teacher.name),
            by_definition("0"),
            by_definition("100 %"),
            share(teacher.accuracy.as_ref().map(|a| &a.overall)),
            none(),
            figure(Figure::Nll, &teacher.nll),
            count(teacher.parameters),
            count(None),
        ]);
    }
    for student in &report.students {
        let from = format!("from {}", student.learned_from);
        rows.push(vec![
            model_from(report, student.name, &from),
            interval(Figure::Kl, student.kl.as_ref()),
            interval(Figure::Agreement, student.agreement.as_ref()),
            share(student.accuracy.as_ref().map(|a| &a.overall)),
            share(student.calibration.as_ref().map(|c| &c.error)),
            figure(Figure::Nll, &student.nll),
            count(student.parameters),
            count(Some(student.steps)),
        ]);
    }
    table(out, "Models and their held-out figures", "", &head, &rows);
}

/// Writes accuracy by group; nothing if prompts have no groups.
pub(super) fn groups(out: &mut String, report: &Report) {
    let (names, models) = report.accuracy_by_group();
    if names.is_empty() {
        return;
    }
    out.push_str("<h3 style=\"margin-top:28px\">Accuracy by group</h3>\n");
    let escaped: Vec<String> = names.iter().map(|name| escape(name)).collect();
    let mut head = vec!["model"];
    head.extend(escaped.iter().map(String::as_str));
    let mut rows = Vec::new();
    for (name, accuracies) in models {
        let mut row = vec![model(report, name)];
        row.extend(accuracies.into_iter().map(share));
        rows.push(row);
    }
    table(out, "Accuracy by group", "", &head, &rows);
}

/// Writes the figures of each seed; nothing if all models had one seed.
pub(super) fn seeds(out: &mut String, report: &Report) {
    let head = [
        "model",
        "seed",
        "KL, nats per token",
        "agreement",
        "accuracy",
        "NLL, nats per token",
    ];
    let number = |figure: Figure, value: Option<f64>| {
        let text = value.map_or("–".to_owned(), |value| wording::value(figure, value));
        Cell::Number(text)
    };
    let row = |(name, figures): (RunModel, &SeedFigures)| {
        vec![
            model(report, name),
            Cell::Number(figures.seed.to_string()),
            number(Figure::Kl, figures.kl),
            number(Figure::Agreement, figures.agreement),
            number(Figure::Accuracy, figures.accuracy),
            number(Figure::Nll, Some(figures.nll)),
        ]
    };
    let rows: Vec<Vec<Cell>> = report.by_seed().into_iter().map(row).collect();
    if rows.is_empty() {
        return;
    }
    out.push_str("<h3 style=\"margin-top:28px\">By seed</h3>\n<p class=\"note\">The figures above are over all seeds. The student to use is the one with the first seed, <code>students/student/export</code>.</p>\n");
    table(out, "By seed", "", &head, &rows);
}

pub(super) fn comparisons(out: &mut String, report: &Report) {
    let head = ["left − right", "figure", "difference", "left is", "prompts"];
    let row = |c: &Comparison| {
        let class = match c.verdict {
            Verdict::Better => "better",
            Verdict::Worse => "worse",
            Verdict::NoDifference => "same",
        };
        vec![
            Cell::Head(format!("{} − {}", c.left, c.right)),
            Cell::Figure(c.metric.name().to_owned()),
            Cell::Figure(wording::difference(c.metric, &c.difference)),
            Cell::Figure(format!(
                "<span class=\"{class}\">{}</span>",
                wording::verdict(c.verdict)
            )),
            Cell::Number(wording::count(c.difference.prompts as u64)),
        ]
    };
    let rows: Vec<Vec<Cell>> = report.comparisons.iter().map(row).collect();
    table(out, "Paired differences", "", &head, &rows);
}

/// Writes the reliability table; nothing if calibration was not measured.
pub(super) fn reliability(out: &mut String, report: &Report) {
    let measured = report.students.iter();
    let rows: Vec<Vec<Cell>> = measured
        .filter_map(|student| Some((student, student.calibration.as_ref()?)))
        .flat_map(|(student, calibration)| {
            calibration.bins.iter().map(|bin| {
                vec![
                    model(report, student.name),
                    Cell::Figure(format!(
                        "{:.0} to {:.0} %",
                        100.0 * bin.from,
                        100.0 * bin.to
                    )),
                    Cell::Number(wording::count(bin.tokens)),
                    Cell::Number(wording::value(Figure::Accuracy, bin.confidence)),
                    Cell::Number(wording::value(Figure::Accuracy, bin.expected)),
                ]
            })
        })
        .collect();
    if rows.is_empty() {
        return;
    }
    out.push_str("<details><summary>Reliability table</summary>\n");
    let head = ["model", "confidence", "tokens", "mean confidence", "right"];
    table(out, "Reliability by confidence", "", &head, &rows);
    out.push_str("</details>\n");
}

pub(super) fn stages(out: &mut String, report: &Report) {
    let total: f64 = report.stages.iter().map(|stage| stage.seconds).sum();
    let tokens: Vec<u64> = report.stages.iter().filter_map(|s| s.tokens).collect();
    let dash = || "–".to_owned();
    let mut rows = Vec::new();
    for stage in &report.stages {
        let mut counts = String::new();
        for (name, count) in &stage.counts {
            let comma = if counts.is_empty() { "" } else { ", " };
            let _ = write!(counts, "{comma}{} {}", escape(name), wording::count(*count));
        }
        let percent = 100.0 * stage.seconds / total.max(f64::MIN_POSITIVE);
        rows.push(vec![
            Cell::Head(escape(&stage.name)),
            Cell::Number(format!(
                "{}<span class=\"share\" style=\"width:{percent:.1}%\"></span>",
                wording::duration(stage.seconds)
            )),
            Cell::Number(stage.tokens.map_or_else(dash, wording::count)),
            Cell::Number(wording::bytes(stage.bytes)),
            Cell::Text(counts),
        ]);
    }
    rows.push(vec![
        Cell::Head("all".to_owned()),
        Cell::Number(wording::duration(total)),
        Cell::Number(match tokens.is_empty() {
            true => dash(),
            false => wording::count(tokens.iter().sum()),
        }),
        Cell::Number(wording::bytes(report.stages.iter().map(|s| s.bytes).sum())),
        Cell::Text(String::new()),
    ]);
    let head = ["stage", "time", "tokens", "bytes published", "counts"];
    table(out, "Time, tokens and bytes by stage", "", &head, &rows);
}

pub(super) fn provenance(out: &mut String, report: &Report) {
    let row = |entry: &Provenance| {
        vec![
            Cell::Head(escape(&entry.what)),
            Cell::Text(format!("<code>{}</code>", escape(&entry.value))),
        ]
    };
    let rows: Vec<Vec<Cell>> = report.provenance.iter().map(row).collect();
    table(out, "Provenance", "values", &["what", "value"], &rows);
}
