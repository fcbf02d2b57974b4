//! Reader of Parquet files. It holds one batch at a time and reads the needed columns only.

use std::path::{Path, PathBuf};

use ::parquet::arrow::ProjectionMask;
use ::parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use ::parquet::errors::ParquetError;
use ::parquet::schema::types::SchemaDescriptor;
use arrow_array::RecordBatch;
use arrow_schema::{Field, Fields, Schema, SchemaRef};
use serde_json::Map;

use super::cell::{Budget, CellProblem, value};
use super::encoding::utf8_error;
use super::file::{row_error, row_too_long};
use super::parquet_open::{check_pages, not_a_shard, open};
use super::row::{FileRow, RowIterator, missing_column};
use super::settings::Columns;
use crate::error::{Error, RowLocation};
use crate::parquet::{BATCH_ROWS, decode};

/// Pages of this size are in memory for one batch, bytes.
const BATCH_BYTES: u64 = 64 * 1024 * 1024;

/// Reads the rows of a file, with all its columns if `columns` is `None`. Arrow's own schema in the footer is ignored, so
/// all text has one type.
pub(super) fn rows(
    path: &Path,
    limit: usize,
    columns: Option<&Columns>,
) -> Result<RowIterator, Error> {
    let mut opened = open(path)?;
    let parquet_schema = opened.metadata.parquet_schema();
    let leaves = match columns {
        None => (0..parquet_schema.num_columns()).collect(),
        Some(columns) => projection(path, &opened.schema, parquet_schema, columns)?,
    };
    let largest = check_pages(path, &mut opened, &leaves)?;
    let mask = ProjectionMask::leaves(opened.metadata.parquet_schema(), leaves);
    let expected = opened.metadata.metadata().file_metadata().num_rows();
    let batch_rows = (BATCH_BYTES / largest.max(1)).clamp(1, BATCH_ROWS as u64);
    let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(opened.file, opened.metadata)
        .with_projection(mask)
        .with_batch_size(batch_rows as usize);
    let batches = decode(path, || builder.build()).map_err(not_a_shard)?;
    Ok(Box::new(ParquetRows {
        path: path.to_path_buf(),
        limit,
        are_all_needed: columns.is_some(),
        schema: opened.schema,
        batches,
        batch: None,
        rows: 0,
        expected: usize::try_from(expected).unwrap_or_default(),
    }))
}

/// Returns the names of a file's columns.
pub(super) fn header(path: &Path) -> Result<Vec<String>, Error> {
    let opened = open(path)?;
    let fields = opened.schema.fields().iter();
    Ok(fields.map(|field| field.name().clone()).collect())
}

/// Returns the indices of the needed leaves in the file; optional columns may be absent.
fn projection(
    path: &Path,
    schema: &Schema,
    parquet_schema: &SchemaDescriptor,
    columns: &Columns,
) -> Result<Vec<usize>, Error> {
    let mut needed = Vec::new();
    for column in columns.required() {
        let Some(found) = path_of(schema.fields(), column) else {
            let present: Vec<String> = names(schema.fields());
            return Err(missing_column(path, RowLocation::File, column, &present));
        };
        needed.push(found);
    }
    let optional = columns.optional();
    needed.extend(optional.filter_map(|column| path_of(schema.fields(), &column)));
    let is_needed = |leaf: &usize| {
        let column = parquet_schema.column(*leaf);
        let parts = column.path().parts();
        needed.iter().any(|path| parts.starts_with(path))
    };
    Ok((0..parquet_schema.num_columns())
        .filter(is_needed)
        .collect())
}

/// Finds a column, and returns the names that lead to it. A column that has the whole name comes first.
fn path_of(fields: &Fields, column: &str) -> Option<Vec<String>> {
    if fields.find(column).is_some() {
        return Some(vec![column.to_owned()]);
    }
    column.match_indices('.').find_map(|(dot, _)| {
        let (name, rest) = (column.get(..dot)?, column.get(dot + 1..)?);
        let (_, field) = fields.find(name)?;
        let mut path = vec![name.to_owned()];
        path.extend(path_of(inner(field)?, rest)?);
        Some(path)
    })
}

fn inner(field: &Field) -> Option<&Fields> {
    match field.data_type() {
        arrow_schema::DataType::Struct(fields) => Some(fields),
        _ => None,
    }
}

/// Lists the names of columns; those in structs have dots.
fn names(fields: &Fields) -> Vec<String> {
    let names = fields.iter().flat_map(|field| {
        let name = field.name();
        match inner(field) {
            None => vec![name.clone()],
            Some(fields) => names(fields)
                .iter()
                .map(|field| format!("{name}.{field}"))
                .collect(),
        }
    });
    names.collect()
}

struct ParquetRows {
    path: PathBuf,
    /// Most bytes of a row.
    limit: usize,
    /// Whether all columns that are read were asked for, so that none may have bytes that are not text.
    are_all_needed: bool,
    /// The columns of the file with their own types.
    schema: SchemaRef,
    batches: ParquetRecordBatchReader,
    /// The batch and its next row.
    batch: Option<(RecordBatch, usize)>,
    /// Number of rows that were returned.
    rows: usize,
    expected: usize,
}

impl Iterator for ParquetRows {
    type Item = Result<FileRow, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((batch, row)) = self.batch.take_if(|(batch, row)| *row < batch.num_rows()) {
                self.rows += 1;
                let read = self.row(&batch, row);
                self.batch = Some((batch, row + 1));
                return Some(read);
            }
            match decode(&self.path, || self.batches.next().transpose()) {
                Ok(Some(batch)) => self.batch = Some((batch, 0)),
                Ok(None) if self.rows < self.expected => {
                    let why = format!("{} of {} rows", self.rows, self.expected);
                    self.expected = 0;
                    return Some(Err(Error::UnreadableParquet {
                        path: self.path.clone(),
                        source: ParquetError::EOF(why),
                    }));
                }
                Ok(None) => return None,
                Err(error) => {
                    self.expected = 0;
                    return Some(Err(not_a_shard(error)));
                }
            }
        }
    }
}

impl ParquetRows {
    /// Converts a row of a batch to a JSON object.
    fn row(&self, batch: &RecordBatch, row: usize) -> Result<FileRow, Error> {
        let location = RowLocation::Row(self.rows);
        let mut budget = Budget::new(self.limit, self.are_all_needed);
        let mut fields = Map::new();
        for (field, array) in batch.schema().fields().iter().zip(batch.columns()) {
            let name = field.name();
            let own = self.schema.field_with_name(name).map(Field::data_type);
            let own = own.unwrap_or(array.data_type());
            let cell = value(array, row, own, &mut budget).map_err(|problem| match problem {
                CellProblem::TooLong => row_too_long(&self.path, location, self.limit, ""),
                CellProblem::NotText(bytes) => {
                    let location = format!("{location}: column `{name}`");
                    utf8_error(&self.path, &location, &bytes)
                }
                CellProblem::Unreadable(why) => {
                    row_error(&self.path, location, format!("column `{name}`: {why}"))
                }
            })?;
            fields.insert(name.clone(), cell);
        }
        Ok(FileRow {
            location,
            bytes: budget.used(),
            fields,
        })
    }
}
