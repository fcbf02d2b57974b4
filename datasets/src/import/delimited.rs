//! Reader of CSV and TSV files. Every cell is text.

use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use csv::{ErrorKind, Position, ReaderBuilder, StringRecord, StringRecordsIntoIter};
use serde_json::Value;

use super::file::{open, row_error};
use super::row::{FileRow, RowIterator};
use crate::error::{Error, RowLocation};

/// Reads the rows below the header, which names the columns.
pub(super) fn rows(path: &Path, delimiter: u8) -> Result<RowIterator, Error> {
    let mut reader = ReaderBuilder::new()
        .delimiter(delimiter)
        .from_reader(open(path)?);
    let header = reader
        .headers()
        .map_err(|error| unreadable(path, RowLocation::Line(1), error))?
        .clone();
    let mut names = header.iter();
    while let Some(name) = names.next() {
        if !name.is_empty() && names.clone().any(|other| other == name) {
            let why = format!("the header has the column `{name}` twice\nhint: rename one of them");
            return Err(row_error(path, RowLocation::Line(1), why));
        }
    }
    Ok(Box::new(DelimitedRows {
        path: path.to_path_buf(),
        header,
        records: reader.into_records(),
        lines: LineCount {
            reader: BufReader::new(open(path)?),
            byte: 0,
            line: 1,
        },
    }))
}

struct DelimitedRows {
    path: PathBuf,
    header: StringRecord,
    records: StringRecordsIntoIter<Box<dyn Read>>,
    lines: LineCount,
}

impl Iterator for DelimitedRows {
    type Item = Result<FileRow, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let record = self.records.next()?;
        let position = match &record {
            Ok(record) => record.position(),
            Err(error) => error.position(),
        };
        let location = match self.lines.locate(position) {
            Ok(location) => location,
            Err(error) => return Some(Err(Error::io("read", &self.path)(error))),
        };
        Some(match record {
            Ok(record) => {
                let cells = self.header.iter().zip(&record);
                let cells = cells.map(|(name, cell)| (name.to_owned(), Value::from(cell)));
                let fields = cells.collect();
                Ok(FileRow { location, fields })
            }
            Err(error) => Err(unreadable(&self.path, location, error)),
        })
    }
}

/// Finds the line in which a row begins. The CSV reader returns the position at which the previous row ended, which is
/// before blank lines and between the two bytes of CRLF.
struct LineCount {
    reader: BufReader<Box<dyn Read>>,
    byte: u64,
    line: usize,
}

impl LineCount {
    fn locate(&mut self, position: Option<&Position>) -> io::Result<RowLocation> {
        let Some(position) = position else {
            return Ok(RowLocation::File);
        };
        loop {
            let ahead = position.byte().saturating_sub(self.byte);
            let buffer = self.reader.fill_buf()?;
            let skipped = match ahead {
                0 => buffer
                    .iter()
                    .position(|byte| !matches!(byte, b'\r' | b'\n'))
                    .unwrap_or(buffer.len()),
                _ => usize::try_from(ahead).map_or(buffer.len(), |ahead| ahead.min(buffer.len())),
            };
            let passed = buffer.get(..skipped).unwrap_or_default();
            self.line += passed.iter().filter(|byte| **byte == b'\n').count();
            let done = buffer.is_empty() || (ahead == 0 && skipped < buffer.len());
            self.reader.consume(skipped);
            self.byte += skipped as u64;
            if done {
                return Ok(RowLocation::Line(self.line));
            }
        }
    }
}

fn unreadable(path: &Path, location: RowLocation, error: csv::Error) -> Error {
    let why = match error.into_kind() {
        ErrorKind::Io(source) => return Error::io("read", path)(source),
        ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => format!(
            "the row has {len} cells, and the header has {expected_len}\nhint: put cells that contain a delimiter, a quote or a line end in quotes"
        ),
        ErrorKind::Utf8 { err, .. } => format!(
            "cell {} is not valid UTF-8\nhint: convert the file to UTF-8",
            err.field() + 1
        ),
        other => format!("the row cannot be read: {other:?}"),
    };
    row_error(path, location, why)
}
