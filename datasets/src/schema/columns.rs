//! Columns from flat buffers and back. A list column is built from its lengths and one flat child, never value by
//! value, since a batch of signals holds hundreds of thousands of numbers.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{
    Array, ArrayRef, ArrowPrimitiveType, BinaryArray, BooleanArray, ListArray, PrimitiveArray,
    RecordBatch, StringArray, StructArray,
};
use arrow_buffer::{BooleanBuffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow_schema::{ArrowError, DataType, Field, Fields};

use crate::error::Error;

// ---- types ----

pub(super) fn required(name: &str, data_type: DataType) -> Field {
    Field::new(name, data_type, false)
}

pub(super) fn optional(name: &str, data_type: DataType) -> Field {
    Field::new(name, data_type, true)
}

/// A list whose values are never null. `element` is what the Parquet format calls them.
pub(super) fn list(element: DataType) -> DataType {
    DataType::List(Arc::new(required("element", element)))
}

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
        .map_err(unfit(column))
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
        .map_err(unfit(column))
}

pub(super) fn binaries<'a>(
    column: &str,
    values: impl Iterator<Item = &'a [u8]> + Clone,
) -> Result<ArrayRef, Error> {
    let (offsets, bytes) = flat_bytes(column, values)?;
    BinaryArray::try_new(offsets, bytes.into(), None)
        .map(array)
        .map_err(unfit(column))
}

/// A list column over a flat child: row i takes the next `lengths[i]` values, none of them null.
pub(super) fn lists(
    column: &str,
    lengths: impl Iterator<Item = usize>,
    child: ArrayRef,
) -> Result<ArrayRef, Error> {
    let element = required("element", child.data_type().clone());
    lists_as(element, column, lengths, child)
}

/// A list column of numbers, none of them null.
pub(super) fn number_lists<'a, T: ArrowPrimitiveType>(
    column: &str,
    rows: impl Iterator<Item = &'a [T::Native]> + Clone,
) -> Result<ArrayRef, Error> {
    let lengths = rows.clone().map(<[T::Native]>::len);
    lists(column, lengths, numbers::<T>(concat(rows)))
}

pub(super) fn lists_of_optional(
    column: &str,
    lengths: impl Iterator<Item = usize>,
    child: ArrayRef,
) -> Result<ArrayRef, Error> {
    let element = optional("element", child.data_type().clone());
    lists_as(element, column, lengths, child)
}

fn lists_as(
    element: Field,
    column: &str,
    lengths: impl Iterator<Item = usize>,
    child: ArrayRef,
) -> Result<ArrayRef, Error> {
    let offsets = offsets(column, lengths)?;
    ListArray::try_new(Arc::new(element), offsets, child, None)
        .map(array)
        .map_err(unfit(column))
}

pub(super) fn structs(
    column: &str,
    fields: Fields,
    children: Vec<ArrayRef>,
) -> Result<ArrayRef, Error> {
    StructArray::try_new(fields, children, None)
        .map(array)
        .map_err(unfit(column))
}

/// All slices behind one another.
pub(super) fn concat<'a, T: Copy + 'a>(slices: impl Iterator<Item = &'a [T]> + Clone) -> Vec<T> {
    let mut flat = Vec::with_capacity(slices.clone().map(<[T]>::len).sum());
    slices.for_each(|slice| flat.extend_from_slice(slice));
    flat
}

