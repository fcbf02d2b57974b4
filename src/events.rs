//! Events of a run. Each is a line of text on stderr and, with `--json`, a line of JSON on stdout.
//! `docs/events.md` is generated from the comments in this file.

use std::time::SystemTime;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use crate::run_dir::Counts;
use crate::schema::{description, kind, meaning, properties, requires, schema_of};

const PAGE_INTRO: &str = "# Events

With `--json` a command prints one JSON object a line on stdout for each event. The field `event` names the event, and `unix_seconds` is its time. Text for people stays on stderr; `--quiet` removes all of it except errors. Control characters and marks that change the direction of text are written as `\\u` escapes. New events and fields may be added, so skip those that you do not know.

Without `--json`, stdout carries data alone: what a command was asked for, such as the plan of `check`, and the conclusion of the report, which `--quiet` leaves out.

This page is generated from the doc comments in `src/events.rs`: `POTSTILL_UPDATE=1 cargo test --release --workspace --test cli -- docs` writes it again.
";

/// An event of a run.
// An event exists for the moment in which it is printed, so a difference in size between variants costs nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A stage starts to work.
    Started {
        /// The stage, such as `collect` or `train student`.
        stage: String,
    },
    /// Progress of a stage; at most one event a second.
    Progress {
        /// The stage.
        stage: String,
        /// Number of parts that are done, including those of earlier processes.
        done: u64,
        /// Number of all parts.
        total: u64,
        /// Unit of the parts, such as `answers` or `steps`.
        unit: String,
        /// Number of tokens since this process started the work; 0 where tokens are not counted.
        tokens: u64,
        /// Seconds since this process started the work.
        seconds: f64,
        /// Further information, such as the loss.
        #[serde(skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    },
    /// A stage finished its work and published its output.
    Finished {
        /// The stage.
        stage: String,
        /// Counts of the output, such as `answers`.
        counts: Counts,
        /// Seconds that the stage took in this process.
        seconds: f64,
    },
    /// A stage had nothing to do: its output is up to date.
    UpToDate {
        /// The stage.
        stage: String,
        /// Counts of the output.
        counts: Counts,
    },
    /// A stage would run if this were not a dry run.
    WouldRun {
        /// The stage.
        stage: String,
        /// A stage that would run before it and write what it reads, so that its settings and inputs are not known yet.
        #[serde(skip_serializing_if = "Option::is_none")]
        because: Option<String>,
        /// The step at which an interrupted training would go on.
        #[serde(skip_serializing_if = "Option::is_none")]
        from_step: Option<u64>,
    },
    /// The output of a stage would be taken back from `earlier/` if this were not a dry run.
    WouldRestore {
        /// The stage.
        stage: String,
        /// Present path of the output.
        path: String,
    },
    /// Output of a stage would be moved to `earlier/` if this were not a dry run.
    WouldKeep {
        /// The stage.
        stage: String,
        /// New path of the output.
        path: String,
    },
    /// The output of a stage was taken back from `earlier/`, because its settings and inputs are those of now.
    Restored {
        /// The stage.
        stage: String,
        /// Path that the output had.
        path: String,
    },
    /// A stage stopped on request. Its finished work is kept.
    Stopped {
        /// The stage.
        stage: String,
    },
    /// Earlier output of a stage was moved to `earlier/`.
    Kept {
        /// The stage.
        stage: String,
        /// New path of the earlier output.
        path: String,
    },
    /// Output in `earlier/`, or unfinished work, that `clean` lists or deletes.
    EarlierOutput {
        /// The stage that wrote it.
        stage: String,
        /// Its folder.
        path: String,
        /// Whether it is a finished output, which a stage takes back when its settings are those of the output again.
        finished: bool,
        /// Size in bytes.
        bytes: u64,
        /// Time of its newest change.
        changed_unix_seconds: u64,
        /// The first setting or input by which it differs from the output at its place.
        difference: String,
        /// Whether it was deleted.
        deleted: bool,
    },
    /// A sentence of the report's conclusion.
    Verdict {
        /// The sentence.
        text: String,
    },
    /// The figures that `plan` prints: what a run will take on this device.
    Plan {
        /// Numbers of the student's weights, without those of adapters.
        parameters: u64,
        /// Numbers that are trained.
        trained_parameters: u64,
        /// Bytes of each part of the training's memory at its peak: `weights`, `masters`, `gradients`, `moments`,
        /// `activations`, `logits`, `loader` and `program`.
        memory: Counts,
        /// Sum of the parts, bytes.
        memory_bytes: u64,
        /// Memory that there is, bytes.
        #[serde(skip_serializing_if = "Option::is_none")]
        available_bytes: Option<u64>,
        /// Whether the training fits into the memory.
        fits: bool,
        /// Largest memory of the process while the calibration trained, bytes.
        #[serde(skip_serializing_if = "Option::is_none")]
        calibration_bytes: Option<u64>,
        /// Changes of `[train]`, to be made one after the other until the training fits, as in the run file; empty if it
        /// fits.
        advice: Vec<String>,
        /// Memory after each of these changes, bytes.
        advice_bytes: Vec<u64>,
        /// Number of training sequences.
        sequences: u64,
        /// Mean number of tokens of a sequence.
        tokens_per_sequence: f64,
        /// Optimizer steps of a training.
        steps: u64,
        /// Number of trainings: the student, its controls, seeds and learning rates.
        trainings: u64,
        /// Tokens of all trainings.
        tokens: f64,
        /// Seconds of an optimizer step.
        #[serde(skip_serializing_if = "Option::is_none")]
        step_seconds: Option<f64>,
        /// Tokens that are trained in a second.
        #[serde(skip_serializing_if = "Option::is_none")]
        tokens_per_second: Option<f64>,
        /// Operations of the model for a token: six for each weight that it is multiplied by (four if the weight is frozen),
        /// and those of attention; layers that are computed again count once.
        flops_per_token: f64,
        /// Model FLOP utilisation of a GPU whose peak is known.
        #[serde(skip_serializing_if = "Option::is_none")]
        mfu: Option<f64>,
        /// Hours of all trainings.
        #[serde(skip_serializing_if = "Option::is_none")]
        train_hours: Option<f64>,
        /// Hours of collecting answers from a local teacher.
        #[serde(skip_serializing_if = "Option::is_none")]
        collect_hours: Option<f64>,
        /// Hours of all devices for all trainings.
        #[serde(skip_serializing_if = "Option::is_none")]
        device_hours: Option<f64>,
        /// Cost of all trainings, USD.
        #[serde(skip_serializing_if = "Option::is_none")]
        usd: Option<f64>,
        /// Cost of a million tokens, USD.
        #[serde(skip_serializing_if = "Option::is_none")]
        usd_per_million_tokens: Option<f64>,
    },
    /// Text that the command prints on stdout without `--json`, such as the plan of `check`.
    Output {
        /// The text, of one or more lines.
        text: String,
    },
    /// A remark.
    Note {
        /// A sentence for people.
        text: String,
    },
    /// A warning: the run goes on, but its result may not be the intended one.
    Warning {
        /// A sentence for people.
        text: String,
    },
    /// The error with which the command fails.
    Error {
        /// A message for people: what is wrong, where, and on further lines a `hint: ` with the remedy.
        text: String,
    },
    /// The command ended. This is always the last event.
    Ended {
        /// `done`, `up_to_date`, `would_run`, `stopped` or `failed`.
        outcome: String,
        /// Exit code: 0 done, 1 failed or incomplete, 2 usage or configuration.
        exit_code: u8,
        /// The command that resumes, after a stop.
        #[serde(skip_serializing_if = "Option::is_none")]
        again: Option<String>,
    },
}

