//! Conversion between Arrow columns and flat buffers.
//!
//! A list column is built from its lengths and one flat child, not value by value, because a batch of signals holds
//! hundreds of thousands of numbers.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{
    Array, ArrayRef, ArrowPrimitiveType, BinaryArray, BooleanArray, ListArray, PrimitiveArray,
    RecordBatch, StringArray, StructArray,
};
use arrow_buffer::{BooleanBuffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow_schema::{ArrowError, DataType, Field};

use crate::distributions::ListColumn;
use crate::error::Error;

// ---- types ----

pub(super) fn required(name: &str, data_type: DataType) -> Field {
    Field::new(name, data_type, false)
}

pub(super) fn optional(name: &str, data_type: DataType) -> Field {
    Field::new(name, data_type, true)
}

/// Returns the type of a list whose values are never null. The Parquet format names the values `element`.
pub(super) fn list(element: DataType) -> DataType {
    DataType::List(Arc::new(required("element", element)))
}

/// Returns the type of a list whose values may be null.
pub(super) fn list_of_optional(element: DataType) -> DataType {
    DataType::List(Arc::new(optional("element", element)))
}

// ---- writing ----

pub(super) fn numbers<T: ArrowPrimitiveType>(values: Vec<T::Native>) -> ArrayRef {
    Arc::new(PrimitiveArray::<T>::new(values.into(), None))
}

pub(super) fn optional_numbers<T: ArrowPrimitiveType>(
    values: impl Iterator<Item = Option<T::Native>>,
) -> ArrayRef {
    Arc::new(values.collect::<PrimitiveArray<T>>())
}

pub(super) fn booleans(values: Vec<bool>) -> ArrayRef {
    Arc::new(BooleanArray::new(BooleanBuffer::from(values), None))
}

pub(super) fn strings<'a>(
    column: &str,
    values: impl Iterator<Item = &'a str> + Clone,
) -> Result<ArrayRef, Error> {
    let (offsets, bytes) = flat_bytes(column, values.map(str::as_bytes))?;
    StringArray::try_new(offsets, bytes.into(), None)
        .map(array)
        .map_err(arrow_error(column))
}

pub(super) fn optional_strings<'a>(
    column: &str,
    values: impl Iterator<Item = Option<&'a str>> + Clone,
) -> Result<ArrayRef, Error> {
    let present: NullBuffer = values.clone().map(|value| value.is_some()).collect();
    let (offsets, bytes) = flat_bytes(
        column,
        values.map(|value| value.unwrap_or_default().as_bytes()),
    )?;
    StringArray::try_new(offsets, bytes.into(), Some(present))
        .map(array)
        .map_err(arrow_error(column))
}

pub(super) fn binaries<'a>(
    column: &str,
    values: impl Iterator<Item = &'a [u8]> + Clone,
) -> Result<ArrayRef, Error> {
    let (offsets, bytes) = flat_bytes(column, values)?;
    BinaryArray::try_new(offsets, bytes.into(), None)
        .map(array)
        .map_err(arrow_error(column))
}

/// Builds a list column over a flat child: row i takes the next `lengths[i]` values, none of which is null.
pub(super) fn lists(
    column: &str,
    lengths: impl Iterator<Item = usize>,
    child: ArrayRef,
) -> Result<ArrayRef, Error> {
    let element = required("element", child.data_type().clone());
    lists_of(element, column, lengths, child)
}

/// Builds a list column of numbers, none of which is null.
pub(super) fn number_lists<'a, T: ArrowPrimitiveType>(
    column: &str,
    rows: impl Iterator<Item = &'a [T::Native]> + Clone,
) -> Result<ArrayRef, Error> {
    let lengths = rows.clone().map(<[T::Native]>::len);
    lists(column, lengths, numbers::<T>(concat(rows)))
}

/// Builds a list column over a flat child whose values may be null.
pub(super) fn lists_of_optional(
    column: &str,
    lengths: impl Iterator<Item = usize>,
    child: ArrayRef,
) -> Result<ArrayRef, Error> {
    let element = optional("element", child.data_type().clone());
    lists_of(element, column, lengths, child)
}

