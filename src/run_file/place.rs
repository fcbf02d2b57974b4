//! Where in the run file something is wrong, and how that is said.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::schema;

/// The run file, the flags, or what they name cannot be used as they are. Exit code 2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(String);

impl ConfigError {
    /// A sentence that points nowhere.
    pub fn plain(message: String) -> Self {
        ConfigError(message)
    }

    pub(crate) fn new(path: &Path, text: &str, problems: Vec<Problem>) -> Self {
        let said: Vec<String> = problems.iter().map(|p| p.show(path, text)).collect();
        ConfigError(said.join("\n"))
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// One thing that is wrong, with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    span: Option<Range<usize>>,
    message: String,
}

impl Problem {
    /// Points at the value of a key, or at the innermost table around it that is there.
    pub(crate) fn at_key(text: &str, key: &[&str], message: String) -> Self {
        Problem {
            span: span_of(text, key),
            message: format!("{}: {message}", key_name(key)),
        }
    }

    pub(crate) fn from_toml(text: &str, error: &toml::de::Error) -> Self {
        let message = error
            .message()
            .trim_end()
            .replace('\n', ", ")
            .replace("unknown field", "unknown key")
            .replace("missing field", "missing key")
            .replace("expected f64", "expected a number");
        let span = error.span();
        let key = span
            .clone()
            .map(|s| key_around(text, s))
            .unwrap_or_default();
        let key: Vec<&str> = key.iter().map(String::as_str).collect();
        // Where a whole table is missing, the span is the start of the file.
        let whole_file = span.as_ref().is_none_or(|s| s.start == 0);
        let message = match message.strip_prefix("missing key ") {
            Some(table) if whole_file => format!("the table {table} is missing"),
            Some(_) => format!("{}: {message}, which has no default", key_name(&key)),
            None if key.is_empty() || message.starts_with("unknown key") => suggest(&message),
            None => format!("{}: {}", key_name(&key), suggest(&message)),
        };
        Problem { span, message }
    }

    /// Formats the problem: position and message, the line of the run file, then the hint.
    fn show(&self, path: &Path, text: &str) -> String {
        let (message, hint) = match self.message.split_once("\nhint: ") {
            Some((message, hint)) => (message, format!("\nhint: {hint}")),
            None => (self.message.as_str(), String::new()),
        };
        let Some(span) = &self.span else {
            return format!("{}: {}", path.display(), self.message);
        };
        let start = floor_boundary(text, span.start);
        let line_start = text[..start].rfind('\n').map_or(0, |i| i + 1);
        let line = text[line_start..].lines().next().unwrap_or("");
        let number = text[..line_start].matches('\n').count() + 1;
        let column = text[line_start..start].chars().count() + 1;
        let end = floor_boundary(
            text,
            span.end
                .clamp(start, line_start + line.len().max(start - line_start)),
        );
        let width = text[start..end].chars().count().max(1);
        let gutter = number.to_string();
        format!(
            "{}:{number}:{column}: {message}\n  {gutter} | {line}\n  {} | {}{}{hint}",
            path.display(),
            " ".repeat(gutter.len()),
            " ".repeat(column - 1),
            "^".repeat(width)
        )
    }
}

/// ``unknown key `step`, expected `steps` or `batch` `` with the likeliest of those that are
/// expected, or with the table that has such a key.
fn suggest(message: &str) -> String {
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let [written, expected @ ..] = names.as_slice() else {
        return message.to_owned();
    };
    let likely = expected
        .iter()
        .map(|name| (edits(written, name), *name))
        .filter(|(edits, name)| *edits <= 1 + name.chars().count() / 4)
        .min_by_key(|(edits, _)| *edits);
    let (Some((what, rest)), true) = (
        message.split_once(", expected "),
        message.starts_with("unknown "),
    ) else {
        return message.to_owned();
    };
    if let Some((_, name)) = likely {
        return format!("{what}: did you mean `{name}`? Expected {rest}");
    }
    match schema::table_of(written) {
        Some(table) => format!("{what}: it belongs into [{table}]. Expected here {rest}"),
        None => message.to_owned(),
    }
}

/// Insertions, deletions, substitutions and swaps of neighbours from one name to the other, without
/// regard to case (the optimal string alignment distance).
fn edits(from: &str, to: &str) -> usize {
    let letters = |name: &str| name.to_lowercase().chars().collect::<Vec<char>>();
    let (from, to) = (letters(from), letters(to));
    let mut rows: Vec<Vec<usize>> = vec![(0..=to.len()).collect()];
    for i in 1..=from.len() {
        let mut row = vec![i];
        for j in 1..=to.len() {
            let substituted = rows[i - 1][j - 1] + usize::from(from[i - 1] != to[j - 1]);
            let mut least = substituted.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[from.len()][to.len()]
}

fn floor_boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len()))
        .rev()
        .find(|i| text.is_char_boundary(*i))
        .unwrap_or(0)
}

