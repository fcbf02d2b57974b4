//! The report as one HTML file: the conclusion first, then the evidence.
//!
//! The page loads nothing: styles, plots and the script of the filters are in the file, and the content security policy
//! of the page forbids anything else. All text that comes from a run is escaped.

use std::fmt::Write;

use potstill_datasets::{RunModel, visible};

use crate::accuracy::Accuracy;
use crate::error::Error;
use crate::finding::Finding;
use crate::metric::Figure;
use crate::report::Report;
use crate::report_text;
use crate::results::StudentResult;
use crate::wording;

mod colour;
mod evidence;
mod figures;
mod html;
mod plots;
mod samples;
mod tables;

use colour::{colour, swatch};
use html::{escape, sentence};

const STYLE: &str = include_str!("report_html/page.css");
const GLOSSARY: &str = include_str!("report_html/glossary.html");
const SCRIPT: &str = include_str!("report_html/page.js");

impl Report {
    /// Writes the report as one HTML file that needs no network: styles, plots and script are in the file.
    ///
    /// # Errors
    /// If a plot cannot be drawn.
    pub fn to_html(&self) -> Result<String, Error> {
        Ok(visible(&write(self)?).into_owned())
    }
}

fn write(report: &Report) -> Result<String, Error> {
    let mut out = String::new();
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">\n<link rel=\"icon\" href=\"data:,\">\n<title>{name}: {headline}</title>\n<style>\n{STYLE}</style></head><body>\n<header><h1>Distillation report: {name}</h1><p>Potstill {version} · {prompts} test prompts, {tokens} tokens</p></header>\n<main>\n",
        name = escape(&report.run),
        headline = escape(&report.conclusion.headline),
        version = escape(&report.potstill),
        prompts = wording::count(report.test.prompts as u64),
        tokens = wording::count(report.test.tokens),
    );
    verdict(&mut out, report);
    differences(&mut out, report);
    models(&mut out, report)?;
    tuning(&mut out, report)?;
    evidence::means(&mut out, report);
    checks(&mut out, report);
    samples::write(&mut out, report);
    training(&mut out, report)?;
    calibration(&mut out, report)?;
    folded(
        &mut out,
        "stages",
        "Time, tokens and bytes by stage",
        "Wall-clock time over all executions of a stage; models may be trained at the same time.",
    );
    tables::stages(&mut out, report);
    out.push_str("</details></section>\n");
    if let Some(cost) = &report.cost {
        section(&mut out, "cost", "Cost of training", "");
        out.push_str("<ul class=\"card\">");
        for text in cost.sentences() {
            let _ = write!(out, "<li>{}</li>", escape(&text));
        }
        out.push_str("</ul></section>\n");
    }
    folded(&mut out, "provenance", "Provenance of the numbers", "");
    tables::provenance(&mut out, report);
    out.push_str("</details></section>\n");
    section(&mut out, "reproduce", "How to reproduce this report", "");
    let commands: Vec<String> = report.reproduce.iter().map(|c| escape(c)).collect();
    let _ = write!(
        out,
        "<pre class=\"card commands\" tabindex=\"0\"><code>{}</code></pre></section>\n</main>\n<footer>Written by Potstill {}. This page is a single file and loads nothing.</footer>\n<script>\n{SCRIPT}</script>\n</body></html>\n",
        commands.join("\n"),
        escape(&report.potstill)
    );
    Ok(out)
}

/// Opens a section; `note` is HTML.
fn section(out: &mut String, id: &str, title: &str, note: &str) {
    let _ = writeln!(
        out,
        "<section aria-labelledby=\"{id}\"><h2 id=\"{id}\">{}</h2>",
        escape(title)
    );
    if !note.is_empty() {
        let _ = writeln!(out, "<p class=\"note\">{note}</p>");
    }
}

/// Opens a section that shows only its heading until it is clicked; `note` is HTML.
fn folded(out: &mut String, id: &str, title: &str, note: &str) {
    let _ = writeln!(
        out,
        "<section class=\"folded\" aria-labelledby=\"{id}\"><details><summary><h2 id=\"{id}\">{}</h2></summary>",
        escape(title)
    );
    if !note.is_empty() {
        let _ = writeln!(out, "<p class=\"note\">{note}</p>");
    }
}

