//! Reader of the bytes of a text file by lines and by JSON values, with a bound on each.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use super::file::{TextReader, open, read_error, row_too_long, too_blank};
use crate::error::{Error, RowLocation};
use crate::limits::IMPORT_BLANK_BYTES;

/// The rest of a text file.
pub(super) struct Text {
    path: PathBuf,
    reader: TextReader,
    /// Most bytes of a line or value.
    limit: usize,
    /// Line of the next byte, from 1.
    pub(super) line: usize,
    /// Column of the next byte, in bytes and from 1.
    pub(super) column: usize,
}

/// The state of a scan of the bytes of a JSON value.
struct ValueScan {
    /// Number of open brackets; `None` in a number or a word, which ends before the next delimiter.
    depth: Option<usize>,
    in_text: bool,
    is_escaped: bool,
}

impl ValueScan {
    fn new(depth: Option<usize>) -> ValueScan {
        ValueScan {
            depth,
            in_text: false,
            is_escaped: false,
        }
    }

    /// Looks at the next bytes, and returns the end of the value if it is among them.
    fn end(&mut self, bytes: &[u8]) -> Option<usize> {
        for (index, byte) in bytes.iter().enumerate() {
            if self.in_text {
                match byte {
                    _ if self.is_escaped => self.is_escaped = false,
                    b'\\' => self.is_escaped = true,
                    b'"' if self.depth == Some(0) => return Some(index + 1),
                    b'"' => self.in_text = false,
                    _ => {}
                }
                continue;
            }
            match (byte, self.depth) {
                (b'"', depth) => {
                    self.in_text = true;
                    self.depth = depth.or(Some(0));
                }
                (b'{' | b'[', depth) => self.depth = Some(depth.unwrap_or(0) + 1),
                (b'}' | b']', Some(depth)) if depth > 1 => self.depth = Some(depth - 1),
                (b'}' | b']', Some(_)) => return Some(index + 1),
                (b',' | b':' | b'}' | b']' | b' ' | b'\t' | b'\r' | b'\n', None) => {
                    return Some(index);
                }
                _ => {}
            }
        }
        None
    }
}

impl Text {
    pub(super) fn open(path: &Path, limit: usize) -> Result<Text, Error> {
        Ok(Text {
            path: path.to_path_buf(),
            reader: open(path)?,
            limit,
            line: 1,
            column: 1,
        })
    }

    /// Skips spaces and line ends, and returns the next byte, or `None` at the end of the file.
    pub(super) fn skip_blank(&mut self) -> Result<Option<u8>, Error> {
        let mut blank = 0;
        loop {
            let buffer = self.reader.fill_buf().map_err(read_error(&self.path))?;
            let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
            let end = buffer.iter().position(|byte| !is_blank(byte));
            let next = end.and_then(|end| buffer.get(end)).copied();
            let skipped = end.unwrap_or(buffer.len());
            let at_end = buffer.is_empty();
            let passed = buffer.get(..skipped).unwrap_or_default();
            (self.line, self.column) = after(passed, (self.line, self.column));
            self.reader.consume(skipped);
            blank += skipped;
            if next.is_some() || at_end {
                return Ok(next);
            }
            if blank > IMPORT_BLANK_BYTES {
                return Err(too_blank(&self.path, RowLocation::Line(self.line)));
            }
        }
    }

    /// Skips one byte that [`skip_blank`](Text::skip_blank) returned.
    pub(super) fn skip_byte(&mut self) {
        self.reader.consume(1);
        self.column += 1;
    }

    /// Reads the rest of the line into `bytes`, without the line feed.
    pub(super) fn read_line(&mut self, bytes: &mut Vec<u8>) -> Result<(), Error> {
        bytes.clear();
        let most = self.limit as u64 + 1;
        let mut line = self.reader.by_ref().take(most);
        let found = line.read_until(b'\n', bytes);
        found.map_err(read_error(&self.path))?;
        if bytes.pop_if(|last| *last == b'\n').is_some() {
            self.line += 1;
            self.column = 1;
        } else if bytes.len() > self.limit {
            return Err(self.too_long(self.line));
        } else {
            self.column += bytes.len();
        }
        Ok(())
    }

    /// Reads the JSON value that begins at the next byte into `bytes`. Only brackets and quotes are looked at, so the
    /// bytes need not be JSON; at the end of the file they may be a part of a value.
    pub(super) fn read_value(&mut self, bytes: &mut Vec<u8>) -> Result<(), Error> {
        bytes.clear();
        self.pass_value(ValueScan::new(None), Some(bytes))
    }

    /// Skips the rest of an array or object whose opening bracket was read, with the closing one.
    pub(super) fn skip_nested(&mut self) -> Result<(), Error> {
        self.pass_value(ValueScan::new(Some(1)), None)
    }

    /// Skips the JSON value that begins at the next byte.
    pub(super) fn skip_value(&mut self) -> Result<(), Error> {
        self.pass_value(ValueScan::new(None), None)
    }

    fn pass_value(
        &mut self,
        mut scan: ValueScan,
        mut kept: Option<&mut Vec<u8>>,
    ) -> Result<(), Error> {
        let first_line = self.line;
        loop {
            let buffer = self.reader.fill_buf().map_err(read_error(&self.path))?;
            if buffer.is_empty() {
                return Ok(());
            }
            let end = scan.end(buffer);
            let length = end.unwrap_or(buffer.len());
            let passed = buffer.get(..length).unwrap_or_default();
            if let Some(kept) = &mut kept {
                kept.extend_from_slice(passed);
            }
            (self.line, self.column) = after(passed, (self.line, self.column));
            self.reader.consume(length);
            if kept.as_ref().is_some_and(|kept| kept.len() > self.limit) {
                return Err(self.too_long(first_line));
            }
            if end.is_some() {
                return Ok(());
            }
        }
    }

    fn too_long(&self, line: usize) -> Error {
        row_too_long(&self.path, RowLocation::Line(line), self.limit, "")
    }
}

/// Returns the line and column behind `passed` bytes.
fn after(passed: &[u8], (line, column): (usize, usize)) -> (usize, usize) {
    let lines = passed.iter().filter(|byte| **byte == b'\n').count();
    match passed.iter().rposition(|byte| *byte == b'\n') {
        Some(last) => (line + lines, passed.len() - last),
        None => (line, column + passed.len()),
    }
}