pub(super) fn unfit(column: &str) -> impl FnOnce(ArrowError) -> Error {
    move |source| Error::Batch {
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

/// Arrow's own constructor panics on more than `i32::MAX` values.
fn offsets(column: &str, lengths: impl Iterator<Item = usize>) -> Result<OffsetBuffer<i32>, Error> {
    let mut offsets = Vec::with_capacity(lengths.size_hint().0 + 1);
    let mut end = 0_i32;
    offsets.push(end);
    for length in lengths {
        end = i32::try_from(length)
            .ok()
            .and_then(|length| end.checked_add(length))
            .ok_or_else(|| Error::TooLarge {
                column: column.into(),
            })?;
        offsets.push(end);
    }
    Ok(OffsetBuffer::new(ScalarBuffer::from(offsets)))
}

// ---- reading ----

/// A column, or a part of one, with its name for errors. Rows are those of the batch it was taken from.
#[derive(Clone)]
pub(super) struct Cells<'a> {
    table: &'static str,
    column: String,
    array: &'a dyn Array,
}

impl<'a> Cells<'a> {
    pub(super) fn of(
        table: &'static str,
        batch: &'a RecordBatch,
        column: &str,
    ) -> Result<Cells<'a>, Error> {
        match batch.column_by_name(column) {
            Some(array) => Ok(Cells {
                table,
                column: column.into(),
                array,
            }),
            None => Err(absent(table, column.into())),
        }
    }

    /// A field of a struct column.
    pub(super) fn field(&self, name: &str) -> Result<Cells<'a>, Error> {
        let fields = self
            .array
            .as_struct_opt()
            .ok_or_else(|| self.mistyped("a struct"))?;
        let column = format!("{}.{name}", self.column);
        match fields.column_by_name(name) {
            Some(array) => Ok(Cells {
                table: self.table,
                column,
                array,
            }),
            None => Err(absent(self.table, column)),
        }
    }

    pub(super) fn lists(&self) -> Result<Lists<'a>, Error> {
        let lists: &ListArray = self
            .array
            .as_list_opt()
            .ok_or_else(|| self.mistyped("a list"))?;
        let child = Cells {
            table: self.table,
            column: self.column.clone(),
            array: lists.values(),
        };
        Ok(Lists {
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

    /// An error about the content of one row.
    pub(super) fn bad(&self, row: usize, why: String) -> Error {
        Error::Cell {
            row,
            column: self.column.clone(),
            why,
        }
    }

    fn mistyped(&self, expected: &str) -> Error {
        Error::Column {
            table: self.table,
            column: self.column.clone(),
            expected: expected.into(),
            found: self.array.data_type().to_string(),
        }
    }
}

fn absent(table: &'static str, column: String) -> Error {
    Error::Column {
        table,
        column,
        expected: "there".into(),
        found: "absent".into(),
    }
}

/// A list column as ranges of its flat child.
pub(super) struct Lists<'a> {
    offsets: &'a [i32],
    pub(super) child: Cells<'a>,
}

impl Lists<'_> {
    /// Where a row's values lie in the child; empty for a row that is not there.
    pub(super) fn range(&self, row: usize) -> Range<usize> {
        match self.offsets.get(row..row + 2) {
            // Arrow holds offsets to be ascending from 0, so neither is negative.
            Some([start, end]) => start.unsigned_abs() as usize..end.unsigned_abs() as usize,
            _ => 0..0,
        }
    }
}

/// A list column of numbers.
pub(super) struct NumberLists<'a, T: ArrowPrimitiveType> {
    pub(super) lists: Lists<'a>,
    pub(super) values: &'a PrimitiveArray<T>,
}

impl<'a, T: ArrowPrimitiveType> NumberLists<'a, T> {
    pub(super) fn of(cells: &Cells<'a>) -> Result<NumberLists<'a, T>, Error> {
        let lists = cells.lists()?;
        let values = lists.child.numbers()?;
        Ok(NumberLists { lists, values })
    }

    pub(super) fn get(&self, row: usize) -> Vec<T::Native> {
        part(self.values.values(), self.lists.range(row))
    }
}

/// A range's values. Arrow holds the offsets of a list to be within its child.
pub(super) fn part<T: Copy>(values: &[T], range: Range<usize>) -> Vec<T> {
    values.get(range).unwrap_or_default().to_vec()
}

/// A string that may be null.
pub(super) fn text(strings: &StringArray, row: usize) -> Option<String> {
    strings.is_valid(row).then(|| strings.value(row).to_owned())
}

/// A number that may be null.
pub(super) fn number<T: ArrowPrimitiveType>(
    numbers: &PrimitiveArray<T>,
    row: usize,
) -> Option<T::Native> {
    numbers.is_valid(row).then(|| numbers.value(row))
}