fn verdict(out: &mut String, report: &Report) {
    let conclusion = &report.conclusion;
    let (class, mark) = match conclusion.finding {
        Finding::Helps | Finding::StudentCloser => ("helps", "✓"),
        Finding::NoDifference | Finding::NeitherCloser => ("no_difference", "≈"),
        Finding::Hurts | Finding::StudentFurther => ("hurts", "✗"),
        Finding::Exploratory | Finding::NotMeasured | Finding::TextAlone => ("not_measured", "?"),
    };
    let _ = writeln!(
        out,
        "<section class=\"card verdict {class}\" aria-labelledby=\"verdict\"><h2 id=\"verdict\"><span aria-hidden=\"true\">{mark}</span> {}</h2>",
        sentence(&conclusion.headline)
    );
    let heading = match conclusion.doubts.len() {
        0 => None,
        1 => Some("One doubt about this run".to_owned()),
        count => Some(format!("{count} doubts about this run")),
    };
    if let Some(heading) = heading {
        let _ = writeln!(
            out,
            "<div class=\"doubts\" role=\"note\"><h3>{heading}</h3><ul>"
        );
        for doubt in &conclusion.doubts {
            let _ = writeln!(out, "<li>{}</li>", sentence(doubt));
        }
        out.push_str("</ul></div>\n");
    }
    // The first three sentences answer the question; the rest is further evidence.
    let (first, rest) = conclusion
        .sentences
        .split_at(conclusion.sentences.len().min(3));
    for text in first {
        let _ = writeln!(out, "<p class=\"lead\">{}</p>", sentence(text));
    }
    tiles(out, report);
    if !rest.is_empty() {
        out.push_str("<ul>\n");
        for text in rest {
            let _ = writeln!(out, "<li>{}</li>", sentence(text));
        }
        out.push_str("</ul>\n");
    }
    out.push_str("</section>\n");
}

/// Writes the most important numbers as tiles.
fn tiles(out: &mut String, report: &Report) {
    let student = report.students.iter().find(|s| s.name == RunModel::STUDENT);
    let sft = report.students.iter().find(|s| s.name == RunModel::SFT);
    let mut tiles: Vec<(&str, String, String)> = Vec::new();
    let kl = |student: Option<&StudentResult>| student.and_then(|s| s.kl);
    if let (Some(student), Some(sft)) = (kl(student), kl(sft)) {
        tiles.push((
            "distance to the teacher (KL)",
            wording::value(Figure::Kl, student.mean),
            format!("control sft: {}", wording::value(Figure::Kl, sft.mean)),
        ));
    }
    if let Some(primary) = report.primary() {
        let (figure, difference) = (primary.metric, &primary.difference);
        tiles.push((
            "difference, student − sft",
            wording::signed(figure, difference.mean),
            format!(
                "95 % interval {}, {}",
                wording::from_to(figure, difference),
                wording::p_value(primary.p_value)
            ),
        ));
        let seeds = match primary.seeds {
            0 | 1 => "one seed".to_owned(),
            seeds => format!("{seeds} seeds"),
        };
        if let Some(smallest) = primary.detectable {
            tiles.push((
                "smallest detectable difference",
                wording::detectable(figure, smallest),
                format!(
                    "with 80 % power, {} prompts, {seeds}",
                    wording::count(difference.prompts as u64)
                ),
            ));
        }
    }
    let share = |accuracy: &Option<Accuracy>| {
        let accuracy = accuracy.as_ref()?;
        Some(wording::value(Figure::Accuracy, accuracy.overall.mean))
    };
    if let Some(right) = student.and_then(|s| share(&s.accuracy)) {
        let mut beside = Vec::new();
        if let Some(right) = sft.and_then(|s| share(&s.accuracy)) {
            beside.push(format!("control sft: {right}"));
        }
        if let Some(right) = report.teacher.as_ref().and_then(|t| share(&t.accuracy)) {
            beside.push(format!("teacher: {right}"));
        }
        tiles.push(("right answers", right, beside.join(", ")));
    }
    tiles.push((
        "time of all stages",
        wording::duration(report.seconds),
        "including the controls".to_owned(),
    ));
    out.push_str("<dl class=\"tiles\">");
    for (what, value, beside) in tiles {
        let _ = write!(
            out,
            "<div class=\"tile\"><dt>{what}</dt><dd>{} <small>{}</small></dd></div>",
            escape(&value),
            escape(&beside)
        );
    }
    out.push_str("</dl>\n");
}

