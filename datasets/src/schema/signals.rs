//! The table `signals/`. The lists of a row are parallel: each has one entry for each loss position.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::types::{Float32Type, UInt32Type};
use arrow_array::{ArrayRef, ArrowPrimitiveType, RecordBatch};
use arrow_schema::{DataType, Schema, SchemaRef};

use super::columns::{
    ColumnReader, ListReader, NumberListReader, booleans, concat, list, list_of_optional, lists,
    lists_of_optional, number_lists, numbers, optional_number, optional_numbers, required, strings,
};
use super::{Record, batch, check_columns};
use crate::distributions::{Distributions, ListColumn};
use crate::error::Error;
use crate::signal::{SequenceLength, Signal};

impl Record for Signal {
    const TABLE: &'static str = "signals";
    // A row is about 100 kB (200 positions with a support of 64), and random access decodes a whole row group.
    const GROUP_ROWS: usize = 32;
    const OPTIONAL: &'static [&'static str] = &["draw_ids", "draw_counts"];

    fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            required("prompt_id", DataType::Utf8),
            required("sample_index", DataType::UInt32),
            required("token_ids", list(DataType::UInt32)),
            required("loss_mask", list(DataType::Boolean)),
            required("support_ids", list(list(DataType::UInt32))),
            required("support_logprobs", list(list(DataType::Float32))),
            required("tail_logprob", list(DataType::Float32)),
            required("entropy", list(DataType::Float32)),
            required("log_z_at", list(list_of_optional(DataType::Float32))),
            required("draw_ids", list(list(DataType::UInt32))),
            required("draw_counts", list(list(DataType::UInt32))),
            required("provenance", DataType::UInt32),
        ]))
    }

    fn fills_optional(&self) -> bool {
        !self.rows.draw_ids.values().is_empty()
    }

    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error> {
        rows.iter().try_for_each(Signal::validate)?;
        let distributions = || rows.iter().map(|row| &row.rows);
        let counts = || distributions().map(Distributions::len);

        let token_ids = rows.iter().map(|row| row.token_ids.as_slice());
        let mask = booleans(concat(rows.iter().map(|row| row.loss_mask.as_slice())));
        let ids = number_lists_of::<UInt32Type>("support_ids", distributions().map(|d| &d.ids))?;
        let logprobs = distributions().map(|d| &d.logprobs);
        let logprobs = number_lists_of::<Float32Type>("support_logprobs", logprobs)?;
        let tail = distributions().map(|d| d.tail_logprob.as_slice());
        let tail = numbers::<Float32Type>(concat(tail));
        let entropy = distributions().map(|d| d.entropy.as_slice());
        let entropy = numbers::<Float32Type>(concat(entropy));
        let log_z = distributions().flat_map(|d| d.log_z_at.values().iter().copied());
        let log_z = lists_of_optional(
            "log_z_at",
            distributions().flat_map(|d| d.log_z_at.lengths()),
            optional_numbers::<Float32Type>(log_z),
        )?;
        let draw_ids = distributions().map(|d| &d.draw_ids);
        let draw_ids = number_lists_of::<UInt32Type>("draw_ids", draw_ids)?;
        let draw_counts = distributions().map(|d| &d.draw_counts);
        let draw_counts = number_lists_of::<UInt32Type>("draw_counts", draw_counts)?;

        batch::<Self>(vec![
            strings("prompt_id", rows.iter().map(|row| row.prompt_id.as_str()))?,
            numbers::<UInt32Type>(rows.iter().map(|row| row.sample_index).collect()),
            number_lists::<UInt32Type>("token_ids", token_ids)?,
            lists(
                "loss_mask",
                rows.iter().map(|row| row.loss_mask.len()),
                mask,
            )?,
            lists("support_ids", counts(), ids)?,
            lists("support_logprobs", counts(), logprobs)?,
            lists("tail_logprob", counts(), tail)?,
            lists("entropy", counts(), entropy)?,
            lists("log_z_at", counts(), log_z)?,
            lists("draw_ids", counts(), draw_ids)?,
            lists("draw_counts", counts(), draw_counts)?,
            numbers::<UInt32Type>(rows.iter().map(|row| row.provenance).collect()),
        ])
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, Error> {
        check_columns::<Self>(&batch.schema())?;
        let column = |name| ColumnReader::new(Self::TABLE, batch, name);
        let (prompt_id, sample_index) = (
            column("prompt_id")?.strings()?,
            column("sample_index")?.numbers::<UInt32Type>()?,
        );
        let provenance = column("provenance")?.numbers::<UInt32Type>()?;
        let token_ids = NumberListReader::<UInt32Type>::new(&column("token_ids")?)?;
        let mask_lists = column("loss_mask")?.lists()?;
        let mask = mask_lists.child.booleans()?.values();
        let distributions = DistributionReader::new(batch)?;
        let rows = (0..batch.num_rows()).map(|row| {
            let signal = Signal {
                prompt_id: prompt_id.value(row).to_owned(),
                sample_index: sample_index.value(row),
                token_ids: token_ids.get(row),
                loss_mask: mask_lists
                    .range(row)
                    .map(|index| mask.value(index))
                    .collect(),
                rows: distributions.get(row)?,
                provenance: provenance.value(row),
            };
            signal.validate()?;
            Ok(signal)
        });
        rows.collect()
    }
}

