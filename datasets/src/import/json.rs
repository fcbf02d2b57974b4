//! Reader of JSON files, which have an object on each line or one array of objects.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::{Deserializer, Value};

use super::file::{open, row_error, utf8_error};
use super::row::{FileRow, RowIterator};
use crate::chat;
use crate::error::{Error, RowLocation};

const LINES: &str = "each line must be one whole JSON object";
const ARRAY: &str = "the file must be one array of JSON objects";
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads an object from each line; blank lines are skipped.
pub(super) fn lines(path: &Path) -> Result<RowIterator, Error> {
    Ok(Box::new(JsonLines {
        path: path.to_path_buf(),
        reader: BufReader::new(open(path)?),
        bytes: Vec::new(),
        line: 0,
    }))
}

/// Reads one array of objects, or an object from each line, depending on the first character.
pub(super) fn array_or_lines(path: &Path) -> Result<RowIterator, Error> {
    let mut bytes = Vec::new();
    open(path)?
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    let start = match bytes.starts_with(BYTE_ORDER_MARK) {
        true => BYTE_ORDER_MARK.len(),
        false => 0,
    };
    let text = String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let before = error.as_bytes().get(..valid).unwrap_or_default();
        let line_start = before
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        utf8_error(path, line, valid - line_start + 1)
    })?;
    if !text
        .get(start..)
        .unwrap_or_default()
        .trim_start()
        .starts_with('[')
    {
        return lines(path);
    }
    Ok(Box::new(JsonArray {
        path: path.to_path_buf(),
        text,
        position: start,
        line: 1,
        line_start: 0,
        state: ArrayState::Before,
    }))
}

struct JsonLines {
    path: PathBuf,
    reader: BufReader<Box<dyn Read>>,
    bytes: Vec<u8>,
    line: usize,
}