fn differences(out: &mut String, report: &Report) {
    if report.comparisons.is_empty() {
        return;
    }
    let power = report_text::power(report).map_or(String::new(), |power| format!(" {power}"));
    let note = format!(
        "Each difference is left − right over the same test prompts, with its 95 % interval. “Better” and “worse” are verdicts on the left model; they need p ≤ 0.05. “Detectable” is the smallest true difference that is found with 80 % probability.{}",
        escape(&power)
    );
    section(out, "differences", "Differences between models", &note);
    evidence::comparisons(out, report);
    out.push_str("</section>\n");
}

fn models(out: &mut String, report: &Report) -> Result<(), Error> {
    let right = report.grader.map_or(String::new(), |grader| {
        format!(" An answer is right if {}.", escape(grader.rule()))
    });
    let note = format!(
        "Measured on {} answers to {} test prompts, {} tokens. In brackets are 95 % intervals over prompts and, from 3 seeds on, over seeds.{right}",
        wording::count(report.test.sequences as u64),
        wording::count(report.test.prompts as u64),
        wording::count(report.test.tokens),
    );
    section(out, "models", "Teacher, student and controls", &note);
    tables::models(out, report);
    out.push_str(GLOSSARY);
    tables::seeds(out, report);
    figures::figures(out, report)?;
    tables::groups(out, report);
    out.push_str("</section>\n");
    Ok(())
}

fn tuning(out: &mut String, report: &Report) -> Result<(), Error> {
    let Some(table) = report.tuning_table() else {
        return Ok(());
    };
    let figure = match report.has_distributions() {
        true => "KL",
        false => "NLL",
    };
    let note = format!(
        "{figure} on the dev prompts, nats per token. Each arm tried the same rates, and keeps the one with the smallest figure; the test prompts were not used."
    );
    section(out, "tuning", "Choice of the learning rates", &note);
    evidence::tuning(out, report);
    if table.rates.len() > 1 {
        out.push_str("<div class=\"plots one\">\n");
        figures::tuning(out, report, &table)?;
        out.push_str("</div>\n");
    }
    out.push_str("</section>\n");
    Ok(())
}

fn checks(out: &mut String, report: &Report) {
    if report.splits.is_none() && report.sampling.is_none() {
        return;
    }
    section(out, "checks", "Checks of the data", "");
    if let Some(sampling) = &report.sampling {
        evidence::sampling(out, sampling);
    }
    if let Some(splits) = &report.splits {
        evidence::splits(out, splits);
    }
    out.push_str("</section>\n");
}

fn training(out: &mut String, report: &Report) -> Result<(), Error> {
    if report.losses.iter().all(|curve| curve.points.is_empty()) {
        return Ok(());
    }
    folded(out, "training", "Losses in training", "");
    let trained = report
        .losses
        .iter()
        .filter(|curve| !curve.points.is_empty());
    legend(out, &mut trained.map(|curve| curve.name));
    figures::losses(out, report)?;
    out.push_str("</details></section>\n");
    Ok(())
}

fn calibration(out: &mut String, report: &Report) -> Result<(), Error> {
    let measured = || report.students.iter().filter(|s| s.calibration.is_some());
    if measured().next().is_none() {
        return Ok(());
    }
    let note = match report.has_distributions() {
        true => {
            "A model should give the teacher's most likely token the teacher's probability. Each point is a bin with equally many tokens."
        }
        false => {
            "A model with a confidence of 80 % should be right in 80 % of cases. Each point is a bin with equally many tokens."
        }
    };
    folded(out, "calibration", "Calibration", note);
    legend(out, &mut measured().map(|s| s.name));
    out.push_str("<div class=\"plots one\">\n");
    figures::calibration(out, report)?;
    out.push_str("</div>\n");
    tables::reliability(out, report);
    out.push_str("</details></section>\n");
    Ok(())
}

fn legend(out: &mut String, models: &mut dyn Iterator<Item = RunModel>) {
    out.push_str("<ul class=\"legend\" aria-label=\"Colours\">");
    for model in models {
        let swatch = swatch(colour(model));
        let _ = write!(out, "<li>{swatch}{model}</li>");
    }
    out.push_str("</ul>\n");
}

#[cfg(test)]
mod tests {
    use potstill_datasets::{RunModel, visible_line};

    use crate::example::{report, students_only};
    use crate::{Evidence, Report, conclude};

    /// Writes the page to a file for inspection: `POTSTILL_REPORT_HTML=/tmp/report.html cargo test`.
    fn keep(report: &Report) -> String {
        let html = report.to_html().unwrap();
        if let Ok(path) = std::env::var("POTSTILL_REPORT_HTML") {
            std::fs::write(path, &html).unwrap();
        }
        html
    }