/// Builds a list column of numbers from the columns of several sequences.
fn number_lists_of<'a, T: ArrowPrimitiveType>(
    column: &str,
    columns: impl Iterator<Item = &'a ListColumn<T::Native>> + Clone,
) -> Result<ArrayRef, Error> {
    let values = concat(columns.clone().map(ListColumn::values));
    let lengths = columns.flat_map(ListColumn::lengths);
    lists(column, lengths, numbers::<T>(values))
}

/// Copies consecutive lists of a column of numbers.
fn list_column<T: ArrowPrimitiveType>(
    column: &NumberListReader<'_, T>,
    rows: Range<usize>,
) -> ListColumn<T::Native> {
    let range = column.lists.ranges(rows.clone());
    // Arrow guarantees that the offsets of a list are within its child.
    let values = column.values.values().get(range);
    column
        .lists
        .column(rows, values.unwrap_or_default().to_vec())
}

/// Returns the lengths of the sequences of a batch that has at least the columns `token_ids` and `loss_mask`.
pub(crate) fn sequence_lengths(batch: &RecordBatch) -> Result<Vec<SequenceLength>, Error> {
    let column = |name| ColumnReader::new(Signal::TABLE, batch, name);
    let token_ids = column("token_ids")?.lists()?;
    let mask_lists = column("loss_mask")?.lists()?;
    let mask = mask_lists.child.booleans()?.values();
    let rows = (0..batch.num_rows()).map(|row| SequenceLength {
        tokens: token_ids.range(row).len(),
        first_loss: (mask_lists.range(row).skip(1))
            .position(|index| mask.value(index))
            .map(|position| position + 1),
    });
    Ok(rows.collect())
}

/// Columns with an entry for each loss position. A pair holds the lists of a row and the lists of a position.
struct DistributionReader<'a> {
    ids: (ListReader<'a>, NumberListReader<'a, UInt32Type>),
    logprobs: (ListReader<'a>, NumberListReader<'a, Float32Type>),
    log_z: (ListReader<'a>, NumberListReader<'a, Float32Type>),
    tail: NumberListReader<'a, Float32Type>,
    entropy: NumberListReader<'a, Float32Type>,
    /// Ids and counts of the tail draws; `None` for a file without draws.
    draws: Option<[(ListReader<'a>, NumberListReader<'a, UInt32Type>); 2]>,
}

impl<'a> DistributionReader<'a> {
    fn new(batch: &'a RecordBatch) -> Result<DistributionReader<'a>, Error> {
        let column = |name| ColumnReader::new(Signal::TABLE, batch, name);
        let (ids, logprobs) = (
            column("support_ids")?.lists()?,
            column("support_logprobs")?.lists()?,
        );
        let log_z = column("log_z_at")?.lists()?;
        let draw_column = |name| {
            let lists = column(name)?.lists()?;
            let numbers = NumberListReader::new(&lists.child)?;
            Ok::<_, Error>((lists, numbers))
        };
        let draws = match batch.column_by_name("draw_ids") {
            Some(_) => Some([draw_column("draw_ids")?, draw_column("draw_counts")?]),
            None => None,
        };
        let support_ids = NumberListReader::new(&ids.child)?;
        let support_logprobs = NumberListReader::new(&logprobs.child)?;
        let temperatures = NumberListReader::new(&log_z.child)?;
        Ok(DistributionReader {
            tail: NumberListReader::new(&column("tail_logprob")?)?,
            entropy: NumberListReader::new(&column("entropy")?)?,
            draws,
            ids: (ids, support_ids),
            logprobs: (logprobs, support_logprobs),
            log_z: (log_z, temperatures),
        })
    }

    fn get(&self, row: usize) -> Result<Distributions, Error> {
        let positions = self.ids.0.range(row);
        let others = [
            &self.logprobs.0,
            &self.log_z.0,
            &self.tail.lists,
            &self.entropy.lists,
        ];
        let draw_lists = self.draws.iter().flatten().map(|(lists, _)| lists);
        if let Some(other) = others
            .into_iter()
            .chain(draw_lists)
            .find(|other| other.range(row).len() != positions.len())
        {
            let (count, expected) = (other.range(row).len(), positions.len());
            return Err(other.child.bad(
                row,
                format!("{count} positions, and `support_ids` has {expected}"),
            ));
        }
        // The lists of a row may begin at a different offset in each column.
        let [logprobs, log_z, _, _] = others.map(|other| other.range(row));
        let draws = |which: usize| match self.draws.as_ref().and_then(|draws| draws.get(which)) {
            Some((lists, numbers)) => list_column(numbers, lists.range(row)),
            None => ListColumn::empty_lists(positions.len()),
        };
        let log_z_values = self.log_z.1.lists.ranges(log_z.clone());
        let log_z_values = log_z_values.map(|index| optional_number(self.log_z.1.values, index));
        Ok(Distributions {
            ids: list_column(&self.ids.1, positions.clone()),
            logprobs: list_column(&self.logprobs.1, logprobs),
            tail_logprob: self.tail.get(row),
            entropy: self.entropy.get(row),
            log_z_at: self.log_z.1.lists.column(log_z, log_z_values.collect()),
            draw_ids: draws(0),
            draw_counts: draws(1),
        })
    }
}
