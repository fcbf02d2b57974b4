//! Rows from JSON: an object on each line, or one array of objects.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::{Deserializer, Value};

use super::row::Row;
use super::{Rows, open};
use crate::chat;
use crate::error::Error;
use crate::error::RowLocation;

const LINES: &str = "each line must be one whole JSON object";
const ARRAY: &str = "the file must be one array of JSON objects";
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// An object on each line; blank lines are left out.
pub(super) fn lines(path: &Path) -> Result<Rows, Error> {
    Ok(Box::new(Lines {
        path: path.to_path_buf(),
        reader: BufReader::new(open(path)?),
        bytes: Vec::new(),
        line: 0,
    }))
}

/// One array of objects, or an object on each line: the first character says which.
pub(super) fn array_or_lines(path: &Path) -> Result<Rows, Error> {
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
        Error::NotUtf8 {
            path: path.to_path_buf(),
            line: before.iter().filter(|byte| **byte == b'\n').count() + 1,
            column: valid - line_start + 1,
        }
    })?;
    if !text
        .get(start..)
        .unwrap_or_default()
        .trim_start()
        .starts_with('[')
    {
        return lines(path);
    }
    Ok(Box::new(Elements {
        path: path.to_path_buf(),
        text,
        position: start,
        line: 1,
        line_start: 0,
        state: State::Before,
    }))
}

struct Lines {
    path: PathBuf,
    reader: BufReader<Box<dyn Read>>,
    bytes: Vec<u8>,
    line: usize,
}

impl Iterator for Lines {
    type Item = Result<Row, Error>;

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

impl Lines {
    fn row(&self) -> Result<Option<Row>, Error> {
        let mut bytes = self.bytes.as_slice();
        if self.line == 1 {
            bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
        }
        let text = std::str::from_utf8(bytes).map_err(|error| Error::NotUtf8 {
            path: self.path.clone(),
            line: self.line,
            column: error.valid_up_to() + 1,
        })?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        let place = RowLocation::Line(self.line);
        match serde_json::from_str(text.trim_end()) {
            Ok(Value::Object(fields)) => Ok(Some(Row { place, fields })),
            Ok(other) => Err(Error::BadPrompt {
                path: self.path.clone(),
                place,
                why: format!(
                    "the line is {}; each must be a JSON object",
                    chat::kind(&other)
                ),
            }),
            Err(error) => Err(Error::BadJson {
                path: self.path.clone(),
                line: self.line,
                column: error.column(),
                why: reason(&error),
                rule: LINES,
            }),
        }
    }
}

/// The parser's reason without its place, which is counted from where it began.
fn reason(error: &serde_json::Error) -> String {
    let message = error.to_string();
    message
        .split(" at line ")
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// The elements of an array, each parsed when its turn comes.
struct Elements {
    path: PathBuf,
    text: String,
    /// Byte of `text`.
    position: usize,
    /// The line of `position`, from 1, and the byte where it begins.
    line: usize,
    line_start: usize,
    state: State,
}

/// What stands before `position`.
enum State {
    /// Nothing.
    Before,
    /// The bracket that opens the array.
    Opened,
    /// An element.
    Element,
    /// All there is to read.
    After,
}

impl Iterator for Elements {
    type Item = Result<Row, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = self.element().transpose();
        if !matches!(row, Some(Ok(_))) {
            self.state = State::After;
        }
        row
    }
}

impl Elements {
    fn element(&mut self) -> Result<Option<Row>, Error> {
        if let State::Before = self.state {
            self.skip_space();
            self.advance(1);
            self.state = State::Opened;
        }
        self.skip_space();
        match (&self.state, self.rest().chars().next()) {
            (State::Before | State::After, _) => return Ok(None),
            (State::Opened | State::Element, Some(']')) => {
                self.advance(1);
                self.skip_space();
                return match self.rest().is_empty() {
                    true => Ok(None),
                    false => Err(self.bad(0, 0, "there is more behind the array".into())),
                };
            }
            (State::Element, Some(',')) => {
                self.advance(1);
                self.skip_space();
            }
            (State::Element, _) => return Err(self.bad(0, 0, "expected `,` or `]`".into())),
            (State::Opened, _) => {}
        }
        let place = RowLocation::Line(self.line);
        let mut values = Deserializer::from_str(self.rest()).into_iter::<Value>();
        let value = match values.next() {
            Some(Ok(value)) => value,
            Some(Err(error)) => {
                return Err(self.bad(error.line(), error.column(), reason(&error)));
            }
            None => return Err(self.bad(0, 0, "EOF while parsing a list".into())),
        };
        let length = values.byte_offset();
        self.advance(length);
        self.state = State::Element;
        match value {
            Value::Object(fields) => Ok(Some(Row { place, fields })),
            other => Err(Error::BadPrompt {
                path: self.path.clone(),
                place,
                why: format!(
                    "the array holds {}; each element must be a JSON object",
                    chat::kind(&other)
                ),
            }),
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

    /// An error at a place that is counted from `position`, line and column from 1.
    fn bad(&self, line: usize, column: usize, why: String) -> Error {
        let column = match line {
            0 | 1 => self.position - self.line_start + column.max(1),
            _ => column,
        };
        Error::BadJson {
            path: self.path.clone(),
            line: self.line + line.saturating_sub(1),
            column,
            why,
            rule: ARRAY,
        }
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
            let value = |row: Row| (row.place, Value::Object(row.fields));
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
    fn a_damaged_array_is_refused_with_its_place() {
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
                ":2:1 is not valid JSON: there is more behind the array",
            ),
            (
                "[{\n\"a\":\n\"b}]",
                ":3:4 is not valid JSON: EOF while parsing a string",
            ),
            ("[", ":1:2 is not valid JSON: EOF while parsing a list"),
        ] {
            let expected = format!("{expected}; the file must be one array of JSON objects");
            assert_eq!(read(text).unwrap_err(), expected, "{text}");
        }
        assert_eq!(
            read("[{},\n3]").unwrap_err(),
            ":2: the array holds a number; each element must be a JSON object"
        );
        assert_eq!(
            read(b"[{},\n {\"a\": \"\xff\"}]").unwrap_err(),
            ":2:9 is not valid UTF-8: convert the file to UTF-8"
        );
    }
}
