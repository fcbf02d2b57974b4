//! The narrow tables: `train/`, `heldout/`, `dropped/`, and a student's `samples.parquet`.

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Float64Type, Schema, SchemaRef, UInt32Type};

use super::columns::{Cells, numbers, required, strings};
use super::{Record, batch, check_columns};
use crate::error::Error;
use crate::records::{Dropped, Selected, SequenceValues};

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
        ]))
    }

    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error> {
        batch::<Self>(vec![
            strings("prompt_id", rows.iter().map(|row| row.prompt_id.as_str()))?,
            numbers::<UInt32Type>(rows.iter().map(|row| row.sample_index).collect()),
            numbers::<UInt32Type>(rows.iter().map(|row| row.tokens).collect()),
            numbers::<Float64Type>(rows.iter().map(|row| row.kl_nats).collect()),
            numbers::<Float64Type>(rows.iter().map(|row| row.nll_nats).collect()),
            numbers::<UInt32Type>(rows.iter().map(|row| row.agree).collect()),
            numbers::<Float64Type>(rows.iter().map(|row| row.teacher_nll_nats).collect()),
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
        let rows = (0..batch.num_rows()).map(|row| SequenceValues {
            prompt_id: prompt_id.value(row).to_owned(),
            sample_index: sample_index.value(row),
            tokens: tokens.value(row),
            kl_nats: kl_nats.value(row),
            nll_nats: nll_nats.value(row),
            agree: agree.value(row),
            teacher_nll_nats: teacher_nll_nats.value(row),
        });
        Ok(rows.collect())
    }
}
