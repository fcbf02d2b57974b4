//! The report as Markdown: the conclusion first, then the evidence.

use std::fmt::Write;

use potstill_datasets::{visible, visible_line};

use crate::accuracy::Accuracy;
use crate::interval::Interval;
use crate::metric::Figure;
use crate::report::{Report, Sample};
use crate::report_text;
use crate::sampling::MAX_Z;
use crate::wording;

/// Number of samples shown; all are in `report.html` and `report.json`.
const SAMPLES: usize = 5;

impl Report {
    /// Writes the report as Markdown.
    pub fn to_markdown(&self) -> String {
        visible(&write(self)).into_owned()
    }
}

fn write(report: &Report) -> String {
    let mut out = format!(
        "# {}\n\n**{}**\n\n",
        markdown_text(&report.run),
        sentence(&report.conclusion.headline)
    );
    if !report.conclusion.doubts.is_empty() {
        out.push_str("**Doubts about this run:**\n\n");
        for doubt in &report.conclusion.doubts {
            line(&mut out, &format!("- {}", sentence(doubt)));
        }
        out.push_str("\n**Evidence:**\n\n");
    }
    for text in &report.conclusion.sentences {
        line(&mut out, &format!("- {}", sentence(text)));
    }
    comparisons(&mut out, report);
    models(&mut out, report);
    seeds(&mut out, report);
    groups(&mut out, report);
    tuning(&mut out, report);
    means(&mut out, report);
    checks(&mut out, report);
    losses(&mut out, report);
    samples(&mut out, &report.samples);
    stages(&mut out, report);
    if let Some(cost) = &report.cost {
        out.push_str("\n## Cost of training\n\n");
        for text in cost.sentences() {
            line(&mut out, &format!("- {}", sentence(&text)));
        }
    }
    out.push_str("\n## Provenance\n\n| what | value |\n|---|---|\n");
    for entry in &report.provenance {
        line(
            &mut out,
            &format!(
                "| {} | {} |",
                markdown_text(&entry.what),
                markdown_text(&entry.value)
            ),
        );
    }
    out.push_str("\n## How to reproduce\n\n```sh\n");
    for command in &report.reproduce {
        line(&mut out, &visible_line(command));
    }
    line(&mut out, "```");
    let _ = write!(
        out,
        "\nWritten by Potstill {}.\n",
        markdown_text(&report.potstill)
    );
    out
}

