//! The Parquet schema of each record, version 1, and conversion between records and Arrow batches.
//! `docs/parquet.md` describes the columns; a test holds it to this file.

mod columns;
mod completions;
mod lists;
mod prompts;
mod signals;
mod verdicts;

use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};

use crate::error::Error;
use crate::records::{Completion, Dropped, Prompt, Selected, SequenceValues, TaskSample, Verdict};
use crate::signal::Signal;

/// Version of the schema, in the footer of every file under [`SCHEMA_KEY`].
pub const SCHEMA_VERSION: u32 = 1;
/// The footer key of the schema's version.
pub const SCHEMA_KEY: &str = "potstill.schema";
/// The footer key of the list of provenances, as JSON.
pub const PROVENANCE_KEY: &str = "potstill.provenance";

mod sealed {
    pub trait Sealed {}
}

/// A record that is a row of a Parquet table. Only the records of this crate are.
pub trait Record: sealed::Sealed + Sized {
    /// The table's name, for messages.
    const TABLE: &'static str;
    /// Rows of a row group: the unit that random access decodes.
    const GROUP_ROWS: usize;

    /// The table's columns.
    fn schema() -> SchemaRef;

    /// Rows as columns.
    ///
    /// # Errors
    /// [`Error::TooLarge`]; [`Error::BadSignal`] for a signal that breaks its rules.
    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error>;

    /// Columns as rows.
    ///
    /// # Errors
    /// [`Error::Column`] where the columns are not exactly the table's; [`Error::Cell`] and [`Error::BadSignal`] where
    /// a row's content is not legal.
    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, Error>;
}

impl sealed::Sealed for Prompt {}
impl sealed::Sealed for Completion {}
impl sealed::Sealed for Signal {}
impl sealed::Sealed for Selected {}
impl sealed::Sealed for Dropped {}
impl sealed::Sealed for SequenceValues {}
impl sealed::Sealed for Verdict {}
impl sealed::Sealed for TaskSample {}

/// Checks that a file or batch has exactly the columns of `R`.
pub(crate) fn check_columns<R: Record>(found: &Schema) -> Result<(), Error> {
    let expected = R::schema();
    let error = |column: &str, expected: String, found: String| {
        Err(Error::Column {
            table: R::TABLE,
            column: column.into(),
            expected,
            found,
        })
    };
    for field in expected.fields() {
        match found.field_with_name(field.name()) {
            Err(_) => return error(field.name(), type_name(field), "absent".into()),
            Ok(other)
                if other.data_type() != field.data_type()
                    || other.is_nullable() != field.is_nullable() =>
            {
                return error(field.name(), type_name(field), type_name(other));
            }
            Ok(_) => {}
        }
    }
    match found
        .fields()
        .iter()
        .find(|field| expected.field_with_name(field.name()).is_err())
    {
        Some(extra) => error(extra.name(), "absent".into(), type_name(extra)),
        None => Ok(()),
    }
}

fn type_name(field: &arrow::datatypes::Field) -> String {
    let null = if field.is_nullable() {
        ", may be null"
    } else {
        ""
    };
    format!("{}{null}", field.data_type())
}

/// A batch of a table's columns, in the order of its schema.
fn batch<R: Record>(columns: Vec<arrow::array::ArrayRef>) -> Result<RecordBatch, Error> {
    RecordBatch::try_new(R::schema(), columns).map_err(columns::unfit(R::TABLE))
}
