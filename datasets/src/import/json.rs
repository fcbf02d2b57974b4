//! Reader of JSON files, which have an object on each line, one array of objects, or one object around such an array.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::encoding::utf8_error;
use super::file::row_error;
use super::json_value::{JsonProblem, parse};
use super::row::{FileRow, RowIterator};
use super::text::Text;
use crate::chat;
use crate::error::{Error, RowLocation};

const LINES: &str = "each line must be one whole JSON object";
const ARRAY: &str = "the file must be one array of JSON objects";
const WRAPPED: &str = "the file must be one JSON object with one array of objects";

/// Reads an object of at most `limit` bytes from each line; blank lines are skipped.
pub(super) fn lines(path: &Path, limit: usize) -> Result<RowIterator, Error> {
    Ok(Box::new(JsonLines {
        path: path.to_path_buf(),
        text: Text::open(path, limit)?,
        bytes: Vec::new(),
    }))
}

/// Reads a `.json` file. Its start tells whether it is an array of objects, an object on each line, or one object around
/// an array of objects, as APIs return it (`{"data": [{…}, …]}`).
pub(super) fn rows(path: &Path, limit: usize) -> Result<RowIterator, Error> {
    let mut text = Text::open(path, limit)?;
    match text.skip_blank()? {
        Some(b'[') => {
            text.skip_byte();
            Ok(Box::new(JsonArray::new(path, text, ARRAY)))
        }
        Some(b'{') if !begins_with_row(text)? => wrapped(path, limit),
        _ => lines(path, limit),
    }
}

/// Returns whether the first line is a whole object and a row of its own.
fn begins_with_row(mut text: Text) -> Result<bool, Error> {
    let mut bytes = Vec::new();
    match text.read_line(&mut bytes) {
        Ok(()) => {}
        // The line is too long for a row, and may be an object around an array.
        Err(Error::Invalid { .. }) => return Ok(false),
        Err(error) => return Err(error),
    }
    let Ok(line) = std::str::from_utf8(&bytes) else {
        return Ok(true);
    };
    match parse(line.trim_end()) {
        Ok(Value::Object(fields)) => {
            let is_array = |(key, value): (&String, &Value)| {
                let items = value.as_array();
                items.is_some_and(|items| items.first().is_some_and(|item| is_row(key, item)))
            };
            Ok(text.skip_blank()?.is_some() || !fields.iter().any(is_array))
        }
        Ok(_) => Ok(true),
        Err(problem) => Ok(!problem.is_cut_off),
    }
}

/// Whether an element of the array `key` may be a row. Messages of a chat are parts of a row, and the Hub's viewer writes
/// a list of the columns beside the rows.
fn is_row(key: &str, item: &Value) -> bool {
    let is_part = |name: &str| item.get(name).is_some();
    let is_column = key == "features" && is_part("feature_idx");
    item.is_object() && !is_part("role") && !is_part("from") && !is_column
}

/// Reads the array of objects in an object.
fn wrapped(path: &Path, limit: usize) -> Result<RowIterator, Error> {
    let mut arrays = Vec::new();
    let mut members = Members::open(path, limit)?;
    while let Some(key) = members.next_key()? {
        if members.skip_value(&key)? {
            arrays.push(key);
        }
    }
    let key = match arrays.as_slice() {
        [] => return lines(path, limit),
        [key] => key,
        [first, second, ..] => {
            let problem = format!(
                "{} has more than one array of objects: `{first}` and `{second}`",
                path.display()
            );
            let hint = format!(
                "write the rows to a file of their own, for example with `jq -c '.{first}[]' FILE > rows.jsonl`"
            );
            return Err(Error::invalid(problem, hint));
        }
    };
    let mut members = Members::open(path, limit)?;
    while let Some(found) = members.next_key()? {
        if found == *key {
            members.text.skip_blank()?;
            members.text.skip_byte();
            return Ok(Box::new(JsonArray::new(path, members.text, WRAPPED)));
        }
        members.skip_value(&found)?;
    }
    lines(path, limit)
}

/// The members of an object that is the whole file.
struct Members {
    path: PathBuf,
    text: Text,
    bytes: Vec<u8>,
    is_first: bool,
}

impl Members {
    fn open(path: &Path, limit: usize) -> Result<Members, Error> {
        Ok(Members {
            path: path.to_path_buf(),
            text: Text::open(path, limit)?,
            bytes: Vec::new(),
            is_first: true,
        })
    }

    /// Returns the next key, or `None` after the last member. The value comes next.
    fn next_key(&mut self) -> Result<Option<String>, Error> {
        if self.is_first {
            self.expect(b'{')?;
        }
        match self.text.skip_blank()? {
            Some(b'}') => {
                self.text.skip_byte();
                return match self.text.skip_blank()? {
                    None => Ok(None),
                    Some(_) => Err(self.error("there is more text after the object")),
                };
            }
            Some(b',') if !self.is_first => self.text.skip_byte(),
            _ => {}
        }
        self.is_first = false;
        self.text.skip_blank()?;
        self.text.read_value(&mut self.bytes)?;
        let key = std::str::from_utf8(&self.bytes).ok().map(parse);
        match key {
            Some(Ok(Value::String(key))) => {
                self.expect(b':')?;
                Ok(Some(key))
            }
            _ if self.text.skip_blank()?.is_none() => {
                Err(self.error("EOF while parsing an object"))
            }
            _ => Err(self.error("expected a key and its value")),
        }
    }

