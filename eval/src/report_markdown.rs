//! The report as Markdown: the conclusion first, then the evidence.

use std::fmt::Write;

use crate::accuracy::Accuracy;
use crate::calibration::Calibration;
use crate::comparison::{Comparison, MIN_PROMPTS};
use crate::interval::Interval;
use crate::metric::Figure;
use crate::report::{Report, Sample};
use crate::wording;

/// Number of samples shown; all are in `report.html` and `report.json`.
const SAMPLES: usize = 5;

impl Report {
    /// Writes the report as Markdown.
    pub fn to_markdown(&self) -> String {
        write(self)
    }
}

fn write(report: &Report) -> String {
    let mut out = format!("# {}\n\n**{}**\n\n", report.run, report.conclusion.headline);
    for sentence in &report.conclusion.sentences {
        line(&mut out, &format!("- {sentence}"));
    }
    for doubt in &report.conclusion.doubts {
        line(&mut out, &format!("- **Doubt about this run:** {doubt}"));
    }
    models(&mut out, report);
    groups(&mut out, report);
    seeds(&mut out, report);
    comparisons(&mut out, &report.comparisons);
    losses(&mut out, report);
    samples(&mut out, &report.samples);
    stages(&mut out, report);
    out.push_str("\n## Provenance\n\n| what | value |\n|---|---|\n");
    for entry in &report.provenance {
        line(
            &mut out,
            &format!("| {} | {} |", cell(&entry.what), cell(&entry.value)),
        );
    }
    out.push_str("\n## How to reproduce\n\n```sh\n");
    for command in &report.reproduce {
        line(&mut out, command);
    }
    line(&mut out, "```");
    let _ = write!(out, "\nWritten by Potstill {}.\n", report.potstill);
    out
}

fn models(out: &mut String, report: &Report) {
    let heldout = &report.heldout;
    let _ = write!(
        out,
        "\n## Held-out figures\n\nMeasured on {} sequences of {} prompts, {} tokens. In brackets are 95 % intervals from a bootstrap over prompts. {} ECE is the expected calibration error.{}\n\n",
        heldout.sequences,
        heldout.prompts,
        heldout.tokens,
        match report.has_distributions() {
            true => format!(
                "KL is the forward KL from the teacher to the model, on the stored support and one bucket for all other tokens; the teacher's own NLL is {:.4} nats per token.",
                heldout.teacher_nll
            ),
            false => "The teacher's distributions are not stored, so there is no KL.".to_owned(),
        },
        report.grader.map_or(String::new(), |grader| format!(
            " An answer is right if {}.",
            grader.rule()
        )),
    );
    out.push_str("| model | learned from | parameters | steps | KL (nats per token) | NLL (nats per token) | top-1 agreement | accuracy | ECE |\n|---|---|---:|---:|---|---|---|---|---|\n");
    let parameters = |count: Option<u64>| count.map_or("–".to_owned(), wording::count);
    if let Some(teacher) = &report.teacher {
        line(
            out,
            &format!(
                "| teacher | is {} | {} | – | 0 by definition | {} | 100 % by definition | {} | – |",
                cell(&teacher.name),
                parameters(teacher.parameters),
                wording::with_interval(Figure::Nll, &teacher.nll),
                accuracy(teacher.accuracy.as_ref()),
            ),
        );
    }
    for student in &report.students {
        line(
            out,
            &format!(
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                student.name,
                cell(&student.learned_from),
                parameters(student.parameters),
                student.steps,
                interval(Figure::Kl, student.kl.as_ref()),
                wording::with_interval(Figure::Nll, &student.nll),
                interval(Figure::Agreement, student.agreement.as_ref()),
                accuracy(student.accuracy.as_ref()),
                calibration(student.calibration.as_ref()),
            ),
        );
    }
}

fn interval(figure: Figure, interval: Option<&Interval>) -> String {
    interval.map_or("–".to_owned(), |i| wording::with_interval(figure, i))
}

fn value(figure: Figure, value: Option<f64>) -> String {
    value.map_or("–".to_owned(), |value| wording::value(figure, value))
}

fn accuracy(accuracy: Option<&Accuracy>) -> String {
    interval(Figure::Accuracy, accuracy.map(|a| &a.overall))
}

fn calibration(calibration: Option<&Calibration>) -> String {
    // The calibration error is a share and has the format of accuracy.
    interval(Figure::Accuracy, calibration.map(|c| &c.error))
}

fn groups(out: &mut String, report: &Report) {
    let (names, rows) = report.accuracy_by_group();
    if names.is_empty() {
        return;
    }
    out.push_str("\n## Accuracy by group\n\n| model |");
    for name in &names {
        let _ = write!(out, " {} |", cell(name));
    }
    line(out, &format!("\n|---|{}", "---|".repeat(names.len())));
    for (model, accuracies) in rows {
        let _ = write!(out, "| {} |", model);
        for accuracy in accuracies {
            let _ = write!(out, " {} |", interval(Figure::Accuracy, accuracy));
        }
        out.push('\n');
    }
}

fn seeds(out: &mut String, report: &Report) {
    let rows = report.by_seed();
    if rows.is_empty() {
        return;
    }
    out.push_str("\n## By seed\n\nThe figures above are over all seeds. The student to use is the one with the first seed, `students/student/export`.\n\n| model | seed | KL (nats per token) | NLL (nats per token) | top-1 agreement | accuracy |\n|---|---:|---|---|---|---|\n");
    for (model, figures) in rows {
        line(
            out,
            &format!(
                "| {} | {} | {} | {} | {} | {} |",
                model,
                figures.seed,
                value(Figure::Kl, figures.kl),
                wording::value(Figure::Nll, figures.nll),
                value(Figure::Agreement, figures.agreement),
                value(Figure::Accuracy, figures.accuracy),
            ),
        );
    }
}