impl Iterator for JsonLines {
    type Item = Result<FileRow, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            self.bytes.clear();
            match self.reader.read_until(b'\n', &mut self.bytes) {
                Ok(0) => return None,
                Ok(_) => self.line += 1,
                Err(error) => return Some(Err(Error::io("read", &self.path)(error))),
            }
            match self.row() {
                Ok(None) => {}
                Ok(Some(row)) => return Some(Ok(row)),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl JsonLines {
    fn row(&self) -> Result<Option<FileRow>, Error> {
        let mut bytes = self.bytes.as_slice();
        if self.line == 1 {
            bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
        }
        let text = std::str::from_utf8(bytes)
            .map_err(|error| utf8_error(&self.path, self.line, error.valid_up_to() + 1))?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        let location = RowLocation::Line(self.line);
        match serde_json::from_str(text.trim_end()) {
            Ok(Value::Object(fields)) => Ok(Some(FileRow { location, fields })),
            Ok(other) => Err(row_error(
                &self.path,
                location,
                format!(
                    "the line is {}\nhint: each line must be a JSON object",
                    chat::kind(&other)
                ),
            )),
            Err(error) => Err(json_error(
                &self.path,
                (self.line, error.column()),
                &reason(&error),
                LINES,
            )),
        }
    }
}

/// Returns the parser's reason without the position, which counts from the start of the parsed text.
fn reason(error: &serde_json::Error) -> String {
    let message = error.to_string();
    message
        .split(" at line ")
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// Returns the error for text that is not JSON. Line and column count from 1; `rule` says what the file must contain.
fn json_error(path: &Path, (line, column): (usize, usize), why: &str, rule: &str) -> Error {
    let path = path.display();
    Error::invalid(
        format!("{path}:{line}:{column} is not valid JSON: {why}"),
        rule,
    )
}

/// The elements of an array, parsed one at a time.
struct JsonArray {
    path: PathBuf,
    text: String,
    /// Byte in `text` up to which it is parsed.
    position: usize,
    /// Line of `position`, from 1.
    line: usize,
    /// Byte at which this line begins.
    line_start: usize,
    state: ArrayState,
}

/// The last part of the array that was parsed.
enum ArrayState {
    /// No part of the array was parsed yet.
    Before,
    /// The opening bracket.
    Opened,
    /// An element.
    Element,
    /// The whole array, or an error.
    After,
}

impl Iterator for JsonArray {
    type Item = Result<FileRow, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = self.element().transpose();
        if !matches!(row, Some(Ok(_))) {
            self.state = ArrayState::After;
        }
        row
    }
}

impl JsonArray {
    fn element(&mut self) -> Result<Option<FileRow>, Error> {
        if let ArrayState::Before = self.state {
            self.skip_space();
            self.advance(1);
            self.state = ArrayState::Opened;
        }
        self.skip_space();
        match (&self.state, self.rest().chars().next()) {
            (ArrayState::Before | ArrayState::After, _) => return Ok(None),
            (ArrayState::Opened | ArrayState::Element, Some(']')) => {
                self.advance(1);
                self.skip_space();
                return match self.rest().is_empty() {
                    true => Ok(None),
                    false => Err(self.error(0, 0, "there is more text after the array".into())),
                };
            }
            (ArrayState::Element, Some(',')) => {
                self.advance(1);
                self.skip_space();
            }
            (ArrayState::Element, _) => return Err(self.error(0, 0, "expected `,` or `]`".into())),
            (ArrayState::Opened, _) => {}
        }
        let location = RowLocation::Line(self.line);
        let mut values = Deserializer::from_str(self.rest()).into_iter::<Value>();
        let value = match values.next() {
            Some(Ok(value)) => value,
            Some(Err(error)) => {
                return Err(self.error(error.line(), error.column(), reason(&error)));
            }
            None => return Err(self.error(0, 0, "EOF while parsing a list".into())),
        };
        let length = values.byte_offset();
        self.advance(length);
        self.state = ArrayState::Element;
        match value {
            Value::Object(fields) => Ok(Some(FileRow { location, fields })),
            other => Err(row_error(
                &self.path,
                location,
                format!(
                    "the array contains {}\nhint: each element must be a JSON object",
                    chat::kind(&other)
                ),
            )),
        }
    }

    fn rest(&self) -> &str {
        self.text.get(self.position..).unwrap_or_default()
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.advance(rest.len() - rest.trim_start_matches([' ', '\t', '\n', '\r']).len());
    }

    fn advance(&mut self, bytes: usize) {
        let passed = self.rest().as_bytes().get(..bytes).unwrap_or_default();
        let lines = passed.iter().filter(|byte| **byte == b'\n').count();
        let last = passed.iter().rposition(|byte| *byte == b'\n');
        self.line += lines;
        if let Some(last) = last {
            self.line_start = self.position + last + 1;
        }
        self.position += bytes;
    }

    /// Returns an error at a line and column that count from `position` and from 1.
    fn error(&self, line: usize, column: usize, why: String) -> Error {
        let column = match line {
            0 | 1 => self.position - self.line_start + column.max(1),
            _ => column,
        };
        let line = self.line + line.saturating_sub(1);
        json_error(&self.path, (line, column), &why, ARRAY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: impl AsRef<[u8]>) -> Result<Vec<(RowLocation, Value)>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        std::fs::write(&path, text).unwrap();
        let rows = array_or_lines(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        rows.map(|rows| {
            let value = |row: FileRow| (row.location, Value::Object(row.fields));
            rows.into_iter().map(value).collect()
        })
        .map_err(|error| error.to_string().split_once("p.json").unwrap().1.to_owned())
    }

    fn row(line: usize, text: &str) -> (RowLocation, Value) {
        (RowLocation::Line(line), serde_json::from_str(text).unwrap())
    }

    #[test]
    fn an_array_gives_its_objects_with_their_lines() {
        let expected = [
            row(2, r#"{"a":1}"#),
            row(3, r#"{"a":[2,{"b":"]"}]}"#),
            row(7, "{}"),
        ];
        let text = "\u{feff} [\n{\"a\":1}, \n {\"a\":\n[2,\n{\"b\":\"]\"}]}\r\n,\n{}]\n\n";
        assert_eq!(read(text).unwrap(), expected);
        assert_eq!(read("[]").unwrap(), []);
        assert_eq!(
            read("{\"a\":1}\n\n{}\n").unwrap(),
            [row(1, r#"{"a":1}"#), row(3, "{}")]
        );
    }

    #[test]
    fn a_damaged_array_is_refused_with_line_and_column() {
        for (text, expected) in [
            (
                "[\n{\"a\":1},\n  {\"a\" 2}]",
                ":3:8 is not valid JSON: expected `:`",
            ),
            (
                "[{\"a\":1} {\"a\":2}]",
                ":1:10 is not valid JSON: expected `,` or `]`",
            ),
            (
                "[{\"a\":1},\n",
                ":2:1 is not valid JSON: EOF while parsing a list",
            ),
            (
                "[{\"a\":1}\n",
                ":2:1 is not valid JSON: expected `,` or `]`",
            ),
            (
                "[{\"a\":1}]\nx",
                ":2:1 is not valid JSON: there is more text after the array",
            ),
            (
                "[{\n\"a\":\n\"b}]",
                ":3:4 is not valid JSON: EOF while parsing a string",
            ),
            ("[", ":1:2 is not valid JSON: EOF while parsing a list"),
        ] {
            let expected = format!("{expected}\nhint: the file must be one array of JSON objects");
            assert_eq!(read(text).unwrap_err(), expected, "{text}");
        }
        assert_eq!(
            read("[{},\n3]").unwrap_err(),
            ":2: the array contains a number\nhint: each element must be a JSON object"
        );
        assert_eq!(
            read(b"[{},\n {\"a\": \"\xff\"}]").unwrap_err(),
            ":2:9 is not valid UTF-8\nhint: convert the file to UTF-8"
        );
    }
}
