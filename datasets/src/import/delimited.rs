//! Rows from CSV and TSV. Every cell is text.

use std::fs::File;
use std::path::{Path, PathBuf};

use csv::{ErrorKind, ReaderBuilder, StringRecord, StringRecordsIntoIter};
use serde_json::Value;

use super::Rows;
use super::row::{Place, Row};
use crate::error::Error;

/// The rows below the header, which names the columns.
pub(super) fn rows(path: &Path, delimiter: u8) -> Result<Rows, Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let mut reader = ReaderBuilder::new().delimiter(delimiter).from_reader(file);
    let header = reader
        .headers()
        .map_err(|error| unreadable(path, error))?
        .clone();
    let mut names = header.iter();
    while let Some(name) = names.next() {
        if !name.is_empty() && names.clone().any(|other| other == name) {
            return Err(Error::BadPrompt {
                path: path.to_path_buf(),
                place: Place::Line(1),
                why: format!("the header has the column `{name}` twice: rename one"),
            });
        }
    }
    Ok(Box::new(Delimited {
        path: path.to_path_buf(),
        header,
        records: reader.into_records(),
    }))
}

struct Delimited {
    path: PathBuf,
    header: StringRecord,
    records: StringRecordsIntoIter<File>,
}

impl Iterator for Delimited {
    type Item = Result<Row, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(match self.records.next()? {
            Ok(record) => {
                let cells = self.header.iter().zip(&record);
                Ok(Row {
                    place: place(record.position()),
                    fields: cells
                        .map(|(name, cell)| (name.to_owned(), Value::from(cell)))
                        .collect(),
                })
            }
            Err(error) => Err(unreadable(&self.path, error)),
        })
    }
}

fn place(position: Option<&csv::Position>) -> Place {
    position
        .and_then(|position| usize::try_from(position.line()).ok())
        .map_or(Place::File, Place::Line)
}

fn unreadable(path: &Path, error: csv::Error) -> Error {
    let place = place(error.position());
    let why = match error.into_kind() {
        ErrorKind::Io(source) => return Error::io("read", path)(source),
        ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => format!(
            "the row has {len} cells, though the header has {expected_len}: put cells that hold a delimiter, a quote or a line end in quotes"
        ),
        ErrorKind::Utf8 { err, .. } => format!(
            "cell {} is not valid UTF-8: convert the file to UTF-8",
            err.field() + 1
        ),
        other => format!("the row cannot be read: {other:?}"),
    };
    Error::BadPrompt {
        path: path.to_path_buf(),
        place,
        why,
    }
}