fn lists_of(
    element: Field,
    column: &str,
    lengths: impl Iterator<Item = usize>,
    child: ArrayRef,
) -> Result<ArrayRef, Error> {
    let offsets = offsets(column, lengths)?;
    ListArray::try_new(Arc::new(element), offsets, child, None)
        .map(array)
        .map_err(arrow_error(column))
}

/// Builds a column of structs from the columns of their fields.
pub(super) fn structs(column: &str, children: Vec<(Field, ArrayRef)>) -> Result<ArrayRef, Error> {
    let (fields, children): (Vec<Field>, Vec<ArrayRef>) = children.into_iter().unzip();
    StructArray::try_new(fields.into(), children, None)
        .map(array)
        .map_err(arrow_error(column))
}

/// Concatenates slices.
pub(super) fn concat<'a, T: Copy + 'a>(slices: impl Iterator<Item = &'a [T]> + Clone) -> Vec<T> {
    let mut flat = Vec::with_capacity(slices.clone().map(<[T]>::len).sum());
    slices.for_each(|slice| flat.extend_from_slice(slice));
    flat
}

pub(super) fn arrow_error(column: &str) -> impl FnOnce(ArrowError) -> Error {
    move |source| Error::Arrow {
        what: column.into(),
        source,
    }
}

fn array(array: impl Array + 'static) -> ArrayRef {
    Arc::new(array)
}

fn flat_bytes<'a>(
    column: &str,
    values: impl Iterator<Item = &'a [u8]> + Clone,
) -> Result<(OffsetBuffer<i32>, Vec<u8>), Error> {
    Ok((
        offsets(column, values.clone().map(<[u8]>::len))?,
        concat(values),
    ))
}

/// Computes the offsets of a list column. Arrow's own constructor panics on more than `i32::MAX` values.
fn offsets(column: &str, lengths: impl Iterator<Item = usize>) -> Result<OffsetBuffer<i32>, Error> {
    let mut offsets = Vec::with_capacity(lengths.size_hint().0 + 1);
    let mut end = 0_i32;
    offsets.push(end);
    for length in lengths {
        end = i32::try_from(length)
            .ok()
            .and_then(|length| end.checked_add(length))
            .ok_or_else(|| {
                let problem = format!(
                    "the column `{column}` has more than {} values in one batch",
                    i32::MAX
                );
                Error::invalid(problem, "write fewer rows at a time")
            })?;
        offsets.push(end);
    }
    Ok(OffsetBuffer::new(ScalarBuffer::from(offsets)))
}

// ---- reading ----

/// A column, a field of a struct column or the values of a list column, with its name for error messages.
#[derive(Clone)]
pub(super) struct ColumnReader<'a> {
    table: &'static str,
    column: String,
    array: &'a dyn Array,
}

impl<'a> ColumnReader<'a> {
    pub(super) fn new(
        table: &'static str,
        batch: &'a RecordBatch,
        column: &str,
    ) -> Result<ColumnReader<'a>, Error> {
        match batch.column_by_name(column) {
            Some(array) => Ok(ColumnReader {
                table,
                column: column.into(),
                array,
            }),
            None => Err(column_error(table, column, "present", "absent")),
        }
    }

    /// Returns a field of a struct column.
    pub(super) fn field(&self, name: &str) -> Result<ColumnReader<'a>, Error> {
        let fields = self
            .array
            .as_struct_opt()
            .ok_or_else(|| self.mistyped("a struct"))?;
        let column = format!("{}.{name}", self.column);
        match fields.column_by_name(name) {
            Some(array) => Ok(ColumnReader {
                table: self.table,
                column,
                array,
            }),
            None => Err(column_error(self.table, &column, "present", "absent")),
        }
    }

    pub(super) fn lists(&self) -> Result<ListReader<'a>, Error> {
        let lists: &ListArray = self
            .array
            .as_list_opt()
            .ok_or_else(|| self.mistyped("a list"))?;
        let child = ColumnReader {
            table: self.table,
            column: self.column.clone(),
            array: lists.values(),
        };
        Ok(ListReader {
            offsets: lists.value_offsets(),
            child,
        })
    }

    pub(super) fn numbers<T: ArrowPrimitiveType>(&self) -> Result<&'a PrimitiveArray<T>, Error> {
        self.array
            .as_primitive_opt()
            .ok_or_else(|| self.mistyped(&T::DATA_TYPE.to_string()))
    }

    pub(super) fn strings(&self) -> Result<&'a StringArray, Error> {
        self.array
            .as_string_opt()
            .ok_or_else(|| self.mistyped("Utf8"))
    }

    pub(super) fn binaries(&self) -> Result<&'a BinaryArray, Error> {
        self.array
            .as_binary_opt()
            .ok_or_else(|| self.mistyped("Binary"))
    }

    pub(super) fn booleans(&self) -> Result<&'a BooleanArray, Error> {
        self.array
            .as_boolean_opt()
            .ok_or_else(|| self.mistyped("Boolean"))
    }

    /// Returns an error about the content of one row.
    pub(super) fn bad(&self, row: usize, why: String) -> Error {
        Error::Cell {
            row,
            column: self.column.clone(),
            why,
        }
    }

    fn mistyped(&self, expected: &str) -> Error {
        let found = self.array.data_type().to_string();
        column_error(self.table, &self.column, expected, &found)
    }
}

