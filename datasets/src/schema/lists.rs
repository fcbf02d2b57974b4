//! The narrow tables: `train/`, `heldout/`, `dropped/`, and a student's `samples.parquet`.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_array::types::{Float64Type, UInt32Type};
use arrow_schema::{DataType, Schema, SchemaRef};

use super::columns::{Cells, concat, list, lists, numbers, part, required, strings};
use super::{Record, batch, check_columns};
use crate::error::Error;
use crate::records::{CONFIDENCE_BINS, Dropped, Failed, Selected, SequenceValues};

impl Record for Selected {
    const TABLE: &'static str = "train";
    const GROUP_ROWS: usize = 1024;

    fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            required("shard", DataType::UInt32),
            required("row", DataType::UInt32),
            required("prompt_id", DataType::Utf8),
            required("sample_index", DataType::UInt32),
        ]))
    }

    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error> {
        batch::<Self>(vec![
            numbers::<UInt32Type>(rows.iter().map(|row| row.shard).collect()),
            numbers::<UInt32Type>(rows.iter().map(|row| row.row).collect()),
            strings("prompt_id", rows.iter().map(|row| row.prompt_id.as_str()))?,
            numbers::<UInt32Type>(rows.iter().map(|row| row.sample_index).collect()),
        ])
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, Error> {
        check_columns::<Self>(&batch.schema())?;
        let column = |name| Cells::of(Self::TABLE, batch, name);
        let (shard, place) = (
            column("shard")?.numbers::<UInt32Type>()?,
            column("row")?.numbers::<UInt32Type>()?,
        );
        let prompt_id = column("prompt_id")?.strings()?;
        let sample_index = column("sample_index")?.numbers::<UInt32Type>()?;
        let rows = (0..batch.num_rows()).map(|row| Selected {
            shard: shard.value(row),
            row: place.value(row),
            prompt_id: prompt_id.value(row).to_owned(),
            sample_index: sample_index.value(row),
        });
        Ok(rows.collect())
    }
}

impl Record for Dropped {
    const TABLE: &'static str = "dropped";
    const GROUP_ROWS: usize = 1024;

    fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            required("prompt_id", DataType::Utf8),
            required("sample_index", DataType::UInt32),
            required("reason", DataType::Utf8),
        ]))
    }

    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error> {
        batch::<Self>(vec![
            strings("prompt_id", rows.iter().map(|row| row.prompt_id.as_str()))?,
            numbers::<UInt32Type>(rows.iter().map(|row| row.sample_index).collect()),
            strings("reason", rows.iter().map(|row| row.reason.as_str()))?,
        ])
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, Error> {
        check_columns::<Self>(&batch.schema())?;
        let column = |name| Cells::of(Self::TABLE, batch, name);
        let (prompt_id, reason) = (
            column("prompt_id")?.strings()?,
            column("reason")?.strings()?,
        );
        let sample_index = column("sample_index")?.numbers::<UInt32Type>()?;
        let rows = (0..batch.num_rows()).map(|row| Dropped {
            prompt_id: prompt_id.value(row).to_owned(),
            sample_index: sample_index.value(row),
            reason: reason.value(row).to_owned(),
        });
        Ok(rows.collect())
    }
}

impl Record for Failed {
    const TABLE: &'static str = "failures";
    const GROUP_ROWS: usize = 1024;

    fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            required("prompt_id", DataType::Utf8),
            required("sample_index", DataType::UInt32),
            required("reason", DataType::Utf8),
            required("message", DataType::Utf8),
        ]))
    }

    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error> {
        batch::<Self>(vec![
            strings("prompt_id", rows.iter().map(|row| row.prompt_id.as_str()))?,
            numbers::<UInt32Type>(rows.iter().map(|row| row.sample_index).collect()),
            strings("reason", rows.iter().map(|row| row.reason.as_str()))?,
            strings("message", rows.iter().map(|row| row.message.as_str()))?,
        ])
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, Error> {
        check_columns::<Self>(&batch.schema())?;
        let column = |name| Cells::of(Self::TABLE, batch, name);
        let (prompt_id, reason, message) = (
            column("prompt_id")?.strings()?,
            column("reason")?.strings()?,
            column("message")?.strings()?,
        );
        let sample_index = column("sample_index")?.numbers::<UInt32Type>()?;
        let rows = (0..batch.num_rows()).map(|row| Failed {
            prompt_id: prompt_id.value(row).to_owned(),
            sample_index: sample_index.value(row),
            reason: reason.value(row).to_owned(),
            message: message.value(row).to_owned(),
        });
        Ok(rows.collect())
    }
}

