//! Reader of Parquet files. It holds one batch at a time and reads the needed columns only.

use std::fs::File;
use std::path::{Path, PathBuf};

use ::parquet::arrow::ProjectionMask;
use ::parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Float64Type};
use arrow_array::{Array, RecordBatch};
use arrow_cast::display::array_value_to_string;
use arrow_schema::{DataType, Schema};
use serde_json::{Map, Number, Value};

use super::row::{FileRow, RowIterator, missing_column};
use super::settings::Columns;
use crate::error::{Error, RowLocation};
use crate::parquet::{BATCH_ROWS, decode, reader_options};

/// Reads the rows of a file. Arrow's own schema in the footer is ignored, so all text has one type.
pub(super) fn rows(path: &Path, columns: Option<&Columns>) -> Result<RowIterator, Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let metadata =
        decode(path, || ArrowReaderMetadata::load(&file, reader_options())).map_err(not_a_shard)?;
    let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata.clone());
    let builder = match columns {
        None => builder,
        Some(columns) => {
            let roots = projection(path, metadata.schema(), columns)?;
            builder.with_projection(ProjectionMask::roots(metadata.parquet_schema(), roots))
        }
    };
    let batches =
        decode(path, || builder.with_batch_size(BATCH_ROWS).build()).map_err(not_a_shard)?;
    let expected = usize::try_from(metadata.metadata().file_metadata().num_rows());
    Ok(Box::new(ParquetRows {
        path: path.to_path_buf(),
        batches,
        waiting: Vec::new().into_iter(),
        rows: 0,
        expected: expected.unwrap_or_default(),
    }))
}

/// Returns the indices of the needed columns in the file; optional columns may be absent.
fn projection(path: &Path, schema: &Schema, columns: &Columns) -> Result<Vec<usize>, Error> {
    let names = || schema.fields().iter().map(|field| field.name().as_str());
    if let Some(absent) = columns
        .required()
        .find(|name| names().all(|other| other != *name))
    {
        return Err(missing_column(path, RowLocation::File, absent, names()));
    }
    let is_needed = |name: &str| {
        let mut all = columns.required().chain(columns.optional());
        all.any(|column| column == name)
    };
    Ok((0..)
        .zip(names())
        .filter(|(_, name)| is_needed(name))
        .map(|(index, _)| index)
        .collect())
}

/// Turns an error about a shard into one about a file of the user.
fn not_a_shard(error: Error) -> Error {
    match error {
        Error::DamagedShard { path, source } => Error::UnreadableParquet { path, source },
        other => other,
    }
}

struct ParquetRows {
    path: PathBuf,
    batches: ParquetRecordBatchReader,
    waiting: std::vec::IntoIter<Map<String, Value>>,
    /// Number of rows that were returned.
    rows: usize,
    expected: usize,
}

impl Iterator for ParquetRows {
    type Item = Result<FileRow, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(fields) = self.waiting.next() {
                self.rows += 1;
                let location = RowLocation::Row(self.rows);
                return Some(Ok(FileRow { location, fields }));
            }
            match decode(&self.path, || self.batches.next().transpose()) {
                Ok(Some(batch)) => self.waiting = objects(&batch).into_iter(),
                Ok(None) if self.rows < self.expected => {
                    let why = format!("{} of {} rows", self.rows, self.expected);
                    self.expected = 0;
                    return Some(Err(Error::UnreadableParquet {
                        path: self.path.clone(),
                        source: ::parquet::errors::ParquetError::EOF(why),
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

/// Converts a batch to one JSON object for each row.
fn objects(batch: &RecordBatch) -> Vec<Map<String, Value>> {
    let schema = batch.schema();
    let row = |row| {
        let columns = schema.fields().iter().zip(batch.columns());
        columns
            .map(|(field, array)| (field.name().clone(), value(array, row)))
            .collect()
    };
    (0..batch.num_rows()).map(row).collect()
}

/// Converts a cell to JSON. Null fields of a struct are left out, because a table has every field in every row. Bytes
/// that are not UTF-8 become null.
fn value(array: &dyn Array, row: usize) -> Value {
    if array.is_null(row) {
        return Value::Null;
    }
    let elements = |list: &dyn Array| {
        let values = (0..list.len()).map(|index| value(list, index));
        Value::Array(values.collect())
    };
    let float = |number: f64| Number::from_f64(number).map_or(Value::Null, Value::Number);
    match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().value(row).into(),
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Binary => std::str::from_utf8(array.as_binary::<i32>().value(row))
            .map_or(Value::Null, Value::from),
        // A 32-bit 0.1 becomes 0.1, not 0.10000000149011612.
        DataType::Float32 => {
            let shortest = array.as_primitive::<Float32Type>().value(row).to_string();
            float(shortest.parse().unwrap_or(f64::NAN))
        }
        DataType::Float64 => float(array.as_primitive::<Float64Type>().value(row)),
        DataType::List(_) => elements(&array.as_list::<i32>().value(row)),
        DataType::Struct(fields) => {
            let fields = fields.iter().zip(array.as_struct().columns());
            let present = fields.filter(|(_, cells)| cells.is_valid(row));
            let cells = present.map(|(field, cells)| (field.name().clone(), value(cells, row)));
            Value::Object(cells.collect())
        }
        kind => {
            let text = array_value_to_string(array, row).unwrap_or_default();
            match text.parse::<Number>() {
                Ok(number) if kind.is_integer() => Value::Number(number),
                _ => Value::String(text),
            }
        }
    }
}