impl Event {
    pub(crate) fn started(stage: &str) -> Event {
        let stage = stage.to_owned();
        Event::Started { stage }
    }

    pub(crate) fn up_to_date(stage: &str, counts: Counts) -> Event {
        let stage = stage.to_owned();
        Event::UpToDate { stage, counts }
    }

    pub(crate) fn stopped(stage: &str) -> Event {
        let stage = stage.to_owned();
        Event::Stopped { stage }
    }

    pub(crate) fn finished(stage: &str, counts: Counts, seconds: f64) -> Event {
        Event::Finished {
            stage: stage.to_owned(),
            counts,
            seconds,
        }
    }

    /// The text for people; `None` for an event that is only for programs.
    pub(crate) fn text(&self) -> Option<String> {
        Some(match self {
            Event::Finished {
                stage,
                counts,
                seconds,
            } => {
                let (counts, time) = (describe_counts(counts), duration(*seconds));
                format!("{stage}: {counts}, in {time}")
            }
            Event::UpToDate { stage, counts } => {
                format!("{stage}: up to date ({})", describe_counts(counts))
            }
            Event::WouldRun {
                stage,
                because,
                from_step,
            } => {
                let because = because.as_ref().map(|b| format!(" because `{b}` runs"));
                let from = from_step.map(|step| format!(" from step {step} on"));
                let (because, from) = (because.unwrap_or_default(), from.unwrap_or_default());
                format!("{stage}: would run{because}{from}")
            }
            Event::WouldRestore { stage, path } => format!("{stage}: would be taken from {path}"),
            Event::WouldKeep { stage, path } => {
                format!("{stage}: the present output would be kept as {path}")
            }
            Event::Restored { stage, path } => format!("{stage}: taken from {path}"),
            Event::Kept { stage, path } => format!("{stage}: the earlier output is kept as {path}"),
            Event::Verdict { text } | Event::Output { text } | Event::Note { text } => text.clone(),
            Event::Warning { text } => format!("warning: {text}"),
            Event::Error { text } => format!("error: {text}"),
            Event::Ended {
                again: Some(again), ..
            } => format!("stopped; finished work is kept\nhint: `{again}` resumes"),
            Event::EarlierOutput { .. }
            | Event::Plan { .. }
            | Event::Started { .. }
            | Event::Progress { .. }
            | Event::Stopped { .. }
            | Event::Ended { again: None, .. } => return None,
        })
    }

