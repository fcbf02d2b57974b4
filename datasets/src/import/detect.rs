//! Which columns of a file hold prompts, from the names and contents of its first rows.

use std::path::Path;

use serde_json::Value;

use super::row::Row;
use super::{Columns, ImportSettings, empty, rows};
use crate::chat;
use crate::error::Error;

/// So many rows are looked at.
const FIRST_ROWS: usize = 20;

const MESSAGES: [&str; 5] = [
    "messages",
    "conversations",
    "conversation",
    "dialogue",
    "chat",
];
const QUESTIONS: [&str; 4] = ["question", "problem", "query", "prompt"];
const ANSWERS: [&str; 6] = [
    "answer",
    "solution",
    "final_answer",
    "expected_answer",
    "target",
    "reference",
];
const OUTPUTS: [&str; 3] = ["output", "response", "completion"];
const INPUTS: [&str; 2] = ["input", "context"];
const TEXTS: [&str; 2] = ["text", "content"];

/// What [`detect_columns`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detected {
    /// The columns that hold the prompts.
    pub columns: Columns,
    /// What people call data with such columns: `messages`, `sharegpt`, `alpaca`, `prompt and response`,
    /// `question and answer` or `text`.
    pub name: &'static str,
    /// Whether any of the first rows has an answer besides its prompt.
    pub has_answers: bool,
}

/// Looks for the prompts in the first 20 rows of a file, by the names of the columns and by what is in them. Case does
/// not matter. Messages come before all else, then an instruction or prompt with an answer to learn from, then a
/// question with or without the right answer, then text.
///
/// # Errors
/// Those of [`import`](super::import) for a file or row that cannot be read; [`Error::UnknownColumns`] with the columns
/// that are there and what to write into the run file.
pub fn detect_columns(path: &Path) -> Result<Detected, Error> {
    let first: Vec<Row> = rows(path, None)?
        .take(FIRST_ROWS)
        .collect::<Result<_, _>>()?;
    if first.is_empty() {
        return Err(empty(path));
    }
    let found = Found::of(&first);
    let Some((columns, name)) = found.columns() else {
        return Err(Error::UnknownColumns {
            path: path.to_path_buf(),
            found: found.listed(),
            example: found.example(),
        });
    };
    let settings = ImportSettings::new(path, columns.clone());
    let answered = |row: &Row| matches!(row.read(&settings), Ok((prompt, answer)) if answer.is_some() || prompt.reference.is_some());
    let has_answers = first.iter().any(answered);
    Ok(Detected {
        columns,
        name,
        has_answers,
    })
}

/// What a column holds in all rows where it is neither absent nor null.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Null,
    Text,
    Number,
    /// Messages with `role`.
    Roles,
    /// Messages with `from`.
    Senders,
    Other,
}

impl Kind {
    fn of(value: &Value) -> Kind {
        let found = chat::from_text(value);
        if let Value::Array(items) = found.as_ref()
            && !items.is_empty()
        {
            let all = |key: &str| items.iter().all(|item| item.get(key).is_some());
            match (all("role"), all("from")) {
                (true, _) => return Kind::Roles,
                (_, true) => return Kind::Senders,
                _ => {}
            }
        }
        match value {
            Value::Null => Kind::Null,
            Value::String(_) => Kind::Text,
            Value::Number(_) => Kind::Number,
            _ => Kind::Other,
        }
    }

    /// The kind of a column with both.
    fn and(self, other: Kind) -> Kind {
        match (self, other) {
            (kind, Kind::Null) | (Kind::Null, kind) => kind,
            (a, b) if a == b => a,
            _ => Kind::Other,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Null => "null",
            Kind::Text => "text",
            Kind::Number => "numbers",
            Kind::Roles | Kind::Senders => "messages",
            Kind::Other => "other values",
        }
    }
}

/// A column of the first rows.
struct Column {
    name: String,
    kind: Kind,
    /// Whether every row has it, and not null.
    full: bool,
}

struct Found(Vec<Column>);

