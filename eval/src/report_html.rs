//! The report as one HTML file: the verdict first, then what it rests on.
//!
//! Nothing is loaded: styles, plots and the script of the filters are in the file, and the
//! page itself forbids anything else by its content security policy. All text that comes
//! from a run is escaped.

use std::fmt::Write;

use potstill_datasets::RunModel;

use crate::report::Report;
use crate::{Error, Figure, Finding, wording};

mod figures;
mod html;
mod plots;
mod samples;
mod tables;

use html::{escape, sentence};

const STYLE: &str = include_str!("report_html/page.css");
const SCRIPT: &str = include_str!("report_html/page.js");

pub(crate) fn write(report: &Report) -> Result<String, Error> {
    let mut out = String::new();
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">\n<link rel=\"icon\" href=\"data:,\">\n<title>{name}: {headline}</title>\n<style>\n{STYLE}</style></head><body>\n<header><h1>Distillation report: {name}</h1><p>Potstill {version} · {prompts} held-out prompts, {tokens} tokens</p></header>\n<main>\n",
        name = escape(&report.run),
        headline = escape(&report.conclusion.headline),
        version = escape(&report.potstill),
        prompts = wording::count(report.heldout.prompts as u64),
        tokens = wording::count(report.heldout.tokens),
    );
    verdict(&mut out, report);
    models(&mut out, report)?;
    training(&mut out, report)?;
    calibration(&mut out, report)?;
    if !report.comparisons.is_empty() {
        section(
            &mut out,
            "differences",
            "Paired differences",
            "Left less right over the same prompts. “Better” and “worse” are about the left one, and are said only where the interval leaves out zero and at least six prompts stand behind it.",
        );
        tables::comparisons(&mut out, report);
        out.push_str("</section>\n");
    }
    samples::write(&mut out, report);
    section(
        &mut out,
        "stages",
        "Time, tokens and bytes by stage",
        "Time is by the clock, over all runs of a stage; students may be trained side by side.",
    );
    tables::stages(&mut out, report);
    out.push_str("</section>\n");
    section(&mut out, "provenance", "Where the numbers come from", "");
    tables::provenance(&mut out, report);
    out.push_str("</section>\n");
    section(&mut out, "again", "How to get this report again", "");
    let commands: Vec<String> = report.reproduce.iter().map(|c| escape(c)).collect();
    let _ = write!(
        out,
        "<pre class=\"card commands\" tabindex=\"0\"><code>{}</code></pre></section>\n</main>\n<footer>Written by Potstill {}. This page is one file and loads nothing.</footer>\n<script>\n{SCRIPT}</script>\n</body></html>\n",
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

fn verdict(out: &mut String, report: &Report) {
    let conclusion = &report.conclusion;
    let (class, mark) = match conclusion.finding {
        Finding::Helps => ("helps", "✓"),
        Finding::NoDifference => ("no_difference", "≈"),
        Finding::Hurts => ("hurts", "✗"),
        Finding::NotMeasured | Finding::TextAlone => ("not_measured", "?"),
    };
    let _ = writeln!(
        out,
        "<section class=\"card verdict {class}\" aria-labelledby=\"verdict\"><h2 id=\"verdict\"><span aria-hidden=\"true\">{mark}</span> {}</h2>",
        sentence(&conclusion.headline)
    );
    for doubt in &conclusion.doubts {
        let _ = writeln!(
            out,
            "<p class=\"doubt\"><strong>Doubt this run.</strong> {}</p>",
            sentence(doubt)
        );
    }
    // The three that answer the question; the rest is what they rest on.
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

/// The few numbers that a hurried reader takes along.
fn tiles(out: &mut String, report: &Report) {
    let student = report.students.iter().find(|s| s.name == RunModel::STUDENT);
    let sft = report.students.iter().find(|s| s.name == RunModel::SFT);
    let mut tiles: Vec<(&str, String, String)> = Vec::new();
    let kl = |student: Option<&crate::StudentResult>| student.and_then(|s| s.kl);
    if let (Some(student), Some(sft)) = (kl(student), kl(sft)) {
        tiles.push((
            "distance from the teacher (KL)",
            wording::value(Figure::Kl, student.mean),
            format!("text alone: {}", wording::value(Figure::Kl, sft.mean)),
        ));
    }
    let share = |accuracy: &Option<crate::Accuracy>| {
        let accuracy = accuracy.as_ref()?;
        Some(wording::value(Figure::Accuracy, accuracy.overall.mean))
    };
    if let Some(right) = student.and_then(|s| share(&s.accuracy)) {
        let mut beside = Vec::new();
        if let Some(right) = sft.and_then(|s| share(&s.accuracy)) {
            beside.push(format!("text alone: {right}"));
        }
        if let Some(right) = report.teacher.as_ref().and_then(|t| share(&t.accuracy)) {
            beside.push(format!("teacher: {right}"));
        }
        tiles.push(("right answers", right, beside.join(", ")));
    }
    let teacher = report.teacher.as_ref().and_then(|t| t.parameters);
    if let (Some(small), Some(large)) = (student.and_then(|s| s.parameters), teacher) {
        tiles.push((
            "size of the student",
            format!("{:.0} %", 100.0 * small as f64 / large.max(1) as f64),
            format!("of the teacher's {} parameters", wording::count(large)),
        ));
    }
    tiles.push((
        "time, all stages",
        wording::duration(report.seconds),
        "controls included".to_owned(),
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

fn models(out: &mut String, report: &Report) -> Result<(), Error> {
    let right = report.grader.map_or(String::new(), |grader| {
        format!(" An answer is right where {}.", escape(grader.rule()))
    });
    let note = format!(
        "Over {} sequences of {} held-out prompts, {} tokens. In brackets: 95 % intervals from a bootstrap over prompts.{right}",
        wording::count(report.heldout.sequences as u64),
        wording::count(report.heldout.prompts as u64),
        wording::count(report.heldout.tokens),
    );
    section(out, "models", "Teacher, student and controls", &note);
    tables::models(out, report);
    out.push_str(WORDS);
    figures::figures(out, report)?;
    tables::groups(out, report);
    tables::seeds(out, report);
    out.push_str("</section>\n");
    Ok(())
}

const WORDS: &str = "<details><summary>What the words mean</summary><dl class=\"words\">
<dt>student</dt><dd>learned from the teacher's probabilities for every token: distillation.</dd>
<dt>sft</dt><dd>the control that matters: the same start, text and steps, but the text alone (supervised fine-tuning).</dd>
<dt>shuffled</dt><dd>a control that must fail: the teacher's probabilities, each put in a wrong place.</dd>
<dt>untrained</dt><dd>the model that all of them started from.</dd>
<dt>KL</dt><dd>how far a model's probabilities are from the teacher's on held-out text, in nats a token; 0 is equal. Measured from the teacher to the model, on the stored tokens and one bucket for all others.</dd>
<dt>NLL</dt><dd>how surprised a model is by the teacher's text, in nats a token. The teacher's own is the floor.</dd>
<dt>agreement</dt><dd>how often the model's likeliest token is the teacher's.</dd>
<dt>calibration error</dt><dd>by how much a model's confidence misses how often it is right, on average (expected calibration error, ten bins).</dd>
<dt>95 % interval</dt><dd>where the figure would fall with other prompts of this kind (and, for differences of models trained with several seeds, with other seeds); it misses the truth about one time in twenty.</dd>
</dl></details>
";

fn training(out: &mut String, report: &Report) -> Result<(), Error> {
    if report.losses.iter().all(|curve| curve.points.is_empty()) {
        return Ok(());
    }
    section(out, "training", "How training went", "");
    let trained = report
        .losses
        .iter()
        .filter(|curve| !curve.points.is_empty());
    legend(out, report, &mut trained.map(|curve| curve.name));
    figures::losses(out, report)?;
    out.push_str("</section>\n");
    Ok(())
}

fn calibration(out: &mut String, report: &Report) -> Result<(), Error> {
    let measured = || report.students.iter().filter(|s| s.calibration.is_some());
    if measured().next().is_none() {
        return Ok(());
    }
    section(
        out,
        "calibration",
        "Does it know what it knows?",
        "A model that is 80 % sure should be right in 80 % of cases.",
    );
    legend(out, report, &mut measured().map(|s| s.name));
    out.push_str("<div class=\"plots one\">\n");
    figures::calibration(out, report)?;
    out.push_str("</div>\n");
    tables::reliability(out, report);
    out.push_str("</section>\n");
    Ok(())
}

fn legend(out: &mut String, report: &Report, models: &mut dyn Iterator<Item = RunModel>) {
    out.push_str("<ul class=\"legend\" aria-label=\"Colours\">");
    for model in models {
        let swatch = swatch(colour(report, model));
        let _ = write!(out, "<li>{swatch}{model}</li>");
    }
    out.push_str("</ul>\n");
}

/// The teacher is 0; the others are by their place among the students.
fn colour(report: &Report, model: RunModel) -> usize {
    let place = report.students.iter().position(|s| s.name == model);
    place.map_or(0, |i| 1 + i % (plots::COLOURS - 1))
}

fn swatch(colour: usize) -> String {
    format!("<span class=\"swatch m{colour}\" aria-hidden=\"true\"></span>")
}

#[cfg(test)]
mod tests {
    use potstill_datasets::RunModel;

    use crate::Report;
    use crate::example::{report, students_only};

    /// Writes the page to look at: `POTSTILL_REPORT_HTML=/tmp/report.html cargo test`.
    fn keep(report: &Report) -> String {
        let html = report.to_html().unwrap();
        if let Ok(path) = std::env::var("POTSTILL_REPORT_HTML") {
            std::fs::write(path, &html).unwrap();
        }
        html
    }

    #[test]
    fn the_verdict_comes_first_and_every_part_is_there() {
        let html = keep(&report());
        let at = |text: &str| html.find(text).unwrap_or_else(|| panic!("{text}"));
        let order = [
            "Distillation helps here.",
            "Teacher, student and controls",
            "Accuracy, with 95 % intervals",
            "Distance from the teacher, with",
            "Agreement with the teacher, with",
            "Calibration error, with",
            "Accuracy by group",
            "Forward KL in training by step",
            "Cross-entropy in training by step",
            "Calibration, right by confidence",
            "Paired differences",
            "Samples side by side",
            "Time, tokens and bytes by stage",
            "Where the numbers come from",
            "How to get this report again",
            "cargo run --release -- run examples/quickstart.toml",
        ];
        let places: Vec<usize> = order.iter().skip(1).map(|text| at(text)).collect();
        assert!(places.is_sorted(), "{places:?}");
        assert_eq!(html.matches("<svg").count(), 7);
        assert_eq!(html.matches("<article class=\"card sample\">").count(), 30);
    }

    #[test]
    fn nothing_is_loaded() {
        let html = report().to_html().unwrap();
        for loads in [
            "src=",
            "url(",
            "@import",
            "http-equiv=\"refresh\"",
            "fetch(",
            "<iframe",
        ] {
            assert!(!html.contains(loads), "{loads}");
        }
        let links: Vec<&str> = html.split("href=").skip(1).collect();
        assert_eq!(links.len(), 1);
        assert!(links[0].starts_with("\"data:,\""));
        assert!(html.contains("default-src 'none'"));
    }

    #[test]
    fn text_of_a_run_is_never_markup() {
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
            for group in &mut student.accuracy.as_mut().unwrap().groups {
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
        assert_eq!(html.matches("<script>").count(), 1, "the page's own");
        assert_eq!(html.matches("</script>").count(), 1);
        assert_eq!(html.matches("</style>").count(), 1);
        assert!(
            html.matches("&lt;script&gt;alert(1)&lt;/script&gt;")
                .count()
                > 25
        );
    }

    #[test]
    fn what_was_not_measured_has_no_heading() {
        let html = students_only(&[(RunModel::Base, 4.0), (RunModel::STUDENT, 0.5)], 4).to_html();
        let html = html.unwrap();
        assert!(html.contains("Whether distillation helps was not measured"));
        for absent in [
            "Does it know",
            "How training went",
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
    fn a_run_of_text_alone_speaks_of_no_teacher() {
        let mut run = report();
        run.students
            .retain(|s| s.name == RunModel::Base || s.name == RunModel::STUDENT);
        for student in &mut run.students {
            (student.kl, student.agreement) = (None, None);
        }
        run.comparisons
            .retain(|c| c.metric == crate::Figure::Nll && c.right == RunModel::Base);
        run.teacher = None;
        run.conclusion = Report::conclude(None, &run.students, &run.comparisons);
        let html = run.to_html().unwrap();
        assert!(html.contains("there is no distillation to judge"));
        assert!(html.contains("Training brought the student closer to the text: held-out NLL"));
        for absent in [
            "Distance from the teacher,",
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
    fn training_that_broke_is_still_reported() {
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
