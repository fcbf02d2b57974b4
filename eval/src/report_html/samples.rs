//! Samples side by side, and the form that filters them.

use std::fmt::Write;

use potstill_datasets::RunModel;

use super::colour::{colour, swatch};
use super::html::escape;
use crate::report::{Report, Sample, SampleAnswer};
use crate::wording;

/// Writes the section of the samples; nothing if there are none.
pub(super) fn write(out: &mut String, report: &Report) {
    if report.samples.is_empty() {
        return;
    }
    out.push_str("<section aria-labelledby=\"samples\"><h2 id=\"samples\">Samples side by side</h2>\n<p class=\"note\">Answers of the models to test prompts.</p>\n");
    filters(out, &report.samples);
    for sample in &report.samples {
        write_sample(out, sample);
    }
    out.push_str("<p class=\"more\"><button type=\"button\" id=\"more\" hidden>Show more</button></p></section>\n");
}

/// Writes the form of the filters. The script shows the form, which does nothing without the script.
fn filters(out: &mut String, samples: &[Sample]) {
    let mut models: Vec<RunModel> = Vec::new();
    for answer in samples.iter().flat_map(|sample| &sample.answers) {
        if !models.contains(&answer.model) {
            models.push(answer.model);
        }
    }
    out.push_str("<form id=\"filters\" class=\"card filters\" role=\"search\" aria-label=\"Filter the samples\" hidden>\n<label>Model <select name=\"model\"><option value=\"\">all models</option>");
    for model in models {
        let _ = write!(out, "<option value=\"{model}\">{model}</option>");
    }
    out.push_str("</select></label>\n");
    let graded = samples.iter().flat_map(|sample| &sample.answers);
    let hidden = match graded.into_iter().any(|answer| answer.correct.is_some()) {
        true => "",
        false => " hidden",
    };
    let _ = writeln!(
        out,
        "<label{hidden}>Verdict <select name=\"outcome\"><option value=\"\">any</option><option value=\"right\">right</option><option value=\"wrong\">wrong</option><option value=\"differ\">some right, some wrong</option></select></label>"
    );
    out.push_str("<label class=\"search\">Text <input type=\"search\" name=\"text\" autocomplete=\"off\" placeholder=\"in the prompt or an answer\"></label>\n<output id=\"count\" aria-live=\"polite\"></output></form>\n");
}

fn write_sample(out: &mut String, sample: &Sample) {
    let _ = write!(
        out,
        "<article class=\"card sample\"><h3>{}</h3>\n<p class=\"reference\">",
        escape(&sample.prompt)
    );
    if let Some(reference) = &sample.reference {
        let _ = write!(out, "Reference: <strong>{}</strong> · ", escape(reference));
    }
    if let Some(group) = &sample.group {
        let _ = write!(out, "{} · ", escape(group));
    }
    let _ = write!(
        out,
        "prompt <code>{}</code></p>\n<div class=\"answers\">\n",
        escape(&sample.prompt_id)
    );
    for answer in &sample.answers {
        write_answer(out, answer);
    }
    out.push_str("</div></article>\n");
}

fn write_answer(out: &mut String, answer: &SampleAnswer) {
    let (class, mark) = match answer.correct {
        Some(true) => ("right", "✓ "),
        Some(false) => ("wrong", "✗ "),
        None => ("not", ""),
    };
    let model = answer.model;
    let _ = write!(
        out,
        "<div class=\"answer\" data-model=\"{model}\" data-outcome=\"{class}\"><h4><span>{}{model}</span><span class=\"mark {class}\">{mark}{}</span></h4>",
        swatch(colour(model)),
        wording::graded(answer.correct),
    );
    if let Some(reasoning) = answer.reasoning.as_deref().filter(|r| !r.is_empty()) {
        let _ = write!(out, "<pre class=\"reasoning\">{}</pre>", escape(reasoning));
    }
    let text = match answer.answer.is_empty() {
        true => "(empty)",
        false => &answer.answer,
    };
    let _ = write!(out, "<pre>{}</pre>", escape(text));
    if !answer.finished {
        out.push_str("<p class=\"cut\">cut off at the token limit</p>");
    }
    out.push_str("</div>\n");
}