    #[test]
    fn the_conclusion_comes_first_and_every_section_exists() {
        let html = keep(&report());
        let at = |text: &str| html.find(text).unwrap_or_else(|| panic!("{text}"));
        let order = [
            "Distillation helps here.",
            "Differences between models",
            "KL by seed",
            "Other comparisons",
            "comparisons by other figures",
            "Teacher, student and controls",
            "All figures by seed",
            "Accuracy, with 95 % intervals",
            "Distance to the teacher, with",
            "Distance on own text, with",
            "Agreement with the teacher, with",
            "Distance in probability, with",
            "Accuracy by group",
            "Choice of the learning rates",
            "KL on the dev prompts by learning rate",
            "Sampling test",
            "The first 2 near-duplicates",
            "Samples side by side",
            "Forward KL in training by step",
            "Cross-entropy in training by step",
            "Calibration, the teacher&#39;s probability by the model&#39;s",
            "Time, tokens and bytes by stage",
            "Provenance of the numbers",
            "How to reproduce this report",
            "cargo run --release -- run examples/quickstart.toml",
        ];
        let places: Vec<usize> = order.iter().skip(1).map(|text| at(text)).collect();
        assert!(places.is_sorted(), "{places:?}");
        assert_eq!(html.matches("<svg").count(), 9);
        assert_eq!(html.matches("<article class=\"card sample\">").count(), 30);
    }

    #[test]
    fn the_page_loads_nothing() {
        let html = report().to_html().unwrap();
        for loading in [
            "src=",
            "url(",
            "@import",
            "http-equiv=\"refresh\"",
            "fetch(",
            "<iframe",
        ] {
            assert!(!html.contains(loading), "{loading}");
        }
        let links: Vec<&str> = html.split("href=").skip(1).collect();
        assert_eq!(links.len(), 1);
        assert!(links[0].starts_with("\"data:,\""));
        assert!(html.contains("default-src 'none'"));
    }

    #[test]
    fn text_of_a_run_is_escaped() {
        let evil = "</script></style><script>alert(1)</script><img src=x onerror='a' \"b\">";
        let mut report = report();
        report.run = evil.to_owned();
        report.potstill = evil.to_owned();
        report.conclusion.headline = evil.to_owned();
        report.conclusion.sentences[0] = format!("`{evil}` {evil}");
        report.conclusion.doubts = vec![evil.to_owned()];
        report.teacher.as_mut().unwrap().name = evil.to_owned();
        for student in &mut report.students {
            student.learned_from = evil.to_owned();
            let accuracy = student.accuracy.iter_mut();
            for group in accuracy.flat_map(|accuracy| &mut accuracy.groups) {
                group.group = evil.to_owned();
            }
        }
        let sample = &mut report.samples[0];
        sample.prompt_id = evil.to_owned();
        sample.group = Some(evil.to_owned());
        sample.prompt = evil.to_owned();
        sample.reference = Some(evil.to_owned());
        sample.answers[0].reasoning = Some(evil.to_owned());
        sample.answers[0].answer = evil.to_owned();
        report.stages[0].name = evil.to_owned();
        report.stages[0].counts = vec![(evil.to_owned(), 1)];
        report.provenance[0].what = evil.to_owned();
        report.provenance[0].value = evil.to_owned();
        report.reproduce[0] = evil.to_owned();
        let html = report.to_html().unwrap();
        assert!(!html.contains("alert(1)</script>") && !html.contains("<img"));
        assert_eq!(
            html.matches("<script>").count(),
            1,
            "only the page's own script"
        );
        assert_eq!(html.matches("</script>").count(), 1);
        assert_eq!(html.matches("</style>").count(), 1);
        assert!(
            html.matches("&lt;script&gt;alert(1)&lt;/script&gt;")
                .count()
                > 25
        );
    }

    /// Each text of a report, in all three forms, with characters that control a terminal or reorder a line.
    #[test]
    fn hidden_characters_of_a_run_are_written_out() {
        let hidden = "\u{1b}[31m\u{7}\u{9b}\r\u{202e}\u{2066}\u{200f}\u{feff}\u{e0041}\u{7f}";
        let json = serde_json::to_value(report()).unwrap();
        let evil: Report = serde_json::from_value(with_text(json, hidden)).unwrap();
        let pages = [evil.to_html().unwrap(), evil.to_markdown(), evil.to_json()];
        for page in &pages {
            let found = page
                .chars()
                .find(|c| visible_line(&c.to_string()).len() > 4);
            let found = found.filter(|c| !"\n\t".contains(*c));
            assert_eq!(found, None);
        }
        assert!(pages[0].matches("\\u{202e}").count() > 100);
        assert!(pages[1].matches("\\u{202e}").count() > 40);
        let back: Report = serde_json::from_str(&pages[2]).unwrap();
        assert_eq!(back.samples, evil.samples);
    }

