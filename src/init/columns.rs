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
    /// Columns that look like answers and are not read.
    pub(super) ignored: Vec<String>,
}

/// Detects the layout of a file from its first rows.
pub(super) fn detect(path: &Path) -> anyhow::Result<Detected> {
    let found = detect_columns(path).map_err(|e| refusal(e.to_string()))?;
    Ok(Detected {
        columns: toml(&found.columns),
        shape: found.name,
        has_answers: found.has_answers,
        ignored: found.ignored,
    })
}

fn toml(columns: &Columns) -> String {
    let pairs = [
        ("text", &columns.text),
        ("question", &columns.question),
        ("answer", &columns.answer),
        ("messages", &columns.messages),
        ("instruction", &columns.instruction),
        ("input", &columns.input),
        ("output", &columns.output),
    ];
    let pairs = pairs
        .iter()
        .filter_map(|(key, name)| Some(format!("{key} = {}", quoted(name.as_ref()?))));
    format!("{{ {} }}", pairs.collect::<Vec<_>>().join(", "))
}
