//! Problems of the run file: their places in its text, and their messages.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::schema;

/// An error in the run file, in the flags, or in the files that these name. Exit code 2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(String);

impl ConfigError {
    /// An error without a place in the run file.
    pub fn plain(message: String) -> Self {
        ConfigError(message)
    }

    pub(crate) fn new(path: &Path, text: &str, problems: Vec<Problem>) -> Self {
        let problems: Vec<String> = problems.iter().map(|p| p.show(path, text)).collect();
        ConfigError(problems.join("\n"))
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// A problem of the run file, with its place. The message is what is wrong, then perhaps a line `hint: what to do`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    span: Option<Range<usize>>,
    message: String,
    /// Whether the value may be a secret in the wrong place, so that its line is not printed.
    hides_value: bool,
}

impl Problem {
    /// A problem of a key. It points at the key's value, or if the key is absent at the innermost table around it.
    pub(crate) fn at_key(text: &str, key: &[&str], message: String) -> Self {
        Problem {
            span: span_of(text, key),
            message: format!("{}: {message}", key_name(key)),
            hides_value: key.last() == Some(&"key_env"),
        }
    }

    pub(crate) fn from_toml(text: &str, error: &toml::de::Error) -> Self {
        // A range error may have a hint; the line breaks of the parser's own messages are layout.
        let (message, hint) = match error.message().split_once("\nhint: ") {
            Some((message, hint)) => (message, format!("\nhint: {hint}")),
            None => (error.message(), String::new()),
        };
        let message = message
            .trim_end()
            .replace('\n', ", ")
            .replace("unknown field", "unknown key")
            .replace("unknown variant", "unknown value")
            .replace("missing field", "missing key")
            .replace("expected f64", "expected a number");
        let span = error.span();
        let key = span
            .clone()
            .map(|s| key_around(text, s))
            .unwrap_or_default();
        let key: Vec<&str> = key.iter().map(String::as_str).collect();
        // If a whole table is missing, the span is the start of the file.
        let whole_file = span.as_ref().is_none_or(|s| s.start == 0);
        let message = match message.strip_prefix("missing key ") {
            Some(table) if whole_file => {
                let name = table.trim_matches('`');
                format!(
                    "the table {table} is missing\nhint: add [{name}]; docs/config.md lists its keys"
                )
            }
            Some(name) => format!(
                "{}: {message}, which has no default\nhint: add {name}",
                key_name(&key)
            ),
            None if key.is_empty() || message.starts_with("unknown key") => suggest(&message),
            None => format!("{}: {}{hint}", key_name(&key), suggest(&message)),
        };
        let hides_value = key.last() == Some(&"key_env");
        Problem {
            span,
            message,
            hides_value,
        }
    }

    /// Formats the problem: position and message, the line of the run file, then the hint.
    fn show(&self, path: &Path, text: &str) -> String {
        let (message, hint) = match self.message.split_once("\nhint: ") {
            Some((message, hint)) => (message, format!("\nhint: {hint}")),
            None => (self.message.as_str(), String::new()),
        };
        let Some(span) = &self.span else {
            return format!("{}: {message}{hint}", path.display());
        };
        let start = floor_boundary(text, span.start);
        let line_start = text[..start].rfind('\n').map_or(0, |i| i + 1);
        let line = text[line_start..].lines().next().unwrap_or("");
        let number = text[..line_start].matches('\n').count() + 1;
        let column = text[line_start..start].chars().count() + 1;
        if self.hides_value {
            return format!("{}:{number}:{column}: {message}{hint}", path.display());
        }
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

/// Adds a hint to ``unknown key `step`, expected `steps` or `batch` ``: the expected name that is most similar, or the
/// table that has this key, or all expected names.
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
    let rest = rest.strip_prefix("one of ").unwrap_or(rest);
    let all = match message.starts_with("unknown key") {
        true => format!("the keys here are {rest}"),
        false => format!("the values are {rest}"),
    };
    let table = schema::table_of(written).filter(|_| message.starts_with("unknown key"));
    match (likely, table) {
        (Some((_, name)), _) => {
            format!("{what}\nhint: did you mean `{name}`? {}", capitalised(&all))
        }
        (None, Some(table)) => format!("{what}\nhint: `{written}` is a key of [{table}]; {all}"),
        (None, None) => format!("{what}\nhint: {all}"),
    }
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().into_iter().flat_map(char::to_uppercase);
    first.chain(chars).collect()
}

/// Computes the optimal string alignment distance of two names without regard to case: the number of insertions,
/// deletions, substitutions and swaps of neighbours that turn one into the other.
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

/// Name of a key in messages: `["train", "steps"]` gives `` `steps` in [train] ``.
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

/// The key whose value contains `span`.
fn key_around(text: &str, span: Range<usize>) -> Vec<String> {
    let mut path = Vec::new();
    if let Ok(root) = DeTable::parse(text) {
        descend(root.get_ref(), &span, &mut path);
    }
    path
}

fn descend(table: &DeTable<'_>, span: &Range<usize>, path: &mut Vec<String>) {
    for (name, value) in table.iter() {
        if !contains(value, span) && name.span() != *span {
            continue;
        }
        path.push(name.get_ref().to_string());
        if let DeValue::Table(inner) = value.get_ref() {
            descend(inner, span, path);
        }
        return;
    }
}

/// Whether a value contains `span`. The span of a `[table]` is its header only, so its values are searched as well.
fn contains(value: &Spanned<DeValue<'_>>, span: &Range<usize>) -> bool {
    let own = value.span();
    let is_inside = own.start <= span.start && span.end <= own.end;
    is_inside
        || match value.get_ref() {
            DeValue::Table(inner) => inner
                .iter()
                .any(|(name, value)| name.span() == *span || contains(value, span)),
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
            "unknown key `leraning_rate`\nhint: did you mean `learning_rate`? The keys here are `steps`, `learning_rate`"
        );
        assert_eq!(
            suggest("unknown key `temperature`, expected one of `steps`, `batch`"),
            "unknown key `temperature`\nhint: `temperature` is a key of [collect]; the keys here are `steps`, `batch`"
        );
        assert_eq!(
            suggest("unknown key `dropout`, expected one of `steps`, `learning_rate`"),
            "unknown key `dropout`\nhint: the keys here are `steps`, `learning_rate`"
        );
        for message in [
            "unknown key `x`, there are no keys",
            "invalid type: string \"`a`\", expected `b`",
        ] {
            assert_eq!(suggest(message), message);
        }
    }
}
