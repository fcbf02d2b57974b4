//! Which columns of the data hold the prompt, from its first rows.

use std::path::Path;

use potstill_datasets::{Columns, detect_columns};

use super::{quoted, refusal};

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

/// Looks at the first rows of a file.
pub(super) fn detect(path: &Path) -> anyhow::Result<Detected> {
    let found = detect_columns(path).map_err(|e| refusal(e.to_string()))?;
    Ok(Detected {
        columns: toml(&found.columns),
        name: found.name,
        has_answers: found.has_answers,
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