fn comparisons(out: &mut String, comparisons: &[Comparison]) {
    if comparisons.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "\n## Paired differences\n\nEach difference is left − right over the same prompts. \"Better\" and \"worse\" are verdicts on the left model; they need an interval that excludes zero, over at least {MIN_PROMPTS} prompts.\n\n| comparison | metric | difference | verdict |\n|---|---|---|---|\n"
    );
    for comparison in comparisons {
        line(
            out,
            &format!(
                "| {} − {} | {} | {} | {} |",
                comparison.left,
                comparison.right,
                comparison.metric.name(),
                wording::difference(comparison.metric, &comparison.difference),
                wording::verdict(comparison.verdict),
            ),
        );
    }
}

fn losses(out: &mut String, report: &Report) {
    let losses = &report.losses;
    if losses.iter().all(|curve| curve.points.is_empty()) {
        return;
    }
    let kl = match report.has_distributions() {
        true => {
            " Forward KL is to the distributions that the model was trained on, which are the shuffled ones for `shuffled`."
        }
        false => "",
    };
    let _ = write!(
        out,
        "\n## Training\n\nLosses of the first and the last step, as means over the loss positions of the step.{kl} All steps are in `report.json`.\n\n"
    );
    out.push_str(
        "| student | step | loss | forward KL | cross-entropy |\n|---|---:|---:|---:|---:|\n",
    );
    for curve in losses {
        let ends = [curve.points.first(), curve.points.last()];
        for point in ends.into_iter().flatten() {
            line(
                out,
                &format!(
                    "| {} | {} | {:.4} | {} | {:.4} |",
                    curve.name,
                    point.step,
                    point.loss,
                    value(Figure::Kl, (!kl.is_empty()).then_some(point.forward_kl)),
                    point.cross_entropy
                ),
            );
        }
    }
}

fn samples(out: &mut String, samples: &[Sample]) {
    if samples.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "\n## Samples\n\nThe first {} of {} samples; all are in `report.html` and `report.json`.\n",
        SAMPLES.min(samples.len()),
        samples.len()
    );
    for sample in samples.iter().take(SAMPLES) {
        line(out, &format!("\n**{}**\n", cell(&sample.prompt)));
        if let Some(reference) = &sample.reference {
            line(out, &format!("Reference: {}\n", cell(reference)));
        }
        out.push_str("| model | answer | |\n|---|---|---|\n");
        for answer in &sample.answers {
            line(
                out,
                &format!(
                    "| {} | {} | {} |",
                    answer.model,
                    cell(&answer.answer),
                    wording::graded(answer.correct)
                ),
            );
        }
    }
}

fn stages(out: &mut String, report: &Report) {
    let _ = write!(
        out,
        "\n## Stages\n\n{} of wall-clock time in total; models may be trained at the same time.\n\n",
        wording::duration(report.seconds)
    );
    out.push_str(
        "| stage | counts | tokens | time | bytes published |\n|---|---|---:|---:|---:|\n",
    );
    for stage in &report.stages {
        let counts: Vec<String> = stage
            .counts
            .iter()
            .map(|(name, count)| format!("{} {}", cell(name), wording::count(*count)))
            .collect();
        line(
            out,
            &format!(
                "| {} | {} | {} | {} | {} |",
                cell(&stage.name),
                counts.join(", "),
                stage.tokens.map_or("–".to_owned(), wording::count),
                wording::duration(stage.seconds),
                wording::bytes(stage.bytes)
            ),
        );
    }
}

/// Escapes text in a table cell: bars and line breaks, which would end the cell, and tags.
fn cell(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

fn line(out: &mut String, text: &str) {
    out.push_str(text);
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use potstill_datasets::RunModel;

    use super::*;
    use crate::example::{report, students_only};

    #[test]
    fn a_complete_run() {
        let report = report();
        insta::assert_snapshot!(report.to_markdown());
        let back: Report = serde_json::from_str(&report.to_json()).unwrap();
        assert_eq!(back.conclusion, report.conclusion);
        assert_eq!(back.stages, report.stages);
        assert_eq!(back.samples, report.samples);
        // Floats may change in their last digit when they are read back.
        let losses = |report: &Report| -> Vec<f64> {
            let points = report.losses.iter().flat_map(|curve| &curve.points);
            points.map(|p| p.cross_entropy).collect()
        };
        let (back_losses, losses) = (losses(&back), losses(&report));
        assert_eq!(back_losses.len(), losses.len());
        assert!(
            back_losses
                .iter()
                .zip(&losses)
                .all(|(a, b)| (a - b).abs() < 1e-12)
        );
        assert_eq!(back.grader, report.grader);
    }

    #[test]
    fn measurements_that_are_missing_have_no_heading() {
        let few = students_only(&[(RunModel::Base, 4.0), (RunModel::STUDENT, 0.5)], 4);
        let markdown = few.to_markdown();
        for heading in ["## Accuracy by group", "## Training", "## Samples"] {
            assert!(!markdown.contains(heading), "{heading}");
        }
        insta::assert_snapshot!(markdown);
    }
}