    /// The line of JSON, with the current time.
    pub(crate) fn json(&self) -> String {
        let mut fields = serde_json::to_value(self).unwrap_or_else(|e| {
            // This happens only for numbers that JSON cannot represent.
            json!({ "event": "error", "text": format!("cannot write an event as JSON: {e}") })
        });
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let seconds = now.map(|now| now.as_secs_f64()).unwrap_or_default();
        fields["unix_seconds"] = Value::from((seconds * 1e3).round() / 1e3);
        fields.to_string()
    }

    /// Whether the text belongs on stdout.
    pub(crate) fn is_data(&self) -> bool {
        matches!(self, Event::Verdict { .. } | Event::Output { .. })
    }
}

/// The page `docs/events.md`.
pub fn page() -> String {
    let schema = schema_of::<Event>();
    let mut page = PAGE_INTRO.to_owned();
    for event in schema["oneOf"].as_array().into_iter().flatten() {
        let name = event["properties"]["event"]["const"].as_str();
        let name = name.unwrap_or_default();
        page += &format!("\n## `{name}`\n\n{}\n", description(event));
        let fields: Vec<_> = properties(event)
            .filter(|(name, _)| *name != "event")
            .collect();
        if fields.is_empty() {
            continue;
        }
        page += "\n| field | type | meaning |\n|---|---|---|\n";
        for (name, field) in fields {
            let absent = match requires(event, name) {
                true => "",
                false => " Absent if there is none.",
            };
            page += &format!(
                "| `{name}` | {} | {}{absent} |\n",
                kind(field),
                meaning(field)
            );
        }
    }
    page
}

/// Describes counts in words, without those that are 0.
fn describe_counts(counts: &Counts) -> String {
    let counts = counts.iter().filter(|(_, n)| **n > 0);
    let counts: Vec<String> = counts.map(|(name, n)| format!("{n} {name}")).collect();
    counts.join(", ")
}

/// Describes a duration in the units that a person would choose.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 if seconds < 9.95 => format!("{seconds:.1} s"),
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::{duration, page};

    /// A field without a comment would be an empty cell in `docs/events.md`.
    #[test]
    fn every_field_is_documented() {
        let page = page();
        let undocumented = page.lines().find(|line| line.ends_with("|  |"));
        assert_eq!(undocumented, None);
    }

    #[test]
    fn durations_have_readable_units() {
        let durations = [0.04, 9.94, 9.96, 59.6, 61.0, 7322.0].map(duration);
        assert_eq!(
            durations,
            [
                "0.0 s",
                "9.9 s",
                "10 s",
                "1 min 0 s",
                "1 min 1 s",
                "2 h 2 min"
            ]
        );
    }
}
