//! Conversion between the fields of records and columns: [`ColumnValue`] for each type of field, and macros that
//! implement it for lists of structs and [`Record`](super::Record) for rows.

use std::ops::Range;

use arrow_array::ArrayRef;
use arrow_array::types::{Float32Type, Float64Type, UInt32Type};
use arrow_schema::{DataType, Field};

use super::columns::{
    ColumnReader, NumberListReader, binaries, booleans, list, number_lists, numbers, optional,
    optional_number, optional_numbers, optional_strings, optional_text, required, strings,
};
use crate::curate::Split;
use crate::error::Error;
use crate::records::{FinishReason, Role};
use crate::spelling::Spelling;

/// A type of field that is stored as one column.
pub(super) trait ColumnValue: Sized {
    /// Returns the column's name and type.
    fn field(name: &str) -> Field;

    /// Converts the values of all rows to a column.
    fn to_column(name: &str, values: &[&Self]) -> Result<ArrayRef, Error>;

    /// Converts some rows of a column to values.
    fn from_column(column: &ColumnReader, rows: Range<usize>) -> Result<Vec<Self>, Error>;
}

impl ColumnValue for String {
    fn field(name: &str) -> Field {
        required(name, DataType::Utf8)
    }

    fn to_column(name: &str, values: &[&Self]) -> Result<ArrayRef, Error> {
        strings(name, values.iter().map(|value| value.as_str()))
    }

    fn from_column(column: &ColumnReader, rows: Range<usize>) -> Result<Vec<Self>, Error> {
        let strings = column.strings()?;
        Ok(rows.map(|row| strings.value(row).to_owned()).collect())
    }
}

impl ColumnValue for Option<String> {
    fn field(name: &str) -> Field {
        optional(name, DataType::Utf8)
    }

    fn to_column(name: &str, values: &[&Self]) -> Result<ArrayRef, Error> {
        optional_strings(name, values.iter().map(|value| value.as_deref()))
    }

    fn from_column(column: &ColumnReader, rows: Range<usize>) -> Result<Vec<Self>, Error> {
        let strings = column.strings()?;
        Ok(rows.map(|row| optional_text(strings, row)).collect())
    }
}

impl ColumnValue for Spelling {
    fn field(name: &str) -> Field {
        required(name, DataType::Binary)
    }

    fn to_column(name: &str, values: &[&Self]) -> Result<ArrayRef, Error> {
        binaries(name, values.iter().map(|value| &***value))
    }

    fn from_column(column: &ColumnReader, rows: Range<usize>) -> Result<Vec<Self>, Error> {
        let bytes = column.binaries()?;
        Ok(rows.map(|row| bytes.value(row).into()).collect())
    }
}

impl ColumnValue for bool {
    fn field(name: &str) -> Field {
        required(name, DataType::Boolean)
    }

    fn to_column(_: &str, values: &[&Self]) -> Result<ArrayRef, Error> {
        Ok(booleans(values.iter().map(|value| **value).collect()))
    }

    fn from_column(column: &ColumnReader, rows: Range<usize>) -> Result<Vec<Self>, Error> {
        let booleans = column.booleans()?;
        Ok(rows.map(|row| booleans.value(row)).collect())
    }
}

impl ColumnValue for Option<u32> {
    fn field(name: &str) -> Field {
        optional(name, DataType::UInt32)
    }

    fn to_column(_: &str, values: &[&Self]) -> Result<ArrayRef, Error> {
        let values = values.iter().map(|value| **value);
        Ok(optional_numbers::<UInt32Type>(values))
    }

    fn from_column(column: &ColumnReader, rows: Range<usize>) -> Result<Vec<Self>, Error> {
        let numbers = column.numbers::<UInt32Type>()?;
        Ok(rows.map(|row| optional_number(numbers, row)).collect())
    }
}

/// Implements [`ColumnValue`] for a type of number and for lists of it.
macro_rules! number_columns {
    ($number:ty, $arrow:ty, $data_type:expr) => {
        impl ColumnValue for $number {
            fn field(name: &str) -> Field {
                required(name, $data_type)
            }

            fn to_column(_: &str, values: &[&Self]) -> Result<ArrayRef, Error> {
                let values = values.iter().map(|value| **value);
                Ok(numbers::<$arrow>(values.collect()))
            }

            fn from_column(column: &ColumnReader, rows: Range<usize>) -> Result<Vec<Self>, Error> {
                let numbers = column.numbers::<$arrow>()?;
                Ok(rows.map(|row| numbers.value(row)).collect())
            }
        }

        impl ColumnValue for Vec<$number> {
            fn field(name: &str) -> Field {
                required(name, list($data_type))
            }

            fn to_column(name: &str, values: &[&Self]) -> Result<ArrayRef, Error> {
                number_lists::<$arrow>(name, values.iter().map(|value| value.as_slice()))
            }

            fn from_column(column: &ColumnReader, rows: Range<usize>) -> Result<Vec<Self>, Error> {
                let lists = NumberListReader::<$arrow>::new(column)?;
                Ok(rows.map(|row| lists.get(row)).collect())
            }
        }
    };
}

