//! The tables of the report.

use std::fmt::Write;

use potstill_datasets::RunModel;

use super::colour::{colour, swatch};
use super::html::{Cell, escape, table};
use crate::interval::Interval;
use crate::metric::Figure;
use crate::report::{Provenance, Report};
use crate::report_text;
use crate::results::{SeedFigures, StudentResult};
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

fn model(model: RunModel) -> Cell {
    Cell::Head(format!("{}{model}", swatch(colour(model))))
}

/// Returns a cell with a model and a description in small type.
fn model_from(model: RunModel, what: &str) -> Cell {
    Cell::Head(format!(
        "{}{model} <small>{}</small>",
        swatch(colour(model)),
        escape(what)
    ))
}

/// A column of the models' table: its heading, and the cells of the teacher and of a student.
struct Column {
    head: &'static str,
    teacher: Cell,
    student: fn(&StudentResult) -> Cell,
}

/// Writes the figures of all models; figures that no model has get no column.
pub(super) fn models(out: &mut String, report: &Report) {
    let teacher = report.teacher.as_ref();
    let by_definition = |what: &str| Cell::Figure(format!("{what} <small>by definition</small>"));
    let accuracy = teacher.and_then(|t| t.accuracy.as_ref());
    let any = |has: fn(&StudentResult) -> bool| report.students.iter().any(has);
    let mut columns = Vec::new();
    let mut column = |is_shown: bool, column: Column| columns.extend(is_shown.then_some(column));
    column(
        any(|s| s.kl.is_some()),
        Column {
            head: "KL, nats per token",
            teacher: by_definition("0"),
            student: |s| interval(Figure::Kl, s.kl.as_ref()),
        },
    );
    column(
        any(|s| s.own_text_kl.is_some()),
        Column {
            head: "own-text KL",
            teacher: by_definition("0"),
            student: |s| interval(Figure::OwnTextKl, s.own_text_kl.as_ref()),
        },
    );
    column(
        true,
        Column {
            head: "NLL, nats per token",
            teacher: teacher.map_or_else(none, |t| figure(Figure::Nll, &t.nll)),
            student: |s| figure(Figure::Nll, &s.nll),
        },
    );
    column(
        any(|s| s.agreement.is_some()),
        Column {
            head: "agreement",
            teacher: by_definition("100 %"),
            student: |s| interval(Figure::Agreement, s.agreement.as_ref()),
        },
    );
    column(
        any(|s| s.accuracy.is_some()),
        Column {
            head: "accuracy",
            teacher: share(accuracy.map(|a| &a.overall)),
            student: |s| share(s.accuracy.as_ref().map(|a| &a.overall)),
        },
    );
    let distance = |s: &StudentResult| s.calibration.as_ref()?.distance;
    column(
        report.students.iter().any(|s| distance(s).is_some()),
        Column {
            head: "|q − p|",
            teacher: by_definition("0 %"),
            student: |s| share(s.calibration.as_ref().and_then(|c| c.distance.as_ref())),
        },
    );
    column(
        any(|s| s.calibration.is_some()),
        Column {
            head: "calibration error",
            teacher: none(),
            student: |s| share(s.calibration.as_ref().map(|c| &c.error)),
        },
    );
    let mut head = vec!["model"];
    head.extend(columns.iter().map(|column| column.head));
    let student_row = |student: &StudentResult| {
        let from = format!("from {}", student.learned_from);
        let mut row = vec![model_from(student.name, &from)];
        row.extend(columns.iter().map(|column| (column.student)(student)));
        row
    };
    let students: Vec<Vec<Cell>> = report.students.iter().map(student_row).collect();
    let mut rows = Vec::new();
    if let Some(teacher) = teacher {
        let mut row = vec![model_from(RunModel::Teacher, &teacher.name)];
        row.extend(columns.into_iter().map(|column| column.teacher));
        rows.push(row);
    }
    rows.extend(students);
    table(out, "Models and their figures", "", &head, &rows);
    let sizes = report_text::sizes(report);
    if !sizes.is_empty() {
        let _ = writeln!(out, "<p class=\"note\">{}</p>", escape(&sizes));
    }
}

/// Writes accuracy by group; nothing if prompts have no groups.
pub(super) fn groups(out: &mut String, report: &Report) {
    let (names, models) = report.accuracy_by_group();
    if names.is_empty() {
        return;
    }
    out.push_str("<h3>Accuracy by group</h3>\n");
    let escaped: Vec<String> = names.iter().map(|name| escape(name)).collect();
    let mut head = vec!["model"];
    head.extend(escaped.iter().map(String::as_str));
    let mut rows = Vec::new();
    for (name, accuracies) in models {
        let mut row = vec![model(name)];
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
            model(name),
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
    out.push_str("<details><summary>All figures by seed</summary>\n<p class=\"note\">The figures above are over all seeds. The student to use is the one with the first seed, <code>students/student/export</code>.</p>\n");
    table(out, "All figures by seed", "", &head, &rows);
    out.push_str("</details>\n");
}

/// Writes the reliability table; nothing if calibration was not measured.
pub(super) fn reliability(out: &mut String, report: &Report) {
    let measured = report.students.iter();
    let rows: Vec<Vec<Cell>> = measured
        .filter_map(|student| Some((student, student.calibration.as_ref()?)))
        .flat_map(|(student, calibration)| {
            calibration.bins.iter().map(|bin| {
                vec![
                    model(student.name),
                    Cell::Figure(format!(
                        "{:.1} to {:.1} %",
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
    let head = [
        "model",
        "the model's probability",
        "tokens",
        "mean",
        match report.has_distributions() {
            true => "mean of the teacher's",
            false => "right",
        },
    ];
    table(out, "Reliability by probability", "", &head, &rows);
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
