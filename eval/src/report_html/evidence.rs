//! The differences between models and what they rest on: seeds, learning rates, splits and the sampling test.

use std::fmt::Write;

use potstill_datasets::RunModel;

use super::colour::{colour, swatch};
use super::html::{Cell, escape, table};
use crate::comparison::{Comparison, Verdict};
use crate::report::{Report, SimilarPrompts, SplitFacts};
use crate::report_text;
use crate::results::TunedRate;
use crate::sampling::{MAX_Z, SamplingCheck};
use crate::wording;

/// Writes the primary comparison, its seeds, and the other comparisons.
pub(super) fn comparisons(out: &mut String, report: &Report) {
    let primary = report.primary();
    if let Some(primary) = primary {
        out.push_str("<h3>Primary comparison</h3>\n<p class=\"note\">The finding rests on this comparison alone. It was chosen before the run, so its p-value is not corrected.</p>\n");
        comparison_table(out, "Primary comparison", &[primary]);
    }
    seeds(out, report);
    let is_main = |c: &Comparison| {
        let same_pair = primary.is_some_and(|p| (p.left, p.right) == (c.left, c.right));
        same_pair || primary.is_none_or(|p| p.metric == c.metric)
    };
    let others = report.comparisons.iter().filter(|c| !c.primary);
    let (main, rest): (Vec<&Comparison>, Vec<&Comparison>) = others.partition(|c| is_main(c));
    if !main.is_empty() {
        let _ = writeln!(
            out,
            "<h3>Other comparisons</h3>\n<p class=\"note\">Their p-values are corrected for the number of these comparisons ({}, Holm's method).</p>",
            main.len() + rest.len()
        );
        comparison_table(out, "Other comparisons", &main);
    }
    if !rest.is_empty() {
        let _ = writeln!(
            out,
            "<details><summary>{} comparisons by other figures</summary>",
            rest.len()
        );
        comparison_table(out, "Comparisons by other figures", &rest);
        out.push_str("</details>\n");
    }
}

fn comparison_table(out: &mut String, label: &str, comparisons: &[&Comparison]) {
    let head = ["left − right", "difference", "left is", "detectable"];
    let row = |c: &&Comparison| {
        let class = match c.verdict {
            Verdict::Better => "better",
            Verdict::Worse => "worse",
            Verdict::NoDifference => "same",
        };
        vec![
            Cell::Head(format!(
                "{} − {} <small>{}</small>",
                c.left,
                c.right,
                c.metric.name()
            )),
            Cell::Figure(format!(
                "{} <small>{}</small>",
                wording::signed(c.metric, c.difference.mean),
                wording::signed_range(c.metric, &c.difference)
            )),
            Cell::Figure(format!(
                "<span class=\"{class}\">{}</span> <small>{}</small>",
                wording::verdict(c.verdict),
                escape(&wording::p_value(c.adjusted_p))
            )),
            Cell::Figure(c.detectable.map_or("–".to_owned(), |smallest| {
                wording::detectable(c.metric, smallest)
            })),
        ]
    };
    let rows: Vec<Vec<Cell>> = comparisons.iter().map(row).collect();
    table(out, label, "pairs", &head, &rows);
}

/// Writes the figure of the primary comparison by seed; nothing if the models were trained with one seed.
fn seeds(out: &mut String, report: &Report) {
    let Some(seeds) = report.seed_table() else {
        return;
    };
    let _ = writeln!(
        out,
        "<h3>{} by seed</h3>\n<p class=\"note\">Models in a row have the same start and saw the same text in the same order.</p>",
        seeds.figure.name()
    );
    let mut head = vec!["seed".to_owned(), "student − sft".to_owned()];
    let name = |model: &RunModel| format!("{}{model}", swatch(colour(*model)));
    head.extend(seeds.models.iter().map(name));
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    let number = |text: Option<String>| Cell::Number(text.unwrap_or_else(|| "–".to_owned()));
    let mut rows = Vec::new();
    for seed in &seeds.rows {
        let mut row = vec![Cell::Head(seed.seed.to_string())];
        let difference = seed.difference;
        row.push(number(
            difference.map(|difference| wording::signed(seeds.figure, difference)),
        ));
        let text = |value: &Option<f64>| value.map(|value| wording::value(seeds.figure, value));
        row.extend(seed.values.iter().map(|value| number(text(value))));
        rows.push(row);
    }
    table(out, "By seed", "narrow", &head, &rows);
}