    fn expect(&mut self, byte: u8) -> Result<(), Error> {
        match self.text.skip_blank()? {
            Some(found) if found == byte => {
                self.text.skip_byte();
                Ok(())
            }
            None => Err(self.error("EOF while parsing an object")),
            Some(_) => Err(self.error(&format!("expected `{}`", char::from(byte)))),
        }
    }

    /// Skips the value of a key, and returns whether it is an array of rows.
    fn skip_value(&mut self, key: &str) -> Result<bool, Error> {
        if self.text.skip_blank()? != Some(b'[') {
            self.text.skip_value()?;
            return Ok(false);
        }
        self.text.skip_byte();
        let mut is_array_of_rows = false;
        if self.text.skip_blank()? == Some(b'{') {
            self.text.read_value(&mut self.bytes)?;
            let first = std::str::from_utf8(&self.bytes).ok().map(parse);
            // An element that cannot be parsed is reported when the array is read.
            is_array_of_rows = match first {
                Some(Ok(item)) => is_row(key, &item),
                _ => true,
            };
        }
        self.text.skip_nested()?;
        Ok(is_array_of_rows)
    }

    fn error(&self, why: &str) -> Error {
        let position = (self.text.line, self.text.column);
        json_error(&self.path, position, why, WRAPPED)
    }
}

struct JsonLines {
    path: PathBuf,
    text: Text,
    bytes: Vec<u8>,
}

impl Iterator for JsonLines {
    type Item = Result<FileRow, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.row().transpose()
    }
}

impl JsonLines {
    fn row(&mut self) -> Result<Option<FileRow>, Error> {
        loop {
            if self.text.skip_blank()?.is_none() {
                return Ok(None);
            }
            let start = (self.text.line, self.text.column);
            self.text.read_line(&mut self.bytes)?;
            let location = RowLocation::Line(start.0);
            let value = match parsed(&self.path, &self.bytes, start, LINES)? {
                // Spaces that are not ASCII's.
                None => continue,
                Some(value) => value,
            };
            return match value {
                Value::Object(fields) => Ok(Some(FileRow {
                    location,
                    bytes: self.bytes.len(),
                    fields,
                })),
                other => {
                    let found = chat::kind(&other);
                    let why = format!("the line is {found}\nhint: each line must be a JSON object");
                    Err(row_error(&self.path, location, why))
                }
            };
        }
    }
}

/// Parses the bytes of a value that begin at `start`, a line and a column. Blank text gives `None`. `rule` says what the
/// file must contain.
fn parsed(
    path: &Path,
    bytes: &[u8],
    start: (usize, usize),
    rule: &str,
) -> Result<Option<Value>, Error> {
    let at = |line: usize, column: usize| match line {
        0 | 1 => (start.0, start.1 + column.max(1) - 1),
        _ => (start.0 + line - 1, column),
    };
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let before = bytes.get(..error.valid_up_to()).unwrap_or_default();
        let lines = before.iter().filter(|byte| **byte == b'\n').count();
        let line_start = before.iter().rposition(|byte| *byte == b'\n');
        let (line, column) = at(
            lines + 1,
            before.len() - line_start.map_or(0, |last| last + 1) + 1,
        );
        utf8_error(path, &format!(":{line}:{column}"), bytes)
    })?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    match parse(text.trim_end()) {
        Ok(value) => Ok(Some(value)),
        Err(JsonProblem {
            line, column, why, ..
        }) => Err(json_error(path, at(line, column), &why, rule)),
    }
}

/// Returns the error for text that is not JSON. Line and column count from 1; `rule` says what the file must contain.
fn json_error(path: &Path, (line, column): (usize, usize), why: &str, rule: &str) -> Error {
    let path = path.display();
    Error::invalid(
        format!("{path}:{line}:{column} is not valid JSON: {why}"),
        rule,
    )
}

/// The elements of an array, read one at a time.
struct JsonArray {
    path: PathBuf,
    text: Text,
    bytes: Vec<u8>,
    state: ArrayState,
    rule: &'static str,
}

/// The last part of the array that was read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ArrayState {
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
        if self.state == ArrayState::After {
            return None;
        }
        let row = self.element().transpose();
        if !matches!(row, Some(Ok(_))) {
            self.state = ArrayState::After;
        }
        row
    }
}

impl JsonArray {
    /// The elements behind an opening bracket that was read.
    fn new(path: &Path, text: Text, rule: &'static str) -> JsonArray {
        JsonArray {
            path: path.to_path_buf(),
            text,
            bytes: Vec::new(),
            state: ArrayState::Opened,
            rule,
        }
    }