fn models(out: &mut String, report: &Report) {
    let test = &report.test;
    let _ = write!(
        out,
        "\n## Figures on the test prompts\n\nMeasured on {} answers to {} prompts, {} tokens. In brackets are 95 % intervals over prompts and, from 3 seeds on, over seeds. {} {}{}\n\n",
        wording::count(test.sequences as u64),
        wording::count(test.prompts as u64),
        wording::count(test.tokens),
        match report.has_distributions() {
            true => format!(
                "KL is the forward KL from the teacher to the model, on the stored support and one bucket for all other tokens; own-text KL is the reverse KL on text that the model wrote; the teacher's own NLL is {:.4}. All three are in nats per token. |q − p| is the mean distance between the model's and the teacher's probability of the teacher's most likely token, ECE the expected calibration error against the teacher's probability.",
                test.teacher_nll
            ),
            false => "The teacher's distributions are not stored, so there is no KL. NLL is in nats per token. ECE is the expected calibration error against the target tokens.".to_owned(),
        },
        report_text::sizes(report),
        report.grader.map_or(String::new(), |grader| format!(
            " An answer is right if {}.",
            grader.rule()
        )),
    );
    out.push_str("| model | learned from | KL | own-text KL | NLL | top-1 agreement | accuracy | \\|q − p\\| | ECE |\n|---|---|---|---|---|---|---|---|---|\n");
    if let Some(teacher) = &report.teacher {
        line(
            out,
            &format!(
                "| teacher | is {} | 0 by definition | 0 by definition | {} | 100 % by definition | {} | 0 by definition | – |",
                markdown_text(&teacher.name),
                wording::with_interval(Figure::Nll, &teacher.nll),
                accuracy(teacher.accuracy.as_ref()),
            ),
        );
    }
    for student in &report.students {
        let calibration = student.calibration.as_ref();
        line(
            out,
            &format!(
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                student.name,
                markdown_text(&student.learned_from),
                interval(Figure::Kl, student.kl.as_ref()),
                interval(Figure::OwnTextKl, student.own_text_kl.as_ref()),
                wording::with_interval(Figure::Nll, &student.nll),
                interval(Figure::Agreement, student.agreement.as_ref()),
                accuracy(student.accuracy.as_ref()),
                interval(
                    Figure::Calibration,
                    calibration.and_then(|c| c.distance.as_ref())
                ),
                interval(Figure::Calibration, calibration.map(|c| &c.error)),
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

fn groups(out: &mut String, report: &Report) {
    let (names, rows) = report.accuracy_by_group();
    if names.is_empty() {
        return;
    }
    out.push_str("\n### Accuracy by group\n\n| model |");
    for name in &names {
        let _ = write!(out, " {} |", markdown_text(name));
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
    out.push_str("\n### All figures by seed\n\nThe figures above are over all seeds. The student to use is the one with the first seed, `students/student/export`.\n\n| model | seed | KL (nats per token) | NLL (nats per token) | top-1 agreement | accuracy |\n|---|---:|---|---|---|---|\n");
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

fn comparisons(out: &mut String, report: &Report) {
    let comparisons = &report.comparisons;
    if comparisons.is_empty() {
        return;
    }
    let power = report_text::power(report).map_or(String::new(), |power| format!(" {power}"));
    let _ = write!(
        out,
        "\n## Differences between models\n\nEach difference is left − right over the same test prompts, with its 95 % interval. \"Better\" and \"worse\" are verdicts on the left model; they need p ≤ 0.05. Only the primary comparison's p is not corrected; the others are corrected for their number by Holm's method. \"Detectable\" is the smallest true difference that is found with 80 % probability.{power}\n\n| comparison | figure | difference | p | verdict | detectable |\n|---|---|---|---|---|---|\n"
    );
    let primary = comparisons.iter().filter(|c| c.primary);
    for comparison in primary.chain(comparisons.iter().filter(|c| !c.primary)) {
        let name = format!("{} − {}", comparison.left, comparison.right);
        let name = match comparison.primary {
            true => format!("**{name}** (primary)"),
            false => name,
        };
        line(
            out,
            &format!(
                "| {name} | {} | {} | {} | {} | {} |",
                comparison.metric.name(),
                wording::difference(comparison.metric, &comparison.difference),
                markdown_text(&wording::p_number(comparison.adjusted_p)),
                wording::verdict(comparison.verdict),
                comparison.detectable.map_or("–".to_owned(), |smallest| {
                    wording::detectable(comparison.metric, smallest)
                }),
            ),
        );
    }
    differences_by_seed(out, report);
}

fn differences_by_seed(out: &mut String, report: &Report) {
    let Some(seeds) = report.seed_table() else {
        return;
    };
    let _ = write!(
        out,
        "\n### {} by seed\n\nModels in a row have the same start and saw the same text in the same order.\n\n| seed |",
        seeds.figure.name()
    );
    for model in &seeds.models {
        let _ = write!(out, " {model} |");
    }
    let _ = write!(
        out,
        " student − sft |\n|---|{}",
        "---:|".repeat(seeds.models.len() + 1)
    );
    out.push('\n');
    for row in &seeds.rows {
        let _ = write!(out, "| {} |", row.seed);
        for figure in &row.values {
            let _ = write!(out, " {} |", value(seeds.figure, *figure));
        }
        let difference = row.difference;
        let difference = difference.map(|difference| wording::signed(seeds.figure, difference));
        let _ = writeln!(out, " {} |", difference.unwrap_or_else(|| "–".to_owned()));
    }
}

fn tuning(out: &mut String, report: &Report) {
    let Some(tuning) = report.tuning_table() else {
        return;
    };
    let figure = match report.has_distributions() {
        true => "KL",
        false => "NLL",
    };
    let _ = write!(
        out,
        "\n## Choice of the learning rates\n\n{figure} on the dev prompts, nats per token. Each arm tried the same rates, and keeps the one with the smallest figure, in bold; the test prompts were not used.\n\n| model |"
    );
    for rate in &tuning.rates {
        let _ = write!(out, " {} |", wording::rate(*rate));
    }
    let _ = writeln!(out, "\n|---|{}", "---:|".repeat(tuning.rates.len()));
    for (arm, trials) in &tuning.rows {
        let _ = write!(out, "| {} |", arm.name());
        for trial in trials {
            let _ = match trial.map(|trial| (trial.dev, trial.chosen)) {
                None => write!(out, " – |"),
                Some((None, _)) => write!(out, " diverged |"),
                Some((Some(dev), true)) => write!(out, " **{dev:.4}** |"),
                Some((Some(dev), false)) => write!(out, " {dev:.4} |"),
            };
        }
        out.push('\n');
    }
}

fn means(out: &mut String, report: &Report) {
    if report.means.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "\n## Running mean of the weights\n\n{}\n\n| model | seed | step | weights | running mean |\n|---|---:|---:|---:|---:|\n",
        report_text::means_note(report)
    );
    for mean in &report.means {
        let (trained, averaged) = (mean.trained, mean.mean);
        let figures = match mean.exports_mean {
            true => format!("{trained:.4} | **{averaged:.4}**"),
            false => format!("**{trained:.4}** | {averaged:.4}"),
        };
        let (name, seed, step) = (mean.name, mean.seed, mean.step);
        let _ = writeln!(out, "| {name} | {seed} | {step} | {figures} |");
    }
}

fn checks(out: &mut String, report: &Report) {
    if let Some(sampling) = &report.sampling {
        let _ = write!(
            out,
            "\n## Sampling test\n\nIf each token was drawn from the distribution that is stored for it, the mean of NLL − entropy is 0 up to chance. z is the mean in standard errors; chance explains |z| up to {MAX_Z}.\n\n| what | value |\n|---|---|\n"
        );
        for (what, value) in report_text::sampling(sampling) {
            line(
                out,
                &format!("| {} | {} |", markdown_text(what), markdown_text(&value)),
            );
        }
    }
    let Some(splits) = &report.splits else {
        return;
    };
    out.push_str("\n## Splits\n\nPrompts are split before anything is dropped. Only the answers to train on are filtered.\n\n| split | prompts | answers |\n|---|---:|---:|\n");
    for size in &splits.sizes {
        line(
            out,
            &format!(
                "| {} | {} | {} |",
                size.split.name(),
                wording::count(size.prompts),
                wording::count(size.sequences)
            ),
        );
    }
    let _ = writeln!(out, "\n{}", report_text::near_duplicates(splits));
    if splits.similar.is_empty() {
        return;
    }
    out.push_str("\n| split | prompt | training prompt | similarity |\n|---|---|---|---:|\n");
    for similar in &splits.similar {
        line(
            out,
            &format!(
                "| {} | {} | {} | {:.2} |",
                similar.split.name(),
                markdown_text(&similar.prompt),
                markdown_text(&similar.train_prompt),
                similar.similarity
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
            " Forward KL is to the distributions that the model was trained on, which are those of other positions for `same_token` and `shuffled`."
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
        line(out, &format!("\n**{}**\n", markdown_text(&sample.prompt)));
        if let Some(reference) = &sample.reference {
            line(out, &format!("Reference: {}\n", markdown_text(reference)));
        }
        out.push_str("| model | answer | |\n|---|---|---|\n");
        for answer in &sample.answers {
            line(
                out,
                &format!(
                    "| {} | {} | {} |",
                    answer.model,
                    markdown_text(&answer.answer),
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
            .map(|(name, count)| format!("{} {}", markdown_text(name), wording::count(*count)))
            .collect();
        line(
            out,
            &format!(
                "| {} | {} | {} | {} | {} |",
                markdown_text(&stage.name),
                counts.join(", "),
                stage.tokens.map_or("–".to_owned(), wording::count),
                wording::duration(stage.seconds),
                wording::bytes(stage.bytes)
            ),
        );
    }
}

/// Escapes a sentence of the conclusion, which may have text in backticks.
fn sentence(text: &str) -> String {
    let text = text.replace(['\n', '\r'], " ");
    let mut parts = text.split('<');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        // Only what can begin a tag; sentences have `p < 0.05`.
        let is_space = part.starts_with(' ');
        out += if is_space { "<" } else { "&lt;" };
        out += part;
    }
    out
}

/// Escapes text for Markdown, so that it is shown as it is: it can end neither a cell of a table nor a line, and makes no
/// tag, link, image, code or formula.
pub fn markdown_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut letter_before = false;
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '\n' | '\r' => out.push(' '),
            // Between letters an underscore is itself, and names are easier to copy.
            '_' if letter_before && rest.peek().is_some_and(|next| next.is_alphanumeric()) => {
                out.push('_');
            }
            // Otherwise an address would become a link.
            ':' if rest.peek() == Some(&'/') => out += "\\:",
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' | '$' => out.extend(['\\', c]),
            c => out.push(c),
        }
        letter_before = c.is_alphanumeric();
    }
    visible_line(&out).into_owned()
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
    fn running_means_are_shown_beside_the_weights() {
        let mut report = students_only(&[(RunModel::Base, 0.5)], 40);
        assert!(!report.to_markdown().contains("Running mean"));
        report.means = vec![crate::report::MeanOfWeights {
            name: potstill_datasets::Arm::Student.first().into(),
            seed: 3,
            step: 20,
            trained: 0.25,
            mean: 0.125,
            exports_mean: true,
        }];
        let (markdown, html) = (report.to_markdown(), report.to_html().unwrap());
        assert!(markdown.contains("| student | 3 | 20 | 0.2500 | **0.1250** |"));
        assert!(html.contains("Running mean of the weights") && html.contains("0.1250"));
    }

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
    fn text_is_shown_as_it_is() {
        let text = "a|b \\| `c` **d** ![e](https://f.g/h) <img src=i>\n- j &amp; $k$ ~~l~~ m_n _o_\t\u{1b}[31m\u{202e}";
        assert_eq!(
            markdown_text(text),
            "a\\|b \\\\\\| \\`c\\` \\*\\*d\\*\\* !\\[e\\](https\\://f.g/h) &lt;img src=i> - j &amp;amp; \\$k\\$ \\~\\~l\\~\\~ m_n \\_o\\_\\u{9}\\u{1b}[31m\\u{202e}".replace("\\u{1b}[31m", "\\u{1b}\\[31m")
        );
    }

    #[test]
    fn measurements_that_are_missing_have_no_heading() {
        let few = students_only(&[(RunModel::Base, 4.0), (RunModel::STUDENT, 0.5)], 4);
        let markdown = few.to_markdown();
        for heading in [
            "### Accuracy by group",
            "## Training",
            "## Samples",
            "## Splits",
            "## Sampling test",
            "## Choice of the learning rates",
        ] {
            assert!(!markdown.contains(heading), "{heading}");
        }
        insta::assert_snapshot!(markdown);
    }
}