/// Writes the learning rates that were tried for each arm.
pub(super) fn tuning(out: &mut String, report: &Report) {
    let Some(tuning) = report.tuning_table() else {
        return;
    };
    let rates: Vec<String> = tuning
        .rates
        .iter()
        .map(|rate| wording::rate(*rate))
        .collect();
    let mut head = vec!["model"];
    head.extend(rates.iter().map(String::as_str));
    let cell = |trial: &Option<TunedRate>| {
        Cell::Number(match trial.map(|trial| (trial.dev, trial.chosen)) {
            None => "–".to_owned(),
            Some((None, _)) => "diverged".to_owned(),
            Some((Some(dev), true)) => format!("<strong>{dev:.4}</strong> <small>chosen</small>"),
            Some((Some(dev), false)) => format!("{dev:.4}"),
        })
    };
    let mut rows = Vec::new();
    for (arm, trials) in &tuning.rows {
        let model = RunModel::from(arm.first());
        let swatch = swatch(colour(model));
        let mut row = vec![Cell::Head(format!("{swatch}{model}"))];
        row.extend(trials.iter().map(cell));
        rows.push(row);
    }
    table(out, "Dev figures by learning rate", "narrow", &head, &rows);
}

/// Writes the figures on dev of the weights and of their running mean.
pub(super) fn means(out: &mut String, report: &Report) {
    if report.means.is_empty() {
        return;
    }
    let note = report_text::means_note(report);
    super::section(out, "means", "Running mean of the weights", &escape(&note));
    let rows = report.means.iter().map(|mean| {
        let figure = |value: f64, is_exported: bool| {
            Cell::Number(match is_exported {
                true => format!("<strong>{value:.4}</strong>"),
                false => format!("{value:.4}"),
            })
        };
        let swatch = swatch(colour(mean.name));
        vec![
            Cell::Head(format!("{swatch}{}", mean.name)),
            Cell::Number(mean.seed.to_string()),
            Cell::Number(mean.step.to_string()),
            figure(mean.trained, !mean.exports_mean),
            figure(mean.mean, mean.exports_mean),
        ]
    });
    let rows: Vec<Vec<Cell>> = rows.collect();
    let head = ["model", "seed", "step", "weights", "running mean"];
    table(out, "Dev figures of running means", "narrow", &head, &rows);
    out.push_str("</section>\n");
}

/// Writes the sizes of the splits and the near-duplicates.
pub(super) fn splits(out: &mut String, splits: &SplitFacts) {
    out.push_str("<h3>Splits</h3>\n<p class=\"note\">Prompts are split before anything is dropped. Only the answers to train on are filtered.</p>\n");
    let rows: Vec<Vec<Cell>> = (splits.sizes.iter())
        .map(|size| {
            vec![
                Cell::Head(size.split.name().to_owned()),
                Cell::Number(wording::count(size.prompts)),
                Cell::Number(wording::count(size.sequences)),
            ]
        })
        .collect();
    table(
        out,
        "Splits",
        "narrow",
        &["split", "prompts", "answers"],
        &rows,
    );
    let _ = writeln!(out, "<p>{}</p>", report_text::near_duplicates(splits));
    if splits.similar.is_empty() {
        return;
    }
    let _ = writeln!(
        out,
        "<details><summary>The first {} near-duplicates</summary>",
        splits.similar.len()
    );
    let row = |similar: &SimilarPrompts| {
        vec![
            Cell::Head(similar.split.name().to_owned()),
            Cell::Text(escape(&similar.prompt)),
            Cell::Text(escape(&similar.train_prompt)),
            Cell::Number(format!("{:.2}", similar.similarity)),
        ]
    };
    let rows: Vec<Vec<Cell>> = splits.similar.iter().map(row).collect();
    let head = ["split", "prompt", "training prompt", "similarity"];
    table(out, "Near-duplicates", "values", &head, &rows);
    out.push_str("</details>\n");
}

/// Writes the figures of the sampling test.
pub(super) fn sampling(out: &mut String, sampling: &SamplingCheck) {
    let _ = writeln!(
        out,
        "<h3>Sampling test</h3>\n<p class=\"note\">If each token was drawn from the distribution that is stored for it, the mean of NLL − entropy is 0 up to chance. z is the mean in standard errors; chance explains |z| up to {MAX_Z}.</p>"
    );
    let rows: Vec<Vec<Cell>> = report_text::sampling(sampling)
        .into_iter()
        .map(|(what, value)| vec![Cell::Head(escape(what)), Cell::Text(escape(&value))])
        .collect();
    table(out, "Sampling test", "values", &["what", "value"], &rows);
}
