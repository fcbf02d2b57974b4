//! Conversion of a cell of a Parquet file to JSON.

use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Float64Type};
use arrow_cast::display::array_value_to_string;
use arrow_schema::DataType;
use serde_json::{Number, Value};

/// Bytes that a number, a null or the head of a list counts as.
const SMALL_BYTES: usize = 4;
/// Most bytes of a text that are kept for a message.
const SHOWN_BYTES: usize = 1000;

/// The bytes that the cells of a row may have.
pub(super) struct Budget {
    limit: usize,
    used: usize,
    /// Whether bytes that are not UTF-8 are an error in a column of bytes, too. Otherwise they are null.
    are_bytes_text: bool,
}

impl Budget {
    pub(super) fn new(limit: usize, are_bytes_text: bool) -> Budget {
        Budget {
            limit,
            used: 0,
            are_bytes_text,
        }
    }

    pub(super) fn used(&self) -> usize {
        self.used
    }

    fn take(&mut self, bytes: usize) -> Result<(), CellProblem> {
        self.used = self.used.saturating_add(bytes);
        match self.used > self.limit {
            true => Err(CellProblem::TooLong),
            false => Ok(()),
        }
    }
}

/// Reason why a cell cannot be read.
#[derive(Debug)]
pub(super) enum CellProblem {
    /// The row is longer than its budget.
    TooLong,
    /// The first bytes of a text that is not UTF-8.
    NotText(Vec<u8>),
    Unreadable(String),
}

/// Converts a cell to JSON. `own` is the type that the file gives to the column, whose text is read as bytes. Null fields
/// of a struct are left out, because a table has every field in every row.
pub(super) fn value(
    array: &dyn Array,
    row: usize,
    own: &DataType,
    budget: &mut Budget,
) -> Result<Value, CellProblem> {
    budget.take(SMALL_BYTES)?;
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    let float = |number: f64| Number::from_f64(number).map_or(Value::Null, Value::Number);
    match array.data_type() {
        DataType::BinaryView => text(array.as_binary_view().value(row), own, budget),
        DataType::Boolean => Ok(array.as_boolean().value(row).into()),
        // A 32-bit 0.1 becomes 0.1, not 0.10000000149011612.
        DataType::Float32 => {
            let shortest = array.as_primitive::<Float32Type>().value(row).to_string();
            Ok(float(shortest.parse().unwrap_or(f64::NAN)))
        }
        DataType::Float64 => Ok(float(array.as_primitive::<Float64Type>().value(row))),
        DataType::List(element) => {
            let own = match own {
                DataType::List(own) => own.data_type(),
                _ => element.data_type(),
            };
            let list = array.as_list::<i32>().value(row);
            let values = (0..list.len()).map(|index| value(&list, index, own, budget));
            Ok(Value::Array(values.collect::<Result<_, _>>()?))
        }
        DataType::Struct(fields) => {
            let fields = fields.iter().zip(array.as_struct().columns());
            let present = fields.filter(|(_, cells)| cells.is_valid(row));
            let cells = present.map(|(field, cells)| {
                let own = match own {
                    DataType::Struct(own) => own.find(field.name()).map(|(_, own)| own.data_type()),
                    _ => None,
                };
                let own = own.unwrap_or(field.data_type());
                budget.take(field.name().len())?;
                Ok((field.name().clone(), value(cells, row, own, budget)?))
            });
            Ok(Value::Object(cells.collect::<Result<_, CellProblem>>()?))
        }
        kind => {
            let text = array_value_to_string(array, row)
                .map_err(|error| CellProblem::Unreadable(error.to_string()))?;
            budget.take(text.len())?;
            match text.parse::<Number>() {
                Ok(number) if kind.is_integer() => Ok(Value::Number(number)),
                _ => Ok(Value::String(text)),
            }
        }
    }
}

fn text(bytes: &[u8], own: &DataType, budget: &mut Budget) -> Result<Value, CellProblem> {
    budget.take(bytes.len())?;
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.into()),
        // A picture, say, in a column that nobody asked for.
        Err(_) if *own == DataType::Binary && !budget.are_bytes_text => Ok(Value::Null),
        Err(error) => {
            let start = error.valid_up_to().saturating_sub(SHOWN_BYTES / 2);
            let shown = bytes.iter().skip(start).take(SHOWN_BYTES);
            Err(CellProblem::NotText(shown.copied().collect()))
        }
    }
}
