//! Detection of the columns that hold prompts, from the names and contents of a file's first rows.

use std::path::Path;

use serde_json::Value;

use super::format::{no_prompts, rows};
use super::row::FileRow;
use super::settings::{Columns, ImportSettings};
use crate::chat;
use crate::error::Error;

/// Number of rows that are examined.
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

/// The columns that [`detect_columns`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detected {
    /// Columns that hold the prompts.
    pub columns: Columns,
    /// Common name of data with such columns: `messages`, `sharegpt`, `alpaca`, `prompt and response`,
    /// `question and answer` or `text`.
    pub name: &'static str,
    /// Whether any of the first rows has an answer besides its prompt.
    pub has_answers: bool,
}

/// Finds the columns of prompts from the names and contents of the columns in a file's first 20 rows. Names are compared
/// without regard to case. Messages take precedence, then an instruction or prompt with an answer to learn from, then a
/// question with or without the right answer, then text.
///
/// # Errors
/// Those of [`import`](super::import) for a file or row that cannot be read; [`Error::Invalid`] if no column is known,
/// with the columns of the file and an example for the run file.
pub fn detect_columns(path: &Path) -> Result<Detected, Error> {
    let first: Vec<FileRow> = rows(path, None)?
        .take(FIRST_ROWS)
        .collect::<Result<_, _>>()?;
    if first.is_empty() {
        return Err(no_prompts(path));
    }
    let present = FileColumns::new(&first);
    let Some((columns, name)) = present.prompt_columns() else {
        let problem = format!(
            "{}: no column is known to hold the prompts; the first rows have {}",
            path.display(),
            present.list()
        );
        let hint = format!(
            "name the columns in [import], for example {}",
            present.example()
        );
        return Err(Error::invalid(problem, hint));
    };
    let settings = ImportSettings::new(path, columns.clone());
    let has_answer = |row: &FileRow| matches!(row.read(&settings), Ok((prompt, answer)) if answer.is_some() || prompt.reference.is_some());
    let has_answers = first.iter().any(has_answer);
    Ok(Detected {
        columns,
        name,
        has_answers,
    })
}

/// Kind of the values that a column has in all rows in which it is neither absent nor null.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ColumnKind {
    Null,
    Text,
    Number,
    /// Messages with `role`.
    Roles,
    /// Messages with `from`.
    Senders,
    Other,
}

impl ColumnKind {
    fn of_value(value: &Value) -> ColumnKind {
        let found = chat::parse_array_text(value);
        if let Value::Array(items) = found.as_ref()
            && !items.is_empty()
        {
            let all = |key: &str| items.iter().all(|item| item.get(key).is_some());
            match (all("role"), all("from")) {
                (true, _) => return ColumnKind::Roles,
                (_, true) => return ColumnKind::Senders,
                _ => {}
            }
        }
        match value {
            Value::Null => ColumnKind::Null,
            Value::String(_) => ColumnKind::Text,
            Value::Number(_) => ColumnKind::Number,
            _ => ColumnKind::Other,
        }
    }

    /// Returns the kind of a column that has values of both kinds.
    fn combine(self, other: ColumnKind) -> ColumnKind {
        match (self, other) {
            (kind, ColumnKind::Null) | (ColumnKind::Null, kind) => kind,
            (a, b) if a == b => a,
            _ => ColumnKind::Other,
        }
    }

    fn name(self) -> &'static str {
        match self {
            ColumnKind::Null => "null",
            ColumnKind::Text => "text",
            ColumnKind::Number => "numbers",
            ColumnKind::Roles | ColumnKind::Senders => "messages",
            ColumnKind::Other => "other values",
        }
    }
}

/// A column of the first rows.
struct FileColumn {
    name: String,
    kind: ColumnKind,
    /// Whether every row has a value that is not null.
    is_full: bool,
}

/// The columns of the first rows.
struct FileColumns(Vec<FileColumn>);

