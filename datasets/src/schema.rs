//! The Parquet schema of each table, version 1, and conversion between records and Arrow batches.
//! `docs/parquet.md` describes the columns; a test compares it with this module.

mod columns;
mod signals;
mod tables;
mod value;

pub(crate) use signals::sequence_lengths;

use arrow_array::RecordBatch;
use arrow_schema::{Schema, SchemaRef};

use crate::error::Error;
use crate::records::{
    Completion, Dropped, Failed, NearDuplicate, OwnText, Prompt, Selected, SequenceValues,
    TaskSample, Verdict,
};
use crate::signal::Signal;

/// Version of the schema. The footer of every file has it under [`SCHEMA_KEY`].
pub const SCHEMA_VERSION: u32 = 1;
/// Footer key of the schema version.
pub const SCHEMA_KEY: &str = "potstill.schema";
/// Footer key of the list of provenances, which is JSON.
pub const PROVENANCE_KEY: &str = "potstill.provenance";

mod sealed {
    pub trait Sealed {}
}

/// A record that is a row of a Parquet table. Only types of this crate implement this trait.
pub trait Record: sealed::Sealed + Sized {
    /// Name of the table in messages and in `docs/parquet.md`.
    const TABLE: &'static str;
    /// Number of rows in a row group, which is the unit that random access decodes.
    const GROUP_ROWS: usize;
    /// Columns that a file has all or none of.
    const OPTIONAL: &'static [&'static str] = &[];

    /// Returns the table's columns, including the optional ones.
    fn schema() -> SchemaRef;

    /// Returns whether the row has values for the optional columns.
    fn fills_optional(&self) -> bool {
        false
    }

    /// Converts rows to columns.
    ///
    /// # Errors
    /// [`Error::Invalid`] for too many values; [`Error::BadSignal`] for a signal that breaks its rules.
    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error>;

    /// Converts columns to rows.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the columns are not exactly the table's, with or without the optional ones; [`Error::Cell`]
    /// and [`Error::BadSignal`] if the content of a row is not legal.
    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, Error>;
}

impl sealed::Sealed for Prompt {}
impl sealed::Sealed for Completion {}
impl sealed::Sealed for Signal {}
impl sealed::Sealed for Selected {}
impl sealed::Sealed for Dropped {}
impl sealed::Sealed for NearDuplicate {}
impl sealed::Sealed for Failed {}
impl sealed::Sealed for SequenceValues {}
impl sealed::Sealed for Verdict {}
impl sealed::Sealed for TaskSample {}
impl sealed::Sealed for OwnText {}

/// Checks that a file or batch has exactly the columns of `R`, with or without the optional ones.
pub(crate) fn check_columns<R: Record>(found: &Schema) -> Result<(), Error> {
    let expected = R::schema();
    let has = |name: &&str| found.field_with_name(name).is_ok();
    let optional = R::OPTIONAL.iter().any(has);
    let error = |column: &str, expected: &str, found: &str| {
        Err(columns::column_error(R::TABLE, column, expected, found))
    };
    for field in expected.fields() {
        match found.field_with_name(field.name()) {
            Err(_) if !optional && R::OPTIONAL.contains(&field.name().as_str()) => {}
            Err(_) => return error(field.name(), &type_name(field), "absent"),
            Ok(other)
                if other.data_type() != field.data_type()
                    || other.is_nullable() != field.is_nullable() =>
            {
                return error(field.name(), &type_name(field), &type_name(other));
            }
            Ok(_) => {}
        }
    }
    match found
        .fields()
        .iter()
        .find(|field| expected.field_with_name(field.name()).is_err())
    {
        Some(extra) => error(extra.name(), "absent", &type_name(extra)),
        None => Ok(()),
    }
}

/// Returns the columns of a file, with or without the optional ones.
pub(crate) fn file_schema<R: Record>(optional: bool) -> Schema {
    let schema = R::schema();
    let wanted =
        |field: &&arrow_schema::FieldRef| optional || !R::OPTIONAL.contains(&field.name().as_str());
    Schema::new(
        schema
            .fields()
            .iter()
            .filter(wanted)
            .cloned()
            .collect::<Vec<_>>(),
    )
}

fn type_name(field: &arrow_schema::Field) -> String {
    let null = if field.is_nullable() {
        ", may be null"
    } else {
        ""
    };
    format!("{}{null}", field.data_type())
}

/// Builds a batch from a table's columns in the order of its schema.
fn batch<R: Record>(columns: Vec<arrow_array::ArrayRef>) -> Result<RecordBatch, Error> {
    RecordBatch::try_new(R::schema(), columns).map_err(columns::arrow_error(R::TABLE))
}