    fn element(&mut self) -> Result<Option<FileRow>, Error> {
        match (self.text.skip_blank()?, self.state) {
            (Some(b']'), _) => {
                self.text.skip_byte();
                // The rest of an object around the array was looked at before.
                return match self.rule == WRAPPED || self.text.skip_blank()?.is_none() {
                    true => Ok(None),
                    false => Err(self.error("there is more text after the array")),
                };
            }
            (Some(b','), ArrayState::Element) => {
                self.text.skip_byte();
                self.text.skip_blank()?;
            }
            (_, ArrayState::Element) => return Err(self.error("expected `,` or `]`")),
            _ => {}
        }
        let start = (self.text.line, self.text.column);
        let location = RowLocation::Line(start.0);
        self.text.read_value(&mut self.bytes)?;
        let value = match parsed(&self.path, &self.bytes, start, self.rule)? {
            Some(value) => value,
            None if self.text.skip_blank()?.is_none() => {
                return Err(self.error("EOF while parsing a list"));
            }
            None => return Err(self.error("expected value")),
        };
        self.state = ArrayState::Element;
        let Value::Object(fields) = value else {
            let found = chat::kind(&value);
            let why =
                format!("the array contains {found}\nhint: each element must be a JSON object");
            return Err(row_error(&self.path, location, why));
        };
        let fields = match self.rule == WRAPPED {
            true => without_viewer(fields).map_err(|why| row_error(&self.path, location, why))?,
            false => fields,
        };
        Ok(Some(FileRow {
            location,
            bytes: self.bytes.len(),
            fields,
        }))
    }

    fn error(&self, why: &str) -> Error {
        let position = (self.text.line, self.text.column);
        json_error(&self.path, position, why, self.rule)
    }
}

/// Returns the row in an element of the form that the Hub's viewer returns: `{"row_idx": …, "row": {…}}`.
fn without_viewer(mut fields: Map<String, Value>) -> Result<Map<String, Value>, &'static str> {
    if !fields.contains_key("row_idx") {
        return Ok(fields);
    }
    let cut = fields.get("truncated_cells").and_then(Value::as_array);
    if cut.is_some_and(|cells| !cells.is_empty()) {
        return Err(
            "the viewer that wrote the file cut cells of this row off\nhint: fetch the data set's own files",
        );
    }
    match fields.swap_remove("row") {
        Some(Value::Object(row)) => Ok(row),
        Some(other) => {
            fields.insert("row".to_owned(), other);
            Ok(fields)
        }
        None => Ok(fields),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: impl AsRef<[u8]>) -> Result<Vec<(RowLocation, Value)>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        std::fs::write(&path, text).unwrap();
        let rows = rows(&path, 1000).and_then(Iterator::collect::<Result<Vec<_>, _>>);
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
            ":2:9 is not valid UTF-8; it looks like Latin-1 (ISO 8859-1) or Windows-1252\nhint: convert the file to UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW`"
        );
    }

    #[test]
    fn an_object_around_an_array_gives_the_objects_of_the_array() {
        let expected = [row(1, r#"{"a":1}"#), row(2, r#"{"a":2}"#)];
        for text in [
            "{\"data\": [{\"a\":1},\n{\"a\":2}]}",
            "{\"n\": 2, \"x\": {\"y\": [1]}, \"ids\": [1, 2], \"none\": [], \"rows\": [{\"a\":1},\n {\"a\":2}], \"more\": \"]}\"}\n",
            "{\"features\":[{\"feature_idx\":0,\"name\":\"a\"}],\"rows\":[{\"row_idx\":0,\"row\":{\"a\":1},\"truncated_cells\":[]},\n{\"row_idx\":1,\"row\":{\"a\":2},\"truncated_cells\":[]}]}",
        ] {
            assert_eq!(read(text).unwrap(), expected, "{text}");
        }
        // An array that is longer than a row may be.
        let many = format!("{{\"data\": [{}{{}}]}}", "{\"a\":1},\n".repeat(1000));
        assert_eq!(read(many).unwrap().len(), 1001);
        // Objects with messages are rows, not objects around rows.
        let chat = r#"{"messages":[{"role":"user","content":"a"}]}"#;
        assert_eq!(read(chat).unwrap(), [row(1, chat)]);
        let two = read("{\"a\":[{}],\n\"b\":[{}]}").unwrap_err();
        assert!(
            two.starts_with(" has more than one array of objects: `a` and `b`\nhint: "),
            "{two}"
        );
        let cut = read(r#"{"rows":[{"row_idx":0,"row":{"a":"x"},"truncated_cells":["a"]}]}"#);
        assert!(cut.unwrap_err().contains("cut cells of this row off"));
        for broken in [
            "{\"data\":[{\"a\":1},\n{\"a\":2}]",
            "{\"data\":[{\"a\":1},\n{\"a",
            "{\"data\":[{\"a\":1}]\n,,}",
        ] {
            let error = read(broken).unwrap_err();
            assert!(error.contains("is not valid JSON"), "{error}");
        }
    }

    #[test]
    fn an_element_may_not_be_longer_than_a_row() {
        let long = format!("[{{}},\n{{\"a\":\"{}\"}}]", "x".repeat(1000));
        let error = read(long).unwrap_err();
        assert!(
            error.starts_with(":2: the row is longer than 1000 bytes\nhint: "),
            "{error}"
        );
    }
}
