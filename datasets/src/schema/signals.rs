//! `signals/`: a teacher's distributions. The lists of a row run in parallel: one entry for each loss position.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_array::types::{Float32Type, UInt32Type};
use arrow_schema::{DataType, Schema, SchemaRef};

use super::columns::{
    Cells, Lists, NumberLists, booleans, concat, list, list_of_optional, lists, lists_of_optional,
    number, number_lists, numbers, optional_numbers, required, strings,
};
use super::{Record, batch, check_columns};
use crate::error::Error;
use crate::signal::{Signal, SignalRow};

impl Record for Signal {
    const TABLE: &'static str = "signals";
    // A row is about 100 kB (200 positions of 64 candidates), and a row group is what one random access decodes.
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
        self.rows.iter().any(|row| !row.draw_ids.is_empty())
    }

    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error> {
        rows.iter().try_for_each(Signal::validate)?;
        let positions = || rows.iter().flat_map(|row| &row.rows);
        let counts = || rows.iter().map(|row| row.rows.len());

        let token_ids = rows.iter().map(|row| row.token_ids.as_slice());
        let mask = booleans(concat(rows.iter().map(|row| row.loss_mask.as_slice())));
        let ids = positions().map(|position| position.ids.as_slice());
        let ids = number_lists::<UInt32Type>("support_ids", ids)?;
        let logprobs = positions().map(|position| position.logprobs.as_slice());
        let logprobs = number_lists::<Float32Type>("support_logprobs", logprobs)?;
        let tail =
            numbers::<Float32Type>(positions().map(|position| position.tail_logprob).collect());
        let entropy =
            numbers::<Float32Type>(positions().map(|position| position.entropy).collect());
        let log_z = optional_numbers::<Float32Type>(
            positions().flat_map(|position| position.log_z_at.iter().copied()),
        );
        let log_z = lists_of_optional(
            "log_z_at",
            positions().map(|position| position.log_z_at.len()),
            log_z,
        )?;

        let draw_ids = positions().map(|position| position.draw_ids.as_slice());
        let draw_ids = number_lists::<UInt32Type>("draw_ids", draw_ids)?;
        let draw_counts = positions().map(|position| position.draw_counts.as_slice());
        let draw_counts = number_lists::<UInt32Type>("draw_counts", draw_counts)?;

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
        let column = |name| Cells::of(Self::TABLE, batch, name);
        let (prompt_id, sample_index) = (
            column("prompt_id")?.strings()?,
            column("sample_index")?.numbers::<UInt32Type>()?,
        );
        let provenance = column("provenance")?.numbers::<UInt32Type>()?;
        let token_ids = NumberLists::<UInt32Type>::of(&column("token_ids")?)?;
        let mask_lists = column("loss_mask")?.lists()?;
        let mask = mask_lists.child.booleans()?.values();
        let distributions = Distributions::of(batch)?;
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

/// The columns with an entry for each loss position: the lists of a row, then what they hold.
struct Distributions<'a> {
    ids: (Lists<'a>, NumberLists<'a, UInt32Type>),
    logprobs: (Lists<'a>, NumberLists<'a, Float32Type>),
    log_z: (Lists<'a>, NumberLists<'a, Float32Type>),
    tail: NumberLists<'a, Float32Type>,
    entropy: NumberLists<'a, Float32Type>,
    /// Ids and counts; absent in a file without draws.
    draws: Option<[(Lists<'a>, NumberLists<'a, UInt32Type>); 2]>,
}

impl<'a> Distributions<'a> {
    fn of(batch: &'a RecordBatch) -> Result<Distributions<'a>, Error> {
        let column = |name| Cells::of(Signal::TABLE, batch, name);
        let (ids, logprobs) = (
            column("support_ids")?.lists()?,
            column("support_logprobs")?.lists()?,
        );
        let log_z = column("log_z_at")?.lists()?;
        let of_draws = |name| {
            let lists = column(name)?.lists()?;
            let numbers = NumberLists::of(&lists.child)?;
            Ok::<_, Error>((lists, numbers))
        };
        let draws = match batch.column_by_name("draw_ids") {
            Some(_) => Some([of_draws("draw_ids")?, of_draws("draw_counts")?]),
            None => None,
        };
        let support_ids = NumberLists::of(&ids.child)?;
        let support_logprobs = NumberLists::of(&logprobs.child)?;
        let temperatures = NumberLists::of(&log_z.child)?;
        Ok(Distributions {
            tail: NumberLists::of(&column("tail_logprob")?)?,
            entropy: NumberLists::of(&column("entropy")?)?,
            draws,
            ids: (ids, support_ids),
            logprobs: (logprobs, support_logprobs),
            log_z: (log_z, temperatures),
        })
    }

    fn get(&self, row: usize) -> Result<Vec<SignalRow>, Error> {
        let positions = self.ids.0.range(row);
        let others = [
            &self.logprobs.0,
            &self.log_z.0,
            &self.tail.lists,
            &self.entropy.lists,
        ];
        let of_draws = self.draws.iter().flatten().map(|(lists, _)| lists);
        if let Some(other) = others
            .into_iter()
            .chain(of_draws)
            .find(|other| other.range(row).len() != positions.len())
        {
            let (count, expected) = (other.range(row).len(), positions.len());
            return Err(other.child.bad(
                row,
                format!("{count} positions, though `support_ids` has {expected}"),
            ));
        }
        // The children of different columns begin at different places only if a writer left gaps between lists.
        let [logprobs, log_z, tail, entropy] = others.map(|other| other.range(row).start);
        let draws = |which: usize, i: usize| {
            let columns = self.draws.as_ref().and_then(|draws| draws.get(which));
            let values = columns.map(|(lists, numbers)| numbers.get(lists.range(row).start + i));
            values.unwrap_or_default()
        };
        let rows = positions.enumerate().map(|(i, position)| SignalRow {
            ids: self.ids.1.get(position),
            logprobs: self.logprobs.1.get(logprobs + i),
            tail_logprob: self.tail.values.value(tail + i),
            entropy: self.entropy.values.value(entropy + i),
            log_z_at: self
                .log_z
                .1
                .lists
                .range(log_z + i)
                .map(|index| number(self.log_z.1.values, index))
                .collect(),
            draw_ids: draws(0, i),
            draw_counts: draws(1, i),
        });
        Ok(rows.collect())
    }
}
