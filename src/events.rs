//! What happens in a run: for people a line on stderr, with `--json` a line of JSON on
//! stdout. `docs/events.md` is made from the comments here.

use std::path::Path;
use std::time::SystemTime;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use crate::progress::duration;
use crate::run_dir::Counts;
use crate::stages::said;

/// Something that happens in a run.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A stage begins to work.
    Started {
        /// The stage, such as `collect` or `train student`.
        stage: String,
    },
    /// How far a stage is; at most once a second.
    Progress {
        /// The stage.
        stage: String,
        /// Parts that are done, those of earlier processes included.
        done: u64,
        /// Parts in all.
        total: u64,
        /// What a part is, such as `answers` or `steps`.
        unit: String,
        /// Tokens since this process began the work; 0 where they are not counted.
        tokens: u64,
        /// Seconds since this process began the work.
        seconds: f64,
        /// What else there is to say, such as the loss.
        #[serde(skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    },
    /// A stage did its work, and published it.
    Finished {
        /// The stage.
        stage: String,
        /// What it made, such as `answers`.
        counts: Counts,
        /// How long it took in this process.
        seconds: f64,
    },
    /// A stage had nothing to do.
    UpToDate {
        /// The stage.
        stage: String,
        /// What it had made.
        counts: Counts,
    },
    /// A stage would work, were this not a dry run.
    WouldRun {
        /// The stage.
        stage: String,
    },
    /// A stage was asked to stop, and did; what it had done is kept.
    Stopped {
        /// The stage.
        stage: String,
    },
    /// Earlier output of a stage was moved, not deleted.
    Kept {
        /// The stage.
        stage: String,
        /// Where the earlier output is now.
        path: String,
    },
    /// A sentence of the report's verdict.
    Verdict {
        /// The sentence.
        text: String,
    },
    /// What the command would put on stdout without `--json`, such as the plan of `check`.
    Output {
        /// The text, of one or more lines.
        text: String,
    },
    /// Something worth knowing.
    Note {
        /// A sentence for people.
        text: String,
    },
    /// Something that may not be what was wanted.
    Warning {
        /// A sentence for people.
        text: String,
    },
    /// Why the command fails.
    Error {
        /// A message for people: what, where, and the way out.
        text: String,
    },
    /// The command is over. Always the last line.
    Ended {
        /// `done`, `up_to_date`, `would_run`, `stopped` or `failed`.
        outcome: String,
        /// 0 done, 1 failed or incomplete, 2 usage or configuration.
        exit_code: u8,
        /// After a stop: the command that goes on.
        #[serde(skip_serializing_if = "Option::is_none")]
        again: Option<String>,
    },
}

impl Event {
    /// A stage begins to work.
    pub(crate) fn started(stage: &str) -> Event {
        let stage = stage.to_owned();
        Event::Started { stage }
    }

    /// A stage had nothing to do.
    pub(crate) fn up_to_date(stage: &str, counts: Counts) -> Event {
        let stage = stage.to_owned();
        Event::UpToDate { stage, counts }
    }

    /// A stage would work.
    pub(crate) fn would_run(stage: &str) -> Event {
        let stage = stage.to_owned();
        Event::WouldRun { stage }
    }

    /// A stage was asked to stop, and did.
    pub(crate) fn stopped(stage: &str) -> Event {
        let stage = stage.to_owned();
        Event::Stopped { stage }
    }

    /// A stage did its work.
    pub(crate) fn finished(stage: &str, counts: Counts, seconds: f64) -> Event {
        Event::Finished {
            stage: stage.to_owned(),
            counts,
            seconds,
        }
    }

    /// Earlier output of a stage was moved to `path`.
    pub(crate) fn kept(stage: &str, path: &Path) -> Event {
        Event::Kept {
            stage: stage.to_owned(),
            path: path.display().to_string(),
        }
    }

    /// The line for people, where there is one.
    pub(crate) fn line(&self) -> Option<String> {
        Some(match self {
            Event::Finished {
                stage,
                counts,
                seconds,
            } => format!("{stage}: {}, in {}", said(counts), duration(*seconds)),
            Event::UpToDate { stage, counts } => format!("{stage}: up to date ({})", said(counts)),
            Event::WouldRun { stage } => format!("{stage}: would run"),
            Event::Kept { stage, path } => {
                format!("{stage}: what was there before is kept as {path}")
            }
            Event::Verdict { text } | Event::Output { text } | Event::Note { text } => text.clone(),
            Event::Warning { text } => format!("warning: {text}"),
            Event::Error { text } => format!("error: {text}"),
            Event::Ended {
                again: Some(again), ..
            } => format!("stopped; what is done is kept, and `{again}` goes on"),
            Event::Started { .. }
            | Event::Progress { .. }
            | Event::Stopped { .. }
            | Event::Ended { again: None, .. } => return None,
        })
    }

    /// The line of JSON.
    pub(crate) fn json(&self) -> String {
        let mut fields = serde_json::to_value(self).unwrap_or_else(|e| {
            // Only numbers that JSON cannot hold come to this.
            json!({ "event": "error", "text": format!("an event cannot be written: {e}") })
        });
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let seconds = now.map(|now| now.as_secs_f64()).unwrap_or_default();
        fields["unix_seconds"] = Value::from((seconds * 1e3).round() / 1e3);
        fields.to_string()
    }

    /// Whether `--quiet` lets it through.
    pub(crate) fn is_error(&self) -> bool {
        matches!(self, Event::Error { .. })
    }

    /// Whether it is what stdout is for.
    pub(crate) fn is_data(&self) -> bool {
        matches!(self, Event::Verdict { .. } | Event::Output { .. })
    }
}
