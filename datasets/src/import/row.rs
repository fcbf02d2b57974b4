//! A row of an imported file and the prompt and answer in it.

use std::path::Path;

use serde_json::{Map, Value};

use super::answers::answers;
use super::column_path::{beside, listed, lookup, names};
use super::file::row_error;
use super::settings::{AnswerSource, ImportSettings, TOOLS};
use crate::chat;
use crate::error::{Error, RowLocation};
use crate::records::{Message, Prompt, Role};

/// The rows of a file in order.
pub(super) type RowIterator = Box<dyn Iterator<Item = Result<FileRow, Error>>>;

/// A row of a file as JSON.
pub(super) struct FileRow {
    pub(super) location: RowLocation,
    /// Length of the row in the file.
    pub(super) bytes: usize,
    pub(super) fields: Map<String, Value>,
}

impl FileRow {
    /// Returns the prompt of the row, and its answers if it has some. `path` is the file of the row.
    pub(super) fn read(
        &self,
        path: &Path,
        settings: &ImportSettings,
    ) -> Result<(Prompt, Vec<Message>), Error> {
        let fields = FieldReader { path, row: self };
        let columns = &settings.columns;
        let (mut tools, mut reference) = (None, None);
        let (mut messages, answers) = if let Some(column) = &columns.messages {
            tools = fields.tools(column)?;
            let (messages, answer) = fields.conversation(column)?;
            (messages, Vec::from_iter(answer))
        } else if let Some(instruction) = &columns.instruction {
            let mut message = fields.question(instruction)?;
            if let Some(input) = fields.optional_text(columns.input.as_deref(), false)? {
                message.content = format!("{}\n\n{input}", message.content);
            }
            let output = columns.output.as_deref();
            let answers = output.map(|column| fields.answers(column)).transpose()?;
            (vec![message], answers.unwrap_or_default())
        } else {
            let question = columns.question.as_ref().or(columns.text.as_ref());
            let message = fields.question(question.map_or("", String::as_str))?;
            let mut answers = Vec::new();
            if let Some(column) = &columns.answer {
                (reference, answers) = fields.references(column)?;
            }
            if settings.answers != AnswerSource::Given {
                answers.clear();
            }
            (vec![message], answers)
        };
        let first = messages.first().map(|message| message.role);
        if let Some(system) = &settings.system
            && first != Some(Role::System)
        {
            messages.insert(0, Message::text(Role::System, system));
        }
        let group = fields.optional_text(columns.group.as_deref(), true)?;
        let prompt = Prompt {
            group: group.map(str::to_owned),
            ..Prompt::new(messages, tools, reference, fields.source())
        };
        Ok((prompt, answers))
    }
}

/// Access to the fields of a row, with its location for errors.
struct FieldReader<'a> {
    path: &'a Path,
    row: &'a FileRow,
}

impl<'a> FieldReader<'a> {
    fn column_error(&self, column: &str, why: &str) -> Error {
        let why = format!("column `{column}`{why}");
        row_error(self.path, self.row.location, why)
    }

    fn type_error(&self, column: &str, found: &Value, expected: &str) -> Error {
        let found = chat::kind(found);
        self.column_error(column, &format!(" is {found}, and must be {expected}"))
    }

    fn get(&self, column: &str) -> Result<&'a Value, Error> {
        let fields = &self.row.fields;
        lookup(fields, column)
            .ok_or_else(|| missing_column(self.path, self.row.location, column, &names(fields)))
    }

    fn conversation(&self, column: &str) -> Result<(Vec<Message>, Option<Message>), Error> {
        chat::conversation(self.get(column)?)
            .map_err(|why| self.column_error(column, &format!(": {why}")))
    }

    /// Returns the tools beside a column of messages.
    fn tools(&self, messages: &str) -> Result<Option<String>, Error> {
        let column = beside(messages, TOOLS);
        let tools = lookup(&self.row.fields, &column)
            .map(chat::tools)
            .transpose();
        let tools = tools.map_err(|why| self.column_error(&column, &format!(": {why}")))?;
        Ok(tools.flatten())
    }

    fn question(&self, column: &str) -> Result<Message, Error> {
        match self.get(column)? {
            Value::String(text) if !text.trim().is_empty() => Ok(Message::text(Role::User, text)),
            Value::String(_) => Err(self.column_error(column, " is empty")),
            other => Err(self.type_error(column, other, "a string")),
        }
    }

    /// Returns the answers of a column, which may be none.
    fn answers(&self, column: &str) -> Result<Vec<Message>, Error> {
        answers(self.get(column)?).map_err(|why| self.column_error(column, &why))
    }

    /// Returns the reference of a question, which is the first of its answers, and the answers.
    fn references(&self, column: &str) -> Result<(Option<String>, Vec<Message>), Error> {
        let value = self.get(column)?;
        if value.is_null() {
            return Err(self.type_error(column, value, "a string or a number"));
        }
        let answers = self.answers(column)?;
        let reference = match value {
            Value::String(text) => Some(text.clone()),
            _ => answers.first().map(|first| first.content.clone()),
        };
        Ok((reference, answers))
    }

    /// Returns the text of a column that may be null or empty. If it is not `required`, it may also be absent.
    fn optional_text(
        &self,
        column: Option<&str>,
        required: bool,
    ) -> Result<Option<&'a str>, Error> {
        let Some(column) = column else {
            return Ok(None);
        };
        let value = match required {
            true => Some(self.get(column)?),
            false => lookup(&self.row.fields, column),
        };
        match value {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok((!text.trim().is_empty()).then_some(text.as_str())),
            Some(other) => Err(self.type_error(column, other, "a string")),
        }
    }

    /// Returns the file's name and the number of the row: the prompt's source.
    fn source(&self) -> String {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        let name = name.to_string_lossy();
        match self.row.location {
            RowLocation::Line(number) | RowLocation::Row(number) => format!("{name}:{number}"),
            RowLocation::File => name.into_owned(),
        }
    }
}

/// Returns the error for an absent column. `present` are the columns that exist.
pub(super) fn missing_column(
    path: &Path,
    location: RowLocation,
    column: &str,
    present: &[String],
) -> Error {
    Error::MissingColumn {
        path: path.to_path_buf(),
        location,
        column: column.into(),
        present: listed(present),
    }
}
