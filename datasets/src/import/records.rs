//! Splits the text of a CSV file into records and cells, with a bound on the length of a record.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use super::file::{TextReader, read_error, row_error, row_too_long, too_blank};
use crate::error::{Error, RowLocation};
use crate::limits::IMPORT_BLANK_BYTES;

/// The rest of the records.
pub(super) struct Records {
    path: PathBuf,
    reader: TextReader,
    delimiter: u8,
    /// Most bytes of a record; each cell counts as one byte more.
    limit: usize,
    lines: LineCount,
}

/// Counts lines that end with LF, CR or CRLF.
#[derive(Debug, Clone, Copy)]
struct LineCount {
    /// Line of the next byte, from 1.
    line: usize,
    /// Whether the last byte was a carriage return, so that a line feed does not begin another line.
    after_return: bool,
}

impl LineCount {
    /// Passes a byte, and returns whether it ends a line.
    fn pass(&mut self, byte: u8) -> bool {
        match byte {
            b'\n' if self.after_return => {}
            b'\n' | b'\r' => self.line += 1,
            _ => {}
        }
        self.after_return = byte == b'\r';
        matches!(byte, b'\n' | b'\r')
    }
}

/// A record.
#[derive(Debug, Default)]
pub(super) struct CellRecord {
    /// The bytes of all cells, without quotes and delimiters.
    pub(super) bytes: Vec<u8>,
    /// The end of each cell in `bytes`.
    pub(super) ends: Vec<usize>,
    /// The line in which the record begins, from 1.
    pub(super) line: usize,
}

impl CellRecord {
    pub(super) fn cells(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(&0).chain(&self.ends);
        let spans = starts.zip(&self.ends);
        spans.map(|(start, end)| self.bytes.get(*start..*end).unwrap_or_default())
    }
}

/// The part of a record that the next byte belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The start of a cell.
    Start,
    /// A cell without quotes.
    Plain,
    /// A cell in quotes, which were opened in this line.
    Quoted(usize),
    /// The byte after a quote in a cell in quotes, which were opened in this line.
    AfterQuote(usize),
}

impl Records {
    pub(super) fn new(path: &Path, reader: TextReader, delimiter: u8, limit: usize) -> Records {
        Records {
            path: path.to_path_buf(),
            reader,
            delimiter,
            limit,
            lines: LineCount {
                line: 1,
                after_return: false,
            },
        }
    }

    /// Reads the next record; `false` at the end of the file.
    pub(super) fn read(&mut self, record: &mut CellRecord) -> Result<bool, Error> {
        record.bytes.clear();
        record.ends.clear();
        if !self.skip_line_ends()? {
            return Ok(false);
        }
        record.line = self.lines.line;
        let mut part = Part::Start;
        loop {
            let buffer = self.reader.fill_buf().map_err(read_error(&self.path))?;
            if buffer.is_empty() {
                break;
            }
            let (used, is_whole) =
                split(buffer, self.delimiter, &mut part, &mut self.lines, record).map_err(
                    |why| row_error(&self.path, RowLocation::Line(self.lines.line), why),
                )?;
            self.reader.consume(used);
            if record.bytes.len() + record.ends.len() > self.limit {
                return Err(self.too_long(record.line, part));
            }
            if is_whole {
                record.ends.push(record.bytes.len());
                return Ok(true);
            }
        }
        if let Part::Quoted(line) = part {
            let why = "a cell begins with a quote that is not closed\nhint: close it, and write a quote inside a cell in quotes twice";
            return Err(row_error(&self.path, RowLocation::Line(line), why));
        }
        record.ends.push(record.bytes.len());
        Ok(true)
    }

    /// Skips line ends; `false` at the end of the file.
    fn skip_line_ends(&mut self) -> Result<bool, Error> {
        let mut blank = 0;
        loop {
            let buffer = self.reader.fill_buf().map_err(read_error(&self.path))?;
            let is_line_end = |byte: &&u8| matches!(byte, b'\r' | b'\n');
            let (mut skipped, length) = (0, buffer.len());
            for byte in buffer.iter().take_while(is_line_end) {
                self.lines.pass(*byte);
                skipped += 1;
            }
            self.reader.consume(skipped);
            blank += skipped;
            if skipped < length || length == 0 {
                return Ok(length > 0);
            }
            if blank > IMPORT_BLANK_BYTES {
                return Err(too_blank(&self.path, RowLocation::Line(self.lines.line)));
            }
        }
    }

    fn too_long(&self, line: usize, part: Part) -> Error {
        let why = match part {
            Part::Quoted(opened) => {
                format!("; a quote that is opened in line {opened} may not be closed")
            }
            _ => String::new(),
        };
        row_too_long(&self.path, RowLocation::Line(line), self.limit, &why)
    }
}