/// Returns the error for a column of another type than expected, or one that is absent.
pub(super) fn column_error(table: &str, column: &str, expected: &str, found: &str) -> Error {
    let problem =
        format!("the column `{column}` of a {table} table must be {expected}, and it is {found}");
    Error::invalid(problem, "")
}

/// A list column as ranges of its flat child.
pub(super) struct ListReader<'a> {
    offsets: &'a [i32],
    pub(super) child: ColumnReader<'a>,
}

impl ListReader<'_> {
    /// Returns the range of a row's values in the child, which is empty if there is no such row.
    pub(super) fn range(&self, row: usize) -> Range<usize> {
        self.ranges(row..row + 1)
    }

    /// Returns the range of the values of consecutive rows in the child.
    pub(super) fn ranges(&self, rows: Range<usize>) -> Range<usize> {
        match (self.offsets.get(rows.start), self.offsets.get(rows.end)) {
            // Arrow guarantees that offsets ascend from 0, so none is negative.
            (Some(start), Some(end)) => start.unsigned_abs() as usize..end.unsigned_abs() as usize,
            _ => 0..0,
        }
    }

    /// Creates the column of consecutive rows from their values in the child.
    pub(super) fn column<T: Clone>(&self, rows: Range<usize>, values: Vec<T>) -> ListColumn<T> {
        let offsets = self.offsets.get(rows.start..=rows.end).unwrap_or(&[0]);
        let first = offsets.first().copied().unwrap_or(0).unsigned_abs();
        ListColumn::new(first, offsets.iter().map(|end| end.unsigned_abs()), values)
    }

    /// Turns an error about an entry of the child into one about the row that the entry belongs to.
    pub(super) fn row_error(&self, error: Error) -> Error {
        let Error::Cell { row, column, why } = error else {
            return error;
        };
        let starts = |offset: &i32| offset.unsigned_abs() as usize <= row;
        let row = self.offsets.partition_point(starts).saturating_sub(1);
        Error::Cell { row, column, why }
    }
}

/// A list column of numbers.
pub(super) struct NumberListReader<'a, T: ArrowPrimitiveType> {
    pub(super) lists: ListReader<'a>,
    pub(super) values: &'a PrimitiveArray<T>,
}

impl<'a, T: ArrowPrimitiveType> NumberListReader<'a, T> {
    pub(super) fn new(column: &ColumnReader<'a>) -> Result<NumberListReader<'a, T>, Error> {
        let lists = column.lists()?;
        let values = lists.child.numbers()?;
        Ok(NumberListReader { lists, values })
    }

    pub(super) fn get(&self, row: usize) -> Vec<T::Native> {
        // Arrow guarantees that the offsets of a list are within its child.
        let values = self.values.values().get(self.lists.range(row));
        values.unwrap_or_default().to_vec()
    }
}

/// Returns a string that may be null.
pub(super) fn optional_text(strings: &StringArray, row: usize) -> Option<String> {
    strings.is_valid(row).then(|| strings.value(row).to_owned())
}

/// Returns a number that may be null.
pub(super) fn optional_number<T: ArrowPrimitiveType>(
    numbers: &PrimitiveArray<T>,
    row: usize,
) -> Option<T::Native> {
    numbers.is_valid(row).then(|| numbers.value(row))
}
