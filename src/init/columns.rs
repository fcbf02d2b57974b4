//! Detects from the first rows of the data which columns hold the prompt.

use std::path::Path;

use potstill_datasets::{Columns, detect_columns};

use super::{quoted, refusal};

/// The layout of a data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Detected {
    /// Value of `columns` in `[import]`, as TOML.
    pub(super) columns: String,
    /// Name of this layout, such as `question and answer`.
    pub(super) shape: &'static str,
    /// Whether the data has answers.
    pub(super) has_answers: bool,
}

/// Detects the layout of a file from its first rows.
pub(super) fn detect(path: &Path) -> anyhow::Result<Detected> {
    let found = detect_columns(path).map_err(|e| refusal(e.to_string()))?;
    Ok(Detected {
        columns: toml(&found.columns),
        shape: found.name,
        has_answers: found.has_answers,
    })
}

fn toml(columns: &Columns) -> String {
    let mut pairs = Vec::new();
    let mut pair = |key: &str, name: Option<&String>| {
        pairs.extend(name.map(|name| format!("{key} = {}", quoted(name))));
    };
    match columns {
        Columns::Text(text) => pair("text", Some(text)),
        Columns::QuestionAnswer {
            question, answer, ..
        } => {
            pair("question", Some(question));
            pair("answer", answer.as_ref());
        }
        Columns::Messages(messages) => pair("messages", Some(messages)),
        Columns::Instruction {
            instruction,
            input,
            output,
        } => {
            pair("instruction", Some(instruction));
            pair("input", input.as_ref());
            pair("output", output.as_ref());
        }
    }
    format!("{{ {} }}", pairs.join(", "))
}