impl FileColumns {
    fn new(rows: &[FileRow]) -> FileColumns {
        let mut names: Vec<&String> = Vec::new();
        for name in rows.iter().flat_map(|row| row.fields.keys()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let column = |name: &String| {
            let kinds = || {
                let cells = rows.iter().map(|row| row.fields.get(name));
                cells.map(|cell| cell.map_or(ColumnKind::Null, ColumnKind::of_value))
            };
            FileColumn {
                name: name.clone(),
                kind: kinds().fold(ColumnKind::Null, ColumnKind::combine),
                is_full: kinds().all(|kind| kind != ColumnKind::Null),
            }
        };
        FileColumns(names.into_iter().map(column).collect())
    }

    /// Returns the columns that hold prompts and the common name of such data.
    fn prompt_columns(&self) -> Option<(Columns, &'static str)> {
        if let Some(column) = self.messages() {
            let name = match column.kind {
                ColumnKind::Senders => "sharegpt",
                _ => "messages",
            };
            return Some((Columns::messages(&column.name), name));
        }
        let text = |column: &FileColumn| column.kind == ColumnKind::Text;
        let all_text = |column: &FileColumn| text(column) && column.is_full;
        let output = self.named(&OUTPUTS, text);
        if let Some(instruction) = self.named(&["instruction"], all_text) {
            let columns = Columns {
                instruction: Some(instruction),
                input: self.named(&INPUTS, |column| {
                    matches!(column.kind, ColumnKind::Text | ColumnKind::Null)
                }),
                output,
                ..Columns::default()
            };
            return Some((columns, "alpaca"));
        }
        if let Some(question) = self.named(&QUESTIONS, all_text) {
            let is_answer = |column: &FileColumn| {
                matches!(column.kind, ColumnKind::Text | ColumnKind::Number) && column.is_full
            };
            return Some(match (self.named(&ANSWERS, is_answer), output) {
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

    /// Returns the column of messages: one with a usual name, or else the only one.
    fn messages(&self) -> Option<&FileColumn> {
        let has_messages = |column: &&FileColumn| {
            matches!(column.kind, ColumnKind::Roles | ColumnKind::Senders) && column.is_full
        };
        let usual = MESSAGES.iter().find_map(|name| {
            let mut columns = self.0.iter().filter(has_messages);
            columns.find(|column| column.name.eq_ignore_ascii_case(name))
        });
        let mut all = self.0.iter().filter(has_messages);
        usual.or_else(|| all.next().filter(|_| all.next().is_none()))
    }

    /// Returns the name of the column that has the first possible of `names` and satisfies `accepts`.
    fn named(&self, names: &[&str], accepts: impl Fn(&FileColumn) -> bool) -> Option<String> {
        names.iter().find_map(|name| {
            let mut columns = self.0.iter().filter(|column| accepts(column));
            let column = columns.find(|column| column.name.eq_ignore_ascii_case(name))?;
            Some(column.name.clone())
        })
    }

    /// Lists the columns with their kinds for a message.
    fn list(&self) -> String {
        let columns = self.0.iter();
        let names: Vec<String> = columns
            .map(|column| format!("`{}` ({})", column.name, column.kind.name()))
            .collect();
        match names.is_empty() {
            true => "no columns at all".into(),
            false => names.join(", "),
        }
    }

    /// Returns an example for the run file that names a possible column.
    fn example(&self) -> String {
        let first_of =
            |kinds: &[ColumnKind]| self.0.iter().find(|column| kinds.contains(&column.kind));
        let (key, column) = match (
            first_of(&[ColumnKind::Text]),
            first_of(&[ColumnKind::Roles, ColumnKind::Senders]),
        ) {
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
    fn the_usual_columns_are_detected() {
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
    fn the_first_rows_are_examined_together() {
        // A column that is absent in some rows may hold an input, but nothing that every row needs.
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
        // Later rows are not read.
        let text = "{\"text\":\"a\"}\n".repeat(FIRST_ROWS) + "not JSON";
        assert_eq!(detect(&text).unwrap().name, "text");
    }

    #[test]
    fn unknown_columns_are_refused_with_a_hint() {
        let no = |text: &str| detect(text).unwrap_err();
        assert_eq!(
            no(
                r#"{"chosen": [{"role": "user"}], "rejected": [{"role": "user"}], "n": 1, "t": true, "u": null, "s": "a"}"#
            ),
            ": no column is known to hold the prompts; the first rows have `chosen` (messages), `rejected` (messages), `n` (numbers), `t` (other values), `u` (null), `s` (text)\nhint: name the columns in [import], for example `columns = { messages = \"chosen\" }`"
        );
        assert!(no(r#"{"a": "x", "b": "y"}"#).ends_with("`a` (text), `b` (text)\nhint: name the columns in [import], for example `columns = { text = \"a\" }`"));
        assert!(no("{}").contains("the first rows have no columns at all"));
        assert_eq!(
            no("\n"),
            " has no prompts: the file has no lines\nhint: put prompts into it, or name another file in `path` of [import]"
        );
    }
}