/// `["train", "steps"]` → `` `steps` in [train] ``
fn key_name(key: &[&str]) -> String {
    match key {
        [] => "the run file".to_owned(),
        [table] => format!("[{table}]"),
        [table, rest @ ..] => format!("`{}` in [{table}]", rest.join(".")),
    }
}

fn span_of(text: &str, key: &[&str]) -> Option<Range<usize>> {
    let root = DeTable::parse(text).ok()?;
    let mut table = root.get_ref();
    let mut span = None;
    for part in key {
        let Some((name, value)) = table.iter().find(|(name, _)| name.get_ref() == part) else {
            break;
        };
        span = Some(match value.get_ref() {
            DeValue::Table(_) => name.span(),
            _ => value.span(),
        });
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    span
}

/// Whether the text of the run file has a key, as opposed to its default.
pub(super) fn is_written(text: &str, table: &str, key: &str) -> bool {
    let Ok(root) = DeTable::parse(text) else {
        return false;
    };
    let found = root
        .get_ref()
        .iter()
        .find(|(name, _)| name.get_ref() == table);
    match found.map(|(_, value)| value.get_ref()) {
        Some(DeValue::Table(keys)) => keys.iter().any(|(name, _)| name.get_ref() == key),
        _ => false,
    }
}

/// The key path whose value holds `span`.
fn key_around(text: &str, span: Range<usize>) -> Vec<String> {
    let mut path = Vec::new();
    if let Ok(root) = DeTable::parse(text) {
        descend(root.get_ref(), &span, &mut path);
    }
    path
}

fn descend(table: &DeTable<'_>, span: &Range<usize>, path: &mut Vec<String>) {
    for (name, value) in table.iter() {
        if !holds(value, span) && name.span() != *span {
            continue;
        }
        path.push(name.get_ref().to_string());
        if let DeValue::Table(inner) = value.get_ref() {
            descend(inner, span, path);
        }
        return;
    }
}

/// A `[table]`'s own span is its header only, so its values are asked as well.
fn holds(value: &Spanned<DeValue<'_>>, span: &Range<usize>) -> bool {
    let own = value.span();
    let inside = own.start <= span.start && span.end <= own.end;
    inside
        || match value.get_ref() {
            DeValue::Table(inner) => inner
                .iter()
                .any(|(name, value)| name.span() == *span || holds(value, span)),
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use super::{edits, suggest};

    #[test]
    fn edits_are_counted() {
        let pairs = [
            ("steps", "steps", 0),
            ("step", "steps", 1),
            ("tpo_k", "top_k", 1),
            ("Batch", "batch", 0),
            ("kitten", "sitting", 3),
            ("", "abc", 3),
        ];
        for (from, to, expected) in pairs {
            assert_eq!(edits(from, to), expected, "{from} → {to}");
            assert_eq!(edits(to, from), expected, "{to} → {from}");
        }
    }

    #[test]
    fn only_a_likely_name_is_suggested() {
        let message = "unknown key `leraning_rate`, expected one of `steps`, `learning_rate`";
        assert_eq!(
            suggest(message),
            "unknown key `leraning_rate`: did you mean `learning_rate`? Expected one of `steps`, `learning_rate`"
        );
        assert_eq!(
            suggest("unknown key `temperature`, expected one of `steps`, `batch`"),
            "unknown key `temperature`: it belongs into [collect]. Expected here one of `steps`, `batch`"
        );
        for message in [
            "unknown key `dropout`, expected one of `steps`, `learning_rate`",
            "unknown key `x`, there are no keys",
            "invalid type: string \"`a`\", expected `b`",
        ] {
            assert_eq!(suggest(message), message);
        }
    }
}