/// Adds bytes to a record up to its end. Returns the number of bytes and whether the record ends with them.
fn split(
    bytes: &[u8],
    delimiter: u8,
    part: &mut Part,
    lines: &mut LineCount,
    record: &mut CellRecord,
) -> Result<(usize, bool), &'static str> {
    let special = |byte: &u8| matches!(byte, b'"' | b'\r' | b'\n' | 0) || *byte == delimiter;
    let mut used = 0;
    while let Some(byte) = bytes.get(used).copied() {
        if matches!(part, Part::Plain | Part::Quoted(_)) && !special(&byte) {
            let rest = bytes.get(used..).unwrap_or_default();
            let length = rest.iter().position(special).unwrap_or(rest.len());
            record.bytes.extend(rest.get(..length).unwrap_or_default());
            used += length;
            lines.after_return = false;
            continue;
        }
        used += 1;
        let is_line_end = lines.pass(byte);
        *part = match (*part, byte) {
            (_, 0) => return Err(NUL),
            (Part::Quoted(line), b'"') => Part::AfterQuote(line),
            (Part::Quoted(line), _) | (Part::AfterQuote(line), b'"') => {
                record.bytes.push(byte);
                Part::Quoted(line)
            }
            (Part::Start, b'"') => Part::Quoted(lines.line),
            (_, byte) if byte == delimiter => {
                record.ends.push(record.bytes.len());
                Part::Start
            }
            _ if is_line_end => return Ok((used, true)),
            (Part::AfterQuote(_), _) => return Err(AFTER_QUOTE),
            _ => {
                record.bytes.push(byte);
                Part::Plain
            }
        };
    }
    Ok((used, false))
}

const NUL: &str = "the line has a NUL byte, so it is not text in UTF-8\nhint: if it is UTF-16, convert it with `iconv -f UTF-16 -t UTF-8 FILE > NEW`";
const AFTER_QUOTE: &str = "there is text after the closing quote of a cell\nhint: write a quote inside a cell in quotes twice (`\"\"`)";

#[cfg(test)]
mod tests {
    use std::io::{BufReader, Cursor, Read};

    use super::*;

    /// The records of a text, each with its line, read in chunks of `chunk` bytes.
    fn read(text: &str, chunk: usize) -> Result<Vec<(usize, Vec<String>)>, String> {
        let bytes: Box<dyn Read> = Box::new(Cursor::new(text.as_bytes().to_vec()));
        let reader = BufReader::with_capacity(chunk, bytes);
        let mut records = Records::new(Path::new("p"), reader, b',', 50);
        let (mut found, mut record) = (Vec::new(), CellRecord::default());
        while records
            .read(&mut record)
            .map_err(|error| error.to_string())?
        {
            let cells = record
                .cells()
                .map(|cell| String::from_utf8_lossy(cell).into_owned());
            found.push((record.line, cells.collect()));
        }
        Ok(found)
    }

    #[test]
    fn records_have_quotes_and_line_ends() {
        type Rows<'a> = &'a [(usize, &'a [&'a str])];
        let cases: [(&str, Rows<'_>); 7] = [
            ("", &[]),
            ("\n\r\n\r", &[]),
            ("a,b\nc,d", &[(1, &["a", "b"]), (2, &["c", "d"])]),
            ("a,\r\n\r\n,b\r\n", &[(1, &["a", ""]), (3, &["", "b"])]),
            ("a\rb\r\rc", &[(1, &["a"]), (2, &["b"]), (4, &["c"])]),
            (
                "\"a\"\"\",\"\r\n,\"\n\"\",x\"y\n",
                &[(1, &["a\"", "\r\n,"]), (3, &["", "x\"y"])],
            ),
            ("\"a\n\nb\"\nc", &[(1, &["a\n\nb"]), (4, &["c"])]),
        ];
        for (text, expected) in cases {
            for chunk in [1, 2, 3, 64] {
                let found = read(text, chunk).unwrap();
                let found: Vec<(usize, Vec<&str>)> = found
                    .iter()
                    .map(|(line, cells)| (*line, cells.iter().map(String::as_str).collect()))
                    .collect();
                let expected: Vec<(usize, Vec<&str>)> = expected
                    .iter()
                    .map(|(line, cells)| (*line, cells.to_vec()))
                    .collect();
                assert_eq!(found, expected, "{text:?}");
            }
        }
    }

    #[test]
    fn broken_and_long_records_are_refused() {
        let refused = |text: &str, expected: &str| {
            for chunk in [1, 7, 64] {
                let error = read(text, chunk).unwrap_err();
                assert!(error.starts_with(expected), "{error}");
            }
        };
        refused(
            "a\n\"b\nc",
            "p:2: a cell begins with a quote that is not closed\nhint: ",
        );
        refused(
            "a\n\"b\" c",
            "p:2: there is text after the closing quote of a cell\nhint: ",
        );
        refused("a\nb\0", "p:2: the line has a NUL byte");
        let long = "x".repeat(200);
        refused(
            &format!("a\n{long}"),
            "p:2: the row is longer than 50 bytes\nhint: ",
        );
        refused(
            &format!("a\n\"{long}"),
            "p:2: the row is longer than 50 bytes; a quote that is opened in line 2 may not be closed\nhint: ",
        );
        refused(&",".repeat(200), "p:1: the row is longer than 50 bytes");
    }
}