    /// Adds `hidden` to each text of a report that no type restricts.
    fn with_text(json: serde_json::Value, hidden: &str) -> serde_json::Value {
        use serde_json::Value;
        let restricted = [
            "finding", "metric", "left", "right", "verdict", "split", "arm", "grader", "model",
        ];
        match json {
            Value::String(text) => Value::String(format!("{text}{hidden}")),
            Value::Array(items) => items.into_iter().map(|v| with_text(v, hidden)).collect(),
            Value::Object(fields) => {
                let fields = fields.into_iter().map(|(key, value)| match &value {
                    Value::String(text)
                        if restricted.contains(&key.as_str()) || is_model(&key, text) =>
                    {
                        (key, value)
                    }
                    _ => (key, with_text(value, hidden)),
                });
                Value::Object(fields.collect())
            }
            other => other,
        }
    }

    fn is_model(key: &str, text: &str) -> bool {
        key == "name" && serde_json::from_value::<RunModel>(text.into()).is_ok()
    }

    #[test]
    fn measurements_that_are_missing_have_no_heading() {
        let html = students_only(&[(RunModel::Base, 4.0), (RunModel::STUDENT, 0.5)], 4).to_html();
        let html = html.unwrap();
        assert!(html.contains("Whether distillation helps was not measured"));
        for absent in [
            "id=\"calibration\"",
            "id=\"training\"",
            "Samples side",
            "Accuracy by group",
            "id=\"filters\"",
        ] {
            assert!(!html.contains(absent), "{absent}");
        }
        let hurts = students_only(&[(RunModel::STUDENT, 2.0), (RunModel::SFT, 1.0)], 40)
            .to_html()
            .unwrap();
        assert!(hurts.contains("card verdict hurts"));
        let same = students_only(&[(RunModel::STUDENT, 1.0), (RunModel::SFT, 1.0)], 40)
            .to_html()
            .unwrap();
        assert!(same.contains("card verdict no_difference"));
    }

    #[test]
    fn a_run_on_text_only_does_not_mention_the_teacher() {
        let mut run = report();
        run.students
            .retain(|s| s.name == RunModel::Base || s.name == RunModel::STUDENT);
        for student in &mut run.students {
            (student.kl, student.agreement) = (None, None);
        }
        run.comparisons
            .retain(|c| c.metric == crate::Figure::Kl && c.right == RunModel::Base);
        run.comparisons[0].metric = crate::Figure::Nll;
        run.teacher = None;
        run.conclusion = conclude(&Evidence::of(&run.students, &run.comparisons));
        let html = run.to_html().unwrap();
        assert!(html.contains("there is no distillation to evaluate"));
        assert!(html.contains("Training moved the student closer to the text: test NLL"));
        for absent in [
            "Distance to the teacher,",
            "Forward KL in training by",
            "Agreement with",
        ] {
            assert!(!html.contains(absent), "{absent}");
        }
        let markdown = run.to_markdown();
        assert!(
            markdown.contains("so there is no KL") && !markdown.contains("closer to the teacher")
        );
    }

    #[test]
    fn training_with_losses_that_are_not_finite_is_reported() {
        let mut report = report();
        for point in &mut report.losses[0].points[100..] {
            point.forward_kl = f64::NAN;
        }
        for point in &mut report.losses[1].points {
            point.forward_kl = f64::INFINITY;
        }
        let html = report.to_html().unwrap();
        assert!(html.contains("Forward KL in training by step: student from"));
        assert!(!html.contains("NaN") && !html.contains("; sft from inf"));
        report.losses.truncate(2);
        report.losses.remove(0);
        let html = report.to_html().unwrap();
        assert!(!html.contains("Forward KL in training by step"));
    }

    #[test]
    fn tags_are_closed() {
        let html = report().to_html().unwrap();
        for tag in [
            "section", "div", "table", "tr", "td", "article", "figure", "svg", "dl", "ul",
            "details", "form", "pre", "p", "span",
        ] {
            let opened = html.matches(&format!("<{tag}>")).count()
                + html.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }
}
