//! Detection of the columns that hold prompts, from the names and contents of a file's first rows.

use std::collections::HashSet;
use std::path::Path;

use serde_json::Value;

use super::answers::{answers, is_list};
use super::files::data_files;
use super::format::{check_headers, no_prompts, rows};
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
const ANSWERS: [&str; 8] = [
    "answer",
    "answers",
    "solution",
    "solutions",
    "final_answer",
    "expected_answer",
    "target",
    "reference",
];
const OUTPUTS: [&str; 8] = [
    "output",
    "response",
    "completion",
    "outputs",
    "responses",
    "completions",
    "generations",
    "samples",
];
const INPUTS: [&str; 2] = ["input", "context"];
const TEXTS: [&str; 2] = ["text", "content"];

/// Most columns in a message.
const SHOWN_COLUMNS: usize = 30;

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
    /// Columns that look like answers and are not among `columns`, each with the reason if it cannot be read.
    pub ignored: Vec<String>,
}

/// Finds the columns of prompts from the names and contents of the columns in a file's first 20 rows. Names are compared
/// without regard to case. Messages take precedence, then an instruction or prompt with an answer to learn from, then a
/// question with or without the right answer, then text.
///
/// # Errors
/// Those of [`import`](super::import) for a file or row that cannot be read; [`Error::Invalid`] if no column is known,
/// with the columns of the file and an example for the run file.
pub fn detect_columns(path: &Path) -> Result<Detected, Error> {
    let files = data_files(path)?;
    let any = ImportSettings::new(path, Columns::default());
    if files.len() > 1 {
        check_headers(&files, &any)?;
    }
    let Some(file) = files.first() else {
        return Err(no_prompts(path));
    };
    let first = first_rows(file, &any)?;
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
    let has_answer = |row: &FileRow| matches!(row.read(file, &settings), Ok((prompt, answers)) if !answers.is_empty() || prompt.reference.is_some());
    let has_answers = first.iter().any(has_answer);
    Ok(Detected {
        ignored: present.ignored(&columns, &first),
        columns,
        name,
        has_answers,
    })
}

/// Reads the first rows, but no more of long ones than a row may be long.
fn first_rows(file: &Path, settings: &ImportSettings) -> Result<Vec<FileRow>, Error> {
    let (mut first, mut bytes) = (Vec::new(), 0);
    for row in rows(file, settings, true)? {
        let row = row?;
        bytes += row.bytes;
        first.push(row);
        if first.len() == FIRST_ROWS || bytes > settings.max_row_bytes {
            break;
        }
    }
    Ok(first)
}

/// Kind of the values that a column has in all rows in which it is neither absent nor null.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ColumnKind {
    Null,
    Text,
    Number,
    /// A list of answers to one prompt.
    Answers,
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
            if is_list(value) {
                return ColumnKind::Answers;
            }
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
            value if is_list(value) => ColumnKind::Answers,
            // An empty list has no answers, and says nothing about the others.
            Value::Array(items) if items.is_empty() => ColumnKind::Null,
            _ => ColumnKind::Other,
        }
    }

    /// Returns the kind of a column that has values of both kinds.
    fn combine(self, other: ColumnKind) -> ColumnKind {
        match (self, other) {
            (kind, ColumnKind::Null) | (ColumnKind::Null, kind) => kind,
            (a, b) if a == b => a,
            (ColumnKind::Answers, ColumnKind::Text | ColumnKind::Number)
            | (ColumnKind::Text | ColumnKind::Number, ColumnKind::Answers) => ColumnKind::Answers,
            _ => ColumnKind::Other,
        }
    }

    fn name(self) -> &'static str {
        match self {
            ColumnKind::Null => "null",
            ColumnKind::Text => "text",
            ColumnKind::Number => "numbers",
            ColumnKind::Answers => "lists of answers",
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
        let mut known = HashSet::new();
        let names = rows.iter().flat_map(|row| row.fields.keys());
        let names: Vec<&String> = names.filter(|name| known.insert(*name)).collect();
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
        let is_output =
            |column: &FileColumn| matches!(column.kind, ColumnKind::Text | ColumnKind::Answers);
        let output = self.named(&OUTPUTS, is_output);
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
                let kinds = [ColumnKind::Text, ColumnKind::Number, ColumnKind::Answers];
                kinds.contains(&column.kind) && column.is_full
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
        let name = |column: &FileColumn| format!("`{}` ({})", column.name, column.kind.name());
        let names: Vec<String> = columns.clone().take(SHOWN_COLUMNS).map(name).collect();
        match (names.is_empty(), columns.len() > SHOWN_COLUMNS) {
            (true, _) => "no columns at all".into(),
            (_, false) => names.join(", "),
            (_, true) => format!("{} and more", names.join(", ")),
        }
    }

    /// Describes the columns with a usual name of answers that are not among `columns`.
    fn ignored(&self, columns: &Columns, rows: &[FileRow]) -> Vec<String> {
        let is_named = |column: &&FileColumn| {
            let mut usual = ANSWERS.iter().chain(&OUTPUTS);
            usual.any(|name| column.name.eq_ignore_ascii_case(name))
                && column.kind != ColumnKind::Null
                && columns.required().all(|used| used != column.name)
        };
        let ignored = self.0.iter().filter(is_named);
        ignored
            .map(|column| {
                let values = rows.iter().filter_map(|row| row.fields.get(&column.name));
                let why = values
                    .map(answers)
                    .find_map(Result::err)
                    .unwrap_or_default();
                let why = why.lines().next().unwrap_or_default();
                format!("column `{}`{why}", column.name)
            })
            .collect()
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
                ignored: Vec::new(),
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
        // One answer in some rows and several in others.
        let text = "{\"question\":\"a\",\"answer\":1}\n{\"question\":\"b\",\"answer\":[1]}";
        let columns = Columns {
            question: some("question"),
            answer: some("answer"),
            ..Columns::default()
        };
        assert_eq!(detect(text).unwrap().columns, columns);
        // What is not understood is said.
        let text = "{\"question\":\"a\",\"answers\":[\"b\"]}\n{\"question\":\"b\",\"answers\":[{\"body\":\"c\"}]}";
        let found = detect(text).unwrap();
        assert_eq!(found.columns.answer, None);
        assert_eq!(
            found.ignored,
            [
                "column `answers`: answer 1 of the list is an object without `text`, `content` or `answer`"
            ]
        );
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
