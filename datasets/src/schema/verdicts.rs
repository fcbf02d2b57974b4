//! `verdicts/`, and what a student answered to the questions of a task.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_array::types::UInt32Type;
use arrow_schema::{DataType, Schema, SchemaRef};

use super::columns::{
    Cells, booleans, numbers, optional, optional_strings, required, strings, text,
};
use super::{Record, batch, check_columns};
use crate::error::Error;
use crate::records::{TaskSample, Verdict};

impl Record for Verdict {
    const TABLE: &'static str = "verdicts";
    const GROUP_ROWS: usize = 1024;

    fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            required("prompt_id", DataType::Utf8),
            required("sample_index", DataType::UInt32),
            required("grader", DataType::Utf8),
            required("correct", DataType::Boolean),
            optional("extracted", DataType::Utf8),
        ]))
    }

    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error> {
        batch::<Self>(vec![
            strings("prompt_id", rows.iter().map(|row| row.prompt_id.as_str()))?,
            numbers::<UInt32Type>(rows.iter().map(|row| row.sample_index).collect()),
            strings("grader", rows.iter().map(|row| row.grader.as_str()))?,
            booleans(rows.iter().map(|row| row.correct).collect()),
            optional_strings("extracted", rows.iter().map(|row| row.extracted.as_deref()))?,
        ])
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, Error> {
        check_columns::<Self>(&batch.schema())?;
        let column = |name| Cells::of(Self::TABLE, batch, name);
        let (prompt_id, grader) = (
            column("prompt_id")?.strings()?,
            column("grader")?.strings()?,
        );
        let sample_index = column("sample_index")?.numbers::<UInt32Type>()?;
        let correct = column("correct")?.booleans()?;
        let extracted = column("extracted")?.strings()?;
        let rows = (0..batch.num_rows()).map(|row| Verdict {
            prompt_id: prompt_id.value(row).to_owned(),
            sample_index: sample_index.value(row),
            grader: grader.value(row).to_owned(),
            correct: correct.value(row),
            extracted: text(extracted, row),
        });
        Ok(rows.collect())
    }
}

impl Record for TaskSample {
    const TABLE: &'static str = "task samples";
    const GROUP_ROWS: usize = 1024;

    fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            required("prompt_id", DataType::Utf8),
            optional("reasoning", DataType::Utf8),
            required("answer", DataType::Utf8),
            optional("extracted", DataType::Utf8),
            required("correct", DataType::Boolean),
            required("finished", DataType::Boolean),
            required("tokens", DataType::UInt32),
        ]))
    }

    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error> {
        batch::<Self>(vec![
            strings("prompt_id", rows.iter().map(|row| row.prompt_id.as_str()))?,
            optional_strings("reasoning", rows.iter().map(|row| row.reasoning.as_deref()))?,
            strings("answer", rows.iter().map(|row| row.answer.as_str()))?,
            optional_strings("extracted", rows.iter().map(|row| row.extracted.as_deref()))?,
            booleans(rows.iter().map(|row| row.correct).collect()),
            booleans(rows.iter().map(|row| row.finished).collect()),
            numbers::<UInt32Type>(rows.iter().map(|row| row.tokens).collect()),
        ])
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, Error> {
        check_columns::<Self>(&batch.schema())?;
        let column = |name| Cells::of(Self::TABLE, batch, name);
        let (prompt_id, answer) = (
            column("prompt_id")?.strings()?,
            column("answer")?.strings()?,
        );
        let (reasoning, extracted) = (
            column("reasoning")?.strings()?,
            column("extracted")?.strings()?,
        );
        let (correct, finished) = (
            column("correct")?.booleans()?,
            column("finished")?.booleans()?,
        );
        let tokens = column("tokens")?.numbers::<UInt32Type>()?;
        let rows = (0..batch.num_rows()).map(|row| TaskSample {
            prompt_id: prompt_id.value(row).to_owned(),
            reasoning: text(reasoning, row),
            answer: answer.value(row).to_owned(),
            extracted: text(extracted, row),
            correct: correct.value(row),
            finished: finished.value(row),
            tokens: tokens.value(row),
        });
        Ok(rows.collect())
    }
}
