//! The report as Markdown: the verdict first, then what it rests on.

use std::fmt::Write;

use crate::report::{Comparison, Report, StageFacts};
use crate::{Interval, MIN_PROMPTS, Metric, Verdict};

pub(crate) fn write(report: &Report) -> String {
    let mut out = format!("# {}\n\n", report.run);
    for sentence in &report.verdict {
        line(&mut out, &format!("- {sentence}"));
    }
    students(&mut out, report);
    comparisons(&mut out, &report.comparisons);
    stages(&mut out, &report.stages);
    out.push_str("\n## Provenance\n\n| what | value |\n|---|---|\n");
    for entry in &report.provenance {
        line(
            &mut out,
            &format!("| {} | {} |", cell(&entry.what), cell(&entry.value)),
        );
    }
    out.push_str("\n## Again\n\n```sh\n");
    for command in &report.reproduce {
        line(&mut out, command);
    }
    line(&mut out, "```");
    let _ = write!(out, "\nWritten by Potstill {}.\n", report.potstill);
    out
}

fn students(out: &mut String, report: &Report) {
    let heldout = &report.heldout;
    let _ = write!(
        out,
        "\n## Held-out figures\n\nOver {} sequences of {} prompts, {} tokens; 95 % intervals from a bootstrap over prompts. KL is from the teacher to the student, on the stored support and one bucket for the rest; the teacher's own NLL is {:.4} nats a token.\n\n",
        heldout.sequences, heldout.prompts, heldout.tokens, heldout.teacher_nll
    );
    out.push_str("| model | learned from | steps | KL (nats a token) | NLL (nats a token) | top-1 agreement |\n|---|---|---:|---|---|---|\n");
    for student in &report.students {
        line(
            out,
            &format!(
                "| {} | {} | {} | {} | {} | {} |",
                cell(&student.name),
                cell(&student.learned_from),
                student.steps,
                figure(Metric::Kl, &student.kl),
                figure(Metric::Nll, &student.nll),
                figure(Metric::Agreement, &student.agreement)
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
        "\n## Paired differences\n\nLeft less right over the same sequences. \"Better\" and \"worse\" are about the left one, and are said only when the interval leaves out zero and at least {MIN_PROMPTS} prompts stand behind it.\n\n| comparison | metric | difference | verdict |\n|---|---|---|---|\n"
    );
    for comparison in comparisons {
        let verdict = match comparison.verdict {
            Verdict::Better => "better",
            Verdict::Worse => "worse",
            Verdict::NoDifference => "no difference shown",
        };
        line(
            out,
            &format!(
                "| {} − {} | {} | {} | {verdict} |",
                cell(&comparison.left),
                cell(&comparison.right),
                comparison.metric.name(),
                difference(comparison.metric, &comparison.difference),
            ),
        );
    }
}

fn stages(out: &mut String, stages: &[StageFacts]) {
    out.push_str(
        "\n## Stages\n\n| stage | counts | seconds | bytes published |\n|---|---|---:|---:|\n",
    );
    for stage in stages {
        let counts: Vec<String> = stage
            .counts
            .iter()
            .map(|(name, count)| format!("{} {count}", cell(name)))
            .collect();
        line(
            out,
            &format!(
                "| {} | {} | {:.1} | {} |",
                cell(&stage.name),
                counts.join(", "),
                stage.seconds,
                stage.bytes
            ),
        );
    }
}

fn figure(metric: Metric, value: &Interval) -> String {
    let Interval {
        mean, low, high, ..
    } = value;
    match metric {
        Metric::Kl | Metric::Nll => format!("{mean:.4} [{low:.4}, {high:.4}]"),
        Metric::Agreement => format!(
            "{:.1} % [{:.1}, {:.1}]",
            100.0 * mean,
            100.0 * low,
            100.0 * high
        ),
    }
}

fn difference(metric: Metric, value: &Interval) -> String {
    let Interval {
        mean, low, high, ..
    } = value;
    match metric {
        Metric::Kl | Metric::Nll => format!("{mean:+.4} [{low:+.4}, {high:+.4}]"),
        Metric::Agreement => format!(
            "{:+.1} points [{:+.1}, {:+.1}]",
            100.0 * mean,
            100.0 * low,
            100.0 * high
        ),
    }
}

/// Text inside a table's cell: a bar or a line break would end it.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

fn line(out: &mut String, text: &str) {
    out.push_str(text);
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use potstill_datasets::SequenceValues;

    use super::*;
    use crate::interval;
    use crate::report::{Heldout, Provenance, StudentResult, compare};

    fn values(kl: f64, prompts: usize) -> Vec<SequenceValues> {
        (0..prompts)
            .map(|i| SequenceValues {
                prompt_id: format!("p{i}"),
                sample_index: 0,
                tokens: 10 + i as u32,
                kl_nats: kl * (10 + i) as f64 * (1.0 + 0.02 * (i % 3) as f64),
                nll_nats: (kl + 1.0) * (10 + i) as f64,
                agree: 5,
                teacher_nll_nats: (10 + i) as f64,
                bin_tokens: vec![0; 10],
                bin_confidence: vec![0.0; 10],
                bin_correct: vec![0; 10],
            })
            .collect()
    }

    fn report(kls: &[(&str, f64)], prompts: usize) -> Report {
        let all: Vec<(&str, Vec<SequenceValues>)> = kls
            .iter()
            .map(|(name, kl)| (*name, values(*kl, prompts)))
            .collect();
        let students: Vec<StudentResult> = all
            .iter()
            .map(|(name, values)| StudentResult {
                name: (*name).to_owned(),
                learned_from: "a|b".to_owned(),
                steps: 40,
                kl: interval(values, Metric::Kl, 200, 1).unwrap(),
                nll: interval(values, Metric::Nll, 200, 1).unwrap(),
                agreement: interval(values, Metric::Agreement, 200, 1).unwrap(),
            })
            .collect();
        let of = |name: &str| {
            all.iter()
                .find(|(n, _)| *n == name)
                .map(|(n, v)| (*n, v.as_slice()))
        };
        let comparisons: Vec<Comparison> = [
            ("student", "untrained"),
            ("student", "sft"),
            ("sft", "shuffled"),
        ]
        .into_iter()
        .filter_map(|(l, r)| Some(compare(of(l)?, of(r)?, 200, 1).unwrap()))
        .flatten()
        .collect();
        Report {
            run: "tiny".to_owned(),
            potstill: "0.1.0".to_owned(),
            verdict: Report::conclude(&students, &comparisons),
            heldout: Heldout::from_values(&all[0].1).unwrap(),
            students,
            comparisons,
            stages: vec![StageFacts {
                name: "collect".to_owned(),
                counts: vec![("asked".to_owned(), 48), ("kept".to_owned(), 40)],
                seconds: 12.345,
                bytes: 4096,
            }],
            provenance: vec![Provenance {
                what: "teacher".to_owned(),
                value: "stories260K".to_owned(),
            }],
            reproduce: vec!["potstill run tiny.toml".to_owned()],
        }
    }

    #[test]
    fn a_run_that_worked() {
        let report = report(
            &[
                ("untrained", 4.0),
                ("student", 0.5),
                ("sft", 0.8),
                ("shuffled", 2.0),
            ],
            12,
        );
        insta::assert_snapshot!(report.to_markdown());
        let back: Report = serde_json::from_str(&report.to_json()).unwrap();
        assert_eq!(
            (&back.verdict, &back.stages),
            (&report.verdict, &report.stages)
        );
    }

    #[test]
    fn a_run_that_cannot_be_believed() {
        let bad = report(
            &[
                ("untrained", 4.0),
                ("student", 4.5),
                ("sft", 2.0),
                ("shuffled", 2.0),
            ],
            12,
        );
        insta::assert_snapshot!(bad.verdict.join("\n"));
        let small = report(&[("untrained", 4.0), ("student", 0.5)], 4);
        insta::assert_snapshot!(small.verdict.join("\n"));
    }
}
