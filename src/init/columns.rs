//! Which columns of the data hold the prompt, from its first rows.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Map, Value};

use super::{quoted, refusal};

/// Rows that are looked at.
const ROWS: usize = 20;

/// What the data looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Detected {
    /// `columns` of `[import]`, as TOML.
    pub(super) columns: String,
    /// What this shape of data is called.
    pub(super) name: &'static str,
    /// Whether it has answers.
    pub(super) has_answers: bool,
}

/// Looks at the first rows of a JSONL file.
pub(super) fn detect(path: &Path) -> anyhow::Result<Detected> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut rows: Vec<Map<String, Value>> = Vec::new();
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let line = line.with_context(|| format!("cannot read {}", path.display()))?;
        let line = line.trim_start_matches('\u{feff}');
        if line.trim().is_empty() {
            continue;
        }
        rows.push(serde_json::from_str(line).map_err(|e| {
            refusal(format!(
                "{}:{} is not a JSON object ({e}): the data must have one on each line",
                path.display(),
                index + 1
            ))
        })?);
        if rows.len() == ROWS {
            break;
        }
    }
    let Some(first) = rows.first() else {
        return Err(refusal(format!("{} has no rows", path.display())));
    };
    shape(&rows).ok_or_else(|| {
        let columns: Vec<&str> = first.keys().map(String::as_str).collect();
        refusal(format!(
            "{} has the columns {}, and none of them is known to hold a prompt: rename one to `text`, `question` or `messages`, or copy an example's run file and set `columns` in [import]",
            path.display(),
            columns.join(", ")
        ))
    })
}

fn shape(rows: &[Map<String, Value>]) -> Option<Detected> {
    let all = |name: &str, fits: fn(&Value) -> bool| {
        rows.iter().all(|row| row.get(name).is_some_and(fits))
    };
    let text = |name: &str| all(name, Value::is_string);
    let first_of = |names: &[&'static str]| names.iter().copied().find(|name| text(name));
    let list = rows.first()?.iter().find(|(_, value)| is_turns(value));
    if let Some((name, turns)) = list {
        let from = turns[0].get("from").is_some();
        let last = &turns.as_array()?.last()?[if from { "from" } else { "role" }];
        return Some(Detected {
            columns: format!("{{ messages = {} }}", quoted(name)),
            name: if from { "sharegpt" } else { "messages" },
            has_answers: ["assistant", "gpt"].iter().any(|role| last == role),
        });
    }
    if text("instruction") {
        let extra = ["input", "output"].into_iter().filter(|name| text(name));
        let pairs = std::iter::once("instruction").chain(extra);
        let pairs: Vec<String> = pairs.map(|name| format!("{name} = \"{name}\"")).collect();
        return Some(Detected {
            columns: format!("{{ {} }}", pairs.join(", ")),
            name: "alpaca",
            has_answers: text("output"),
        });
    }
    let question = first_of(&["question", "query", "problem"]);
    let answer = ["answer", "response", "solution"];
    let answer = answer
        .into_iter()
        .find(|name| all(name, |v| v.is_string() || v.is_number()));
    if let Some(question) = question {
        let answer_pair = answer.map(|name| format!(", answer = \"{name}\""));
        return Some(Detected {
            columns: format!(
                "{{ question = \"{question}\"{} }}",
                answer_pair.unwrap_or_default()
            ),
            name: "question and answer",
            has_answers: answer.is_some(),
        });
    }
    let name = first_of(&["text", "prompt", "content"])?;
    Some(Detected {
        columns: format!("{{ text = \"{name}\" }}"),
        name: "text",
        has_answers: false,
    })
}

/// Whether it is a conversation: a list of objects that say who speaks.
fn is_turns(value: &Value) -> bool {
    let turn = |turn: &Value| {
        turn.get("role").is_some_and(Value::is_string)
            || turn.get("from").is_some_and(Value::is_string)
    };
    let turns = value.as_array();
    turns.is_some_and(|turns| !turns.is_empty() && turns.iter().all(turn))
}
