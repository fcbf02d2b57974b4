//! A row of a file, and what the columns of it say.

use std::path::Path;

use serde_json::{Map, Value};

use super::settings::{AnswerSource, ImportSettings, TOOLS};
use crate::chat;
use crate::error::Error;
use crate::records::{Message, Prompt, Role};

/// Where in a file that is imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A line of text, from 1; of a row on several lines, the first.
    Line(usize),
    /// A row of a Parquet file, from 1.
    Row(usize),
    /// The file as a whole.
    File,
}

impl std::fmt::Display for Place {
    /// What follows the file's name: `:17`, `, row 17`, or nothing.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Line(line) => write!(f, ":{line}"),
            Place::Row(row) => write!(f, ", row {row}"),
            Place::File => Ok(()),
        }
    }
}

/// A row of a file, as JSON.
pub(super) struct Row {
    pub(super) place: Place,
    pub(super) fields: Map<String, Value>,
}

impl Row {
    /// The prompt of the row, and its answer if it has one.
    pub(super) fn read(
        &self,
        settings: &ImportSettings,
    ) -> Result<(Prompt, Option<Message>), Error> {
        let (path, columns) = (settings.path.as_path(), &settings.columns);
        let cells = Cells {
            path,
            place: self.place,
            fields: &self.fields,
        };
        let (mut tools, mut reference) = (None, None);
        let reply;
        let mut messages = if let Some(column) = &columns.messages {
            let (messages, answer) = chat::conversation(cells.get(column)?)
                .map_err(|why| cells.bad_column(column, &why))?;
            reply = answer;
            let offered = self.fields.get(TOOLS).map(chat::tools).transpose();
            tools = offered
                .map_err(|why| cells.bad_column(TOOLS, &why))?
                .flatten();
            messages
        } else if let Some(instruction) = &columns.instruction {
            let mut message = cells.question(instruction)?;
            if let Some(input) = cells.optional(columns.input.as_deref(), false)? {
                message.content = format!("{}\n\n{input}", message.content);
            }
            reply = cells
                .optional(columns.output.as_deref(), true)?
                .map(|text| Message::text(Role::Assistant, text));
            vec![message]
        } else {
            let question = columns.question.as_ref().or(columns.text.as_ref());
            let answer = columns.answer.as_ref();
            reference = answer.map(|answer| cells.reference(answer)).transpose()?;
            let is_given = settings.answers == AnswerSource::Given;
            reply = (reference.as_deref())
                .filter(|text| is_given && !text.trim().is_empty())
                .map(|text| Message::text(Role::Assistant, text));
            vec![cells.question(question.map_or("", String::as_str))?]
        };
        let own = messages
            .first()
            .is_some_and(|message| message.role == Role::System);
        if let (Some(system), false) = (&settings.system, own) {
            messages.insert(0, Message::text(Role::System, system));
        }
        let name = path.file_name().unwrap_or(path.as_os_str());
        let number = match self.place {
            Place::Line(number) | Place::Row(number) => format!(":{number}"),
            Place::File => String::new(),
        };
        let source = format!("{}{number}", name.to_string_lossy());
        let prompt = Prompt {
            group: cells
                .optional(columns.group.as_deref(), true)?
                .map(str::to_owned),
            ..Prompt::new(messages, tools, reference, source)
        };
        Ok((prompt, reply))
    }
}

/// The columns of a row, with their place for errors.
struct Cells<'a> {
    path: &'a Path,
    place: Place,
    fields: &'a Map<String, Value>,
}

impl<'a> Cells<'a> {
    fn bad_column(&self, column: &str, why: &str) -> Error {
        Error::BadPrompt {
            path: self.path.to_path_buf(),
            place: self.place,
            why: format!("column `{column}`: {why}"),
        }
    }

    fn mistyped(&self, column: &str, found: &Value, expected: &str) -> Error {
        Error::BadPrompt {
            path: self.path.to_path_buf(),
            place: self.place,
            why: format!(
                "column `{column}` is {}, and must be {expected}",
                chat::kind(found)
            ),
        }
    }

    fn get(&self, column: &str) -> Result<&'a Value, Error> {
        self.fields.get(column).ok_or_else(|| {
            missing(
                self.path,
                self.place,
                column,
                self.fields.keys().map(String::as_str),
            )
        })
    }

    fn question(&self, column: &str) -> Result<Message, Error> {
        match self.get(column)? {
            Value::String(text) if !text.trim().is_empty() => Ok(Message::text(Role::User, text)),
            Value::String(_) => Err(Error::BadPrompt {
                path: self.path.to_path_buf(),
                place: self.place,
                why: format!("column `{column}` is empty"),
            }),
            other => Err(self.mistyped(column, other, "a string")),
        }
    }

    fn reference(&self, column: &str) -> Result<String, Error> {
        match self.get(column)? {
            Value::String(text) => Ok(text.clone()),
            Value::Number(number) => Ok(number.to_string()),
            other => Err(self.mistyped(column, other, "a string or a number")),
        }
    }

    /// The text of a column that may be null or empty, and absent unless it is `needed`.
    fn optional(&self, column: Option<&str>, needed: bool) -> Result<Option<&'a str>, Error> {
        let Some(column) = column else {
            return Ok(None);
        };
        let value = match needed {
            true => Some(self.get(column)?),
            false => self.fields.get(column),
        };
        match value {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok((!text.trim().is_empty()).then_some(text.as_str())),
            Some(other) => Err(self.mistyped(column, other, "a string")),
        }
    }
}

pub(super) fn missing<'a>(
    path: &Path,
    place: Place,
    column: &str,
    present: impl Iterator<Item = &'a str>,
) -> Error {
    let names: Vec<String> = present.map(|name| format!("`{name}`")).collect();
    let present = match names.is_empty() {
        true => "no columns at all".into(),
        false => names.join(", "),
    };
    Error::MissingColumn {
        path: path.to_path_buf(),
        place,
        column: column.into(),
        present,
    }
}
