//! Reader of CSV and TSV files. Every cell is text.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::delimiter::delimiter;
use super::encoding::utf8_error;
use super::file::{open, row_error};
use super::records::{CellRecord, Records};
use super::row::{FileRow, RowIterator};
use super::settings::Delimiter;
use crate::error::{Error, RowLocation};
use crate::limits::IMPORT_COLUMNS;

/// Reads the rows below the header, which names the columns. `set` is the delimiter of the settings.
pub(super) fn rows(
    path: &Path,
    limit: usize,
    set: Option<Delimiter>,
) -> Result<RowIterator, Error> {
    let (records, header) = begin(path, limit, set)?;
    Ok(Box::new(DelimitedRows {
        path: path.to_path_buf(),
        header,
        records,
        record: CellRecord::default(),
    }))
}

/// Returns the names of the columns.
pub(super) fn header(
    path: &Path,
    limit: usize,
    set: Option<Delimiter>,
) -> Result<Vec<String>, Error> {
    Ok(begin(path, limit, set)?.1)
}

fn begin(
    path: &Path,
    limit: usize,
    set: Option<Delimiter>,
) -> Result<(Records, Vec<String>), Error> {
    let delimiter = delimiter(path, set)?;
    let mut records = Records::new(path, open(path)?, delimiter, limit);
    let mut record = CellRecord::default();
    if !records.read(&mut record)? {
        return Ok((records, Vec::new()));
    }
    // Excel writes the delimiter into a first line of its own.
    if record.bytes.starts_with(b"sep=") && record.line == 1 && !records.read(&mut record)? {
        return Ok((records, Vec::new()));
    }
    let names = cells(path, &record)?;
    let line = RowLocation::Line(record.line);
    if names.len() > IMPORT_COLUMNS {
        let why = format!(
            "the header has {} columns, more than {IMPORT_COLUMNS}\nhint: write a file with the needed columns only",
            names.len()
        );
        return Err(row_error(path, line, why));
    }
    let mut known = HashSet::new();
    if let Some(name) = names
        .iter()
        .find(|name| !name.is_empty() && !known.insert(*name))
    {
        let why = format!("the header has the column `{name}` twice\nhint: rename one of them");
        return Err(row_error(path, line, why));
    }
    let header = names.into_iter().map(str::to_owned).collect();
    Ok((records, header))
}

/// Returns the cells of a record as text.
fn cells<'a>(path: &Path, record: &'a CellRecord) -> Result<Vec<&'a str>, Error> {
    let numbered = record.cells().zip(1..);
    numbered
        .map(|(cell, number)| {
            std::str::from_utf8(cell).map_err(|_| {
                let location = format!(":{}: cell {number}", record.line);
                utf8_error(path, &location, cell)
            })
        })
        .collect()
}

struct DelimitedRows {
    path: PathBuf,
    header: Vec<String>,
    records: Records,
    record: CellRecord,
}

impl Iterator for DelimitedRows {
    type Item = Result<FileRow, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.row().transpose()
    }
}

impl DelimitedRows {
    fn row(&mut self) -> Result<Option<FileRow>, Error> {
        if self.header.is_empty() || !self.records.read(&mut self.record)? {
            return Ok(None);
        }
        let location = RowLocation::Line(self.record.line);
        let (found, expected) = (self.record.ends.len(), self.header.len());
        if found != expected {
            let why = format!(
                "the row has {found} cells, and the header has {expected}\nhint: put cells that contain a delimiter, a quote or a line end in quotes"
            );
            return Err(row_error(&self.path, location, why));
        }
        let cells = cells(&self.path, &self.record)?;
        let fields = self.header.iter().zip(cells);
        let fields = fields.map(|(name, cell)| (name.clone(), Value::from(cell)));
        Ok(Some(FileRow {
            location,
            bytes: self.record.bytes.len(),
            fields: fields.collect(),
        }))
    }
}