impl Record for SequenceValues {
    const TABLE: &'static str = "samples";
    const GROUP_ROWS: usize = 1024;

    fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            required("prompt_id", DataType::Utf8),
            required("sample_index", DataType::UInt32),
            required("tokens", DataType::UInt32),
            required("kl_nats", DataType::Float64),
            required("nll_nats", DataType::Float64),
            required("agree", DataType::UInt32),
            required("teacher_nll_nats", DataType::Float64),
            required("bin_tokens", list(DataType::UInt32)),
            required("bin_confidence", list(DataType::Float64)),
            required("bin_correct", list(DataType::UInt32)),
        ]))
    }

    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error> {
        for (row, values) in rows.iter().enumerate() {
            check_bins(row, values)?;
        }
        let bins = |column, child| {
            let lengths = rows.iter().map(|_| CONFIDENCE_BINS);
            lists(column, lengths, child)
        };
        let tokens = concat(rows.iter().map(|row| row.bin_tokens.as_slice()));
        let confidence = concat(rows.iter().map(|row| row.bin_confidence.as_slice()));
        let correct = concat(rows.iter().map(|row| row.bin_correct.as_slice()));
        batch::<Self>(vec![
            strings("prompt_id", rows.iter().map(|row| row.prompt_id.as_str()))?,
            numbers::<UInt32Type>(rows.iter().map(|row| row.sample_index).collect()),
            numbers::<UInt32Type>(rows.iter().map(|row| row.tokens).collect()),
            numbers::<Float64Type>(rows.iter().map(|row| row.kl_nats).collect()),
            numbers::<Float64Type>(rows.iter().map(|row| row.nll_nats).collect()),
            numbers::<UInt32Type>(rows.iter().map(|row| row.agree).collect()),
            numbers::<Float64Type>(rows.iter().map(|row| row.teacher_nll_nats).collect()),
            bins("bin_tokens", numbers::<UInt32Type>(tokens))?,
            bins("bin_confidence", numbers::<Float64Type>(confidence))?,
            bins("bin_correct", numbers::<UInt32Type>(correct))?,
        ])
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, Error> {
        check_columns::<Self>(&batch.schema())?;
        let column = |name| Cells::of(Self::TABLE, batch, name);
        let (prompt_id, sample_index) = (
            column("prompt_id")?.strings()?,
            column("sample_index")?.numbers::<UInt32Type>()?,
        );
        let (tokens, agree) = (
            column("tokens")?.numbers::<UInt32Type>()?,
            column("agree")?.numbers::<UInt32Type>()?,
        );
        let kl_nats = column("kl_nats")?.numbers::<Float64Type>()?;
        let nll_nats = column("nll_nats")?.numbers::<Float64Type>()?;
        let teacher_nll_nats = column("teacher_nll_nats")?.numbers::<Float64Type>()?;
        let bin_tokens = column("bin_tokens")?.lists()?;
        let bin_confidence = column("bin_confidence")?.lists()?;
        let bin_correct = column("bin_correct")?.lists()?;
        let tokens_flat = bin_tokens.child.numbers::<UInt32Type>()?.values();
        let confidence_flat = bin_confidence.child.numbers::<Float64Type>()?.values();
        let correct_flat = bin_correct.child.numbers::<UInt32Type>()?.values();
        let rows = (0..batch.num_rows()).map(|row| {
            let values = SequenceValues {
                prompt_id: prompt_id.value(row).to_owned(),
                sample_index: sample_index.value(row),
                tokens: tokens.value(row),
                kl_nats: kl_nats.value(row),
                nll_nats: nll_nats.value(row),
                agree: agree.value(row),
                teacher_nll_nats: teacher_nll_nats.value(row),
                bin_tokens: part(tokens_flat, bin_tokens.range(row)),
                bin_confidence: part(confidence_flat, bin_confidence.range(row)),
                bin_correct: part(correct_flat, bin_correct.range(row)),
            };
            check_bins(row, &values).map(|()| values)
        });
        rows.collect()
    }
}

/// Every list of bins has an entry for each bin.
fn check_bins(row: usize, values: &SequenceValues) -> Result<(), Error> {
    let lengths = [
        ("bin_tokens", values.bin_tokens.len()),
        ("bin_confidence", values.bin_confidence.len()),
        ("bin_correct", values.bin_correct.len()),
    ];
    match lengths
        .into_iter()
        .find(|(_, length)| *length != CONFIDENCE_BINS)
    {
        None => Ok(()),
        Some((column, length)) => Err(Error::Cell {
            row,
            column: column.into(),
            why: format!("a list of {length}, where each of {CONFIDENCE_BINS} bins has an entry"),
        }),
    }
}