impl Found {
    fn of(rows: &[Row]) -> Found {
        let mut names: Vec<&String> = Vec::new();
        for name in rows.iter().flat_map(|row| row.fields.keys()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let column = |name: &String| {
            let kinds = || {
                let cells = rows.iter().map(|row| row.fields.get(name));
                cells.map(|cell| cell.map_or(Kind::Null, Kind::of))
            };
            Column {
                name: name.clone(),
                kind: kinds().fold(Kind::Null, Kind::and),
                full: kinds().all(|kind| kind != Kind::Null),
            }
        };
        Found(names.into_iter().map(column).collect())
    }

    fn columns(&self) -> Option<(Columns, &'static str)> {
        if let Some(column) = self.messages() {
            let name = match column.kind {
                Kind::Senders => "sharegpt",
                _ => "messages",
            };
            return Some((Columns::messages(&column.name), name));
        }
        let text = |column: &Column| column.kind == Kind::Text;
        let all_text = |column: &Column| text(column) && column.full;
        let output = self.named(&OUTPUTS, text);
        if let Some(instruction) = self.named(&["instruction"], all_text) {
            let columns = Columns {
                instruction: Some(instruction),
                input: self.named(&INPUTS, |column| {
                    matches!(column.kind, Kind::Text | Kind::Null)
                }),
                output,
                ..Columns::default()
            };
            return Some((columns, "alpaca"));
        }
        if let Some(question) = self.named(&QUESTIONS, all_text) {
            let right =
                |column: &Column| matches!(column.kind, Kind::Text | Kind::Number) && column.full;
            return Some(match (self.named(&ANSWERS, right), output) {
                (None, Some(output)) => (
                    Columns {
                        instruction: Some(question),
                        output: Some(output),
                        ..Columns::default()
                    },
                    "prompt and response",
                ),
                (answer, _) => (
                    Columns {
                        question: Some(question),
                        answer,
                        ..Columns::default()
                    },
                    "question and answer",
                ),
            });
        }
        let only = match self.0.as_slice() {
            [column] if all_text(column) => Some(column.name.clone()),
            _ => None,
        };
        let text = self.named(&TEXTS, all_text).or(only)?;
        Some((Columns::text(&text), "text"))
    }

    /// The column of messages: that of a usual name, or else the only one.
    fn messages(&self) -> Option<&Column> {
        let is =
            |column: &&Column| matches!(column.kind, Kind::Roles | Kind::Senders) && column.full;
        let usual = MESSAGES.iter().find_map(|name| {
            let mut columns = self.0.iter().filter(is);
            columns.find(|column| column.name.eq_ignore_ascii_case(name))
        });
        let mut all = self.0.iter().filter(is);
        usual.or_else(|| all.next().filter(|_| all.next().is_none()))
    }

    /// The column with the first of the names that is there and right.
    fn named(&self, names: &[&str], right: impl Fn(&Column) -> bool) -> Option<String> {
        names.iter().find_map(|name| {
            let mut columns = self.0.iter().filter(|column| right(column));
            let column = columns.find(|column| column.name.eq_ignore_ascii_case(name))?;
            Some(column.name.clone())
        })
    }

    fn listed(&self) -> String {
        let columns = self.0.iter();
        let names: Vec<String> = columns
            .map(|column| format!("`{}` ({})", column.name, column.kind.name()))
            .collect();
        match names.is_empty() {
            true => "no columns at all".into(),
            false => names.join(", "),
        }
    }

    /// What to write into the run file, with columns that would be legal.
    fn example(&self) -> String {
        let of = |kinds: &[Kind]| self.0.iter().find(|column| kinds.contains(&column.kind));
        let (key, column) = match (of(&[Kind::Text]), of(&[Kind::Roles, Kind::Senders])) {
            (_, Some(messages)) => ("messages", messages.name.as_str()),
            (Some(text), _) => ("text", text.name.as_str()),
            _ => ("text", "NAME"),
        };
        format!("`columns = {{ {key} = {column:?} }}`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(text: &str) -> Result<Detected, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.jsonl");
        std::fs::write(&path, text).unwrap();
        detect_columns(&path).map_err(|error| {
            error
                .to_string()
                .split_once("p.jsonl")
                .unwrap()
                .1
                .to_owned()
        })
    }

    fn some(name: &str) -> Option<String> {
        Some(name.to_owned())
    }

    #[test]
    fn the_usual_kinds_are_known() {
        let question = |question: &str, answer: Option<&str>| Columns {
            question: some(question),
            answer: answer.map(str::to_owned),
            ..Columns::default()
        };
        let instruction = |instruction: &str, input: Option<&str>, output: Option<&str>| Columns {
            instruction: some(instruction),
            input: input.map(str::to_owned),
            output: output.map(str::to_owned),
            ..Columns::default()
        };
        let messages = Columns::messages;
        for (text, columns, name, has_answers) in [
            (r#"{"text": "a"}"#, Columns::text("text"), "text", false),
            (r#"{"Story": "a"}"#, Columns::text("Story"), "text", false),
            (
                r#"{"id": 1, "content": "a"}"#,
                Columns::text("content"),
                "text",
                false,
            ),
            (
                r#"{"question": "a", "answer": "b #### 3"}"#,
                question("question", Some("answer")),
                "question and answer",
                true,
            ),
            (
                r#"{"Answer": 145.0, "Question": "a", "Body": "b"}"#,
                question("Question", Some("Answer")),
                "question and answer",
                true,
            ),
            (
                r#"{"question": "[1, 2]", "answer": "[]"}"#,
                question("question", Some("answer")),
                "question and answer",
                true,
            ),
            (
                r#"{"problem": "a", "answer": null}"#,
                question("problem", None),
                "question and answer",
                false,
            ),
            (
                r#"{"prompt": "a", "completion": "b"}"#,
                instruction("prompt", None, Some("completion")),
                "prompt and response",
                true,
            ),
            (
                r#"{"instruction": "a", "input": "", "output": "b"}"#,
                instruction("instruction", Some("input"), Some("output")),
                "alpaca",
                true,
            ),
            (
                r#"{"instruction": "a", "output": ""}"#,
                instruction("instruction", None, Some("output")),
                "alpaca",
                false,
            ),
            (
                r#"{"instruction": "a", "context": "b", "response": "c", "category": "d"}"#,
                instruction("instruction", Some("context"), Some("response")),
                "alpaca",
                true,
            ),
            (
                r#"{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}"#,
                messages("messages"),
                "messages",
                false,
            ),
            (
                r#"{"x": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
                messages("x"),
                "messages",
                true,
            ),
            (
                r#"{"conversations": "[{\"from\": \"human\", \"value\": \"a\"}, {\"from\": \"gpt\", \"value\": \"b\"}]"}"#,
                messages("conversations"),
                "sharegpt",
                true,
            ),
        ] {
            let expected = Detected {
                columns,
                name,
                has_answers,
            };
            assert_eq!(detect(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn the_first_rows_are_taken_together() {
        // Absent here and there: not a column to rely on, but one that may hold an input.
        let text = "{\"instruction\":\"a\",\"output\":\"b\"}\n{\"instruction\":\"a\",\"input\":\"i\",\"output\":null}";
        let columns = Columns {
            instruction: some("instruction"),
            input: some("input"),
            output: some("output"),
            ..Columns::default()
        };
        assert_eq!(detect(text).unwrap().columns, columns);
        let text = "{\"question\":\"a\",\"answer\":1}\n{\"question\":\"b\",\"answer\":[1]}";
        let columns = Columns {
            question: some("question"),
            ..Columns::default()
        };
        assert_eq!(detect(text).unwrap().columns, columns);
        // What comes later is not looked at.
        let text = "{\"text\":\"a\"}\n".repeat(FIRST_ROWS) + "not JSON";
        assert_eq!(detect(&text).unwrap().name, "text");
    }

    #[test]
    fn what_is_not_known_is_refused_with_the_way_out() {
        let no = |text: &str| detect(text).unwrap_err();
        assert_eq!(
            no(
                r#"{"chosen": [{"role": "user"}], "rejected": [{"role": "user"}], "n": 1, "t": true, "u": null, "s": "a"}"#
            ),
            ": no column is known to hold the prompts; its first rows have `chosen` (messages), `rejected` (messages), `n` (numbers), `t` (other values), `u` (null), `s` (text). Say which to use in `[import]`, such as `columns = { messages = \"chosen\" }`"
        );
        assert!(no(r#"{"a": "x", "b": "y"}"#).ends_with("`a` (text), `b` (text). Say which to use in `[import]`, such as `columns = { text = \"a\" }`"));
        assert!(no("{}").contains("its first rows have no columns at all"));
        assert_eq!(no("\n"), " gives no prompts: the file has no lines");
    }
}