number_columns!(u32, UInt32Type, DataType::UInt32);
number_columns!(f32, Float32Type, DataType::Float32);
number_columns!(f64, Float64Type, DataType::Float64);

/// Implements [`ColumnValue`] for an enum that is stored by its name.
macro_rules! name_column {
    ($name:ty, $what:literal) => {
        impl ColumnValue for $name {
            fn field(name: &str) -> Field {
                required(name, DataType::Utf8)
            }

            fn to_column(name: &str, values: &[&Self]) -> Result<ArrayRef, Error> {
                strings(name, values.iter().map(|value| value.name()))
            }

            fn from_column(column: &ColumnReader, rows: Range<usize>) -> Result<Vec<Self>, Error> {
                let names = column.strings()?;
                let value = |row| {
                    let name = names.value(row);
                    let unknown = || column.bad(row, format!("`{name}` is not {}", $what));
                    <$name>::from_name(name).ok_or_else(unknown)
                };
                rows.map(value).collect()
            }
        }
    };
}

name_column!(FinishReason, "a reason to finish");
name_column!(Role, "a role");
name_column!(Split, "a split");

/// Returns the column of a field, whose type follows from `_get`.
pub(super) fn field_of<R, T: ColumnValue>(name: &str, _get: fn(&R) -> &T) -> Field {
    T::field(name)
}

/// Implements [`ColumnValue`] for lists of a struct whose fields are columns themselves.
macro_rules! struct_lists {
    ($entry:ident, [$($field:ident),+]) => {
        impl ColumnValue for Vec<$entry> {
            fn field(name: &str) -> Field {
                let fields = vec![
                    $(field_of(stringify!($field), |entry: &$entry| &entry.$field)),+
                ];
                required(name, list(DataType::Struct(fields.into())))
            }

            fn to_column(name: &str, values: &[&Self]) -> Result<ArrayRef, Error> {
                let entries: Vec<&$entry> = values.iter().copied().flatten().collect();
                let columns = vec![$({
                    let values: Vec<_> = entries.iter().map(|entry| &entry.$field).collect();
                    let column = format!("{name}.{}", stringify!($field));
                    let array = ColumnValue::to_column(&column, &values)?;
                    (field_of(stringify!($field), |entry: &$entry| &entry.$field), array)
                }),+];
                lists(name, values.iter().map(|value| value.len()), structs(name, columns)?)
            }

            fn from_column(column: &ColumnReader, rows: Range<usize>) -> Result<Vec<Self>, Error> {
                let lists = column.lists()?;
                let entries = lists.ranges(rows.clone());
                $(
                    let field = lists.child.field(stringify!($field))?;
                    let mut $field = ColumnValue::from_column(&field, entries.clone())
                        .map_err(|error| lists.row_error(error))?
                        .into_iter();
                )+
                let mut entries = from_fn(|| Some($entry { $($field: $field.next()?),+ }));
                let list = |row| entries.by_ref().take(lists.range(row).len()).collect();
                Ok(rows.map(list).collect())
            }
        }
    };
}

/// Implements [`Record`](super::Record) for a struct. The columns have the names of its fields, or of the path behind
/// `=`; then the row is built from variables with the columns' names. `check` is called with the number and the content
/// of each row before it is written and after it is read.
macro_rules! record {
    ($record:ident, $table:literal, [$($column:ident),+], $check:path) => {
        record!($record, $table, [$($column = $column),+], $record { $($column),+ }, $check);
    };
    ($record:ident, $table:literal, [$($column:ident = $($path:ident).+),+], $row:expr, $check:path) => {
        impl Record for $record {
            const TABLE: &'static str = $table;
            const GROUP_ROWS: usize = 1024;

            fn schema() -> SchemaRef {
                Arc::new(Schema::new(vec![
                    $(field_of(stringify!($column), |row: &$record| &row.$($path).+)),+
                ]))
            }

            fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error> {
                rows.iter().enumerate().try_for_each(|(row, values)| $check(row, values))?;
                batch::<Self>(vec![$({
                    let values: Vec<_> = rows.iter().map(|row| &row.$($path).+).collect();
                    ColumnValue::to_column(stringify!($column), &values)?
                }),+])
            }

            fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, Error> {
                check_columns::<Self>(&batch.schema())?;
                $(
                    let column = ColumnReader::new(Self::TABLE, batch, stringify!($column))?;
                    let mut $column = ColumnValue::from_column(&column, 0..batch.num_rows())?.into_iter();
                )+
                let next_row = || {
                    $(let $column = $column.next()?;)+
                    Some($row)
                };
                let rows: Vec<Self> = from_fn(next_row).collect();
                rows.iter().enumerate().try_for_each(|(row, values)| $check(row, values))?;
                Ok(rows)
            }
        }
    };
}

pub(super) use {record, struct_lists};
