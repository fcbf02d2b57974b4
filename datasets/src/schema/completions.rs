//! `completions/`: what a teacher answered, token by token where it says.

use std::sync::Arc;

use arrow_array::types::{Float32Type, UInt32Type};
use arrow_array::{ArrayRef, BinaryArray, Float32Array, RecordBatch, UInt32Array};
use arrow_schema::{DataType, Fields, Schema, SchemaRef};

use super::columns::{
    Cells, Lists, binaries, list, lists, number, numbers, optional, optional_numbers,
    optional_strings, required, strings, structs, text,
};
use super::prompts::{ToolCalls, tool_call_fields, tool_call_lists};
use super::{Record, batch, check_columns};
use crate::error::Error;
use crate::records::{Completion, FinishReason, SampledToken, ToolCall, TopToken, Usage};

impl Record for Completion {
    const TABLE: &'static str = "completions";
    const GROUP_ROWS: usize = 1024;

    fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            required("prompt_id", DataType::Utf8),
            required("sample_index", DataType::UInt32),
            optional("reasoning", DataType::Utf8),
            required("answer", DataType::Utf8),
            required("tool_calls", list(DataType::Struct(tool_call_fields()))),
            required("finish_reason", DataType::Utf8),
            required("prompt_tokens", DataType::UInt32),
            required("completion_tokens", DataType::UInt32),
            required("tokens", list(DataType::Struct(token_fields()))),
            required("provenance", DataType::UInt32),
        ]))
    }

    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error> {
        let calls: Vec<&ToolCall> = rows.iter().flat_map(|row| &row.tool_calls).collect();
        let tokens: Vec<&SampledToken> = rows.iter().flat_map(|row| &row.tokens).collect();
        batch::<Self>(vec![
            strings("prompt_id", rows.iter().map(|row| row.prompt_id.as_str()))?,
            numbers::<UInt32Type>(rows.iter().map(|row| row.sample_index).collect()),
            optional_strings("reasoning", rows.iter().map(|row| row.reasoning.as_deref()))?,
            strings("answer", rows.iter().map(|row| row.answer.as_str()))?,
            tool_call_lists(
                "tool_calls",
                rows.iter().map(|row| row.tool_calls.len()),
                &calls,
            )?,
            strings(
                "finish_reason",
                rows.iter().map(|row| row.finish_reason.name()),
            )?,
            numbers::<UInt32Type>(rows.iter().map(|row| row.usage.prompt_tokens).collect()),
            numbers::<UInt32Type>(rows.iter().map(|row| row.usage.completion_tokens).collect()),
            lists(
                "tokens",
                rows.iter().map(|row| row.tokens.len()),
                token_column(&tokens)?,
            )?,
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
        let (reasoning, answer) = (
            column("reasoning")?.strings()?,
            column("answer")?.strings()?,
        );
        let tool_calls = ToolCalls::of(&column("tool_calls")?)?;
        let finish_reason = column("finish_reason")?;
        let finish_names = finish_reason.strings()?;
        let prompt_tokens = column("prompt_tokens")?.numbers::<UInt32Type>()?;
        let completion_tokens = column("completion_tokens")?.numbers::<UInt32Type>()?;
        let token_lists = column("tokens")?.lists()?;
        let tokens = Tokens::of(&token_lists.child)?;
        let provenance = column("provenance")?.numbers::<UInt32Type>()?;
        let rows = (0..batch.num_rows()).map(|row| {
            let finish_name = finish_names.value(row);
            let unknown =
                || finish_reason.bad(row, format!("`{finish_name}` is not a reason to finish"));
            Ok(Completion {
                prompt_id: prompt_id.value(row).to_owned(),
                sample_index: sample_index.value(row),
                reasoning: text(reasoning, row),
                answer: answer.value(row).to_owned(),
                tool_calls: tool_calls.get(row),
                finish_reason: FinishReason::from_name(finish_name).ok_or_else(unknown)?,
                usage: Usage {
                    prompt_tokens: prompt_tokens.value(row),
                    completion_tokens: completion_tokens.value(row),
                },
                tokens: token_lists
                    .range(row)
                    .map(|index| tokens.get(index))
                    .collect(),
                provenance: provenance.value(row),
            })
        });
        rows.collect()
    }
}

fn token_fields() -> Fields {
    Fields::from(vec![
        required("bytes", DataType::Binary),
        optional("id", DataType::UInt32),
        required("logprob", DataType::Float32),
        required("top", list(DataType::Struct(top_fields()))),
    ])
}

fn top_fields() -> Fields {
    Fields::from(vec![
        optional("id", DataType::UInt32),
        required("bytes", DataType::Binary),
        required("logprob", DataType::Float32),
    ])
}

fn token_column(tokens: &[&SampledToken]) -> Result<ArrayRef, Error> {
    let tops: Vec<&TopToken> = tokens.iter().flat_map(|token| &token.top).collect();
    let top_children = vec![
        optional_numbers::<UInt32Type>(tops.iter().map(|top| top.id)),
        binaries("tokens.top.bytes", tops.iter().map(|top| &*top.bytes))?,
        numbers::<Float32Type>(tops.iter().map(|top| top.logprob).collect()),
    ];
    let top = structs("tokens.top", top_fields(), top_children)?;
    let children = vec![
        binaries("tokens.bytes", tokens.iter().map(|token| &*token.bytes))?,
        optional_numbers::<UInt32Type>(tokens.iter().map(|token| token.id)),
        numbers::<Float32Type>(tokens.iter().map(|token| token.logprob).collect()),
        lists(
            "tokens.top",
            tokens.iter().map(|token| token.top.len()),
            top,
        )?,
    ];
    structs("tokens", token_fields(), children)
}

struct Tokens<'a> {
    bytes: &'a BinaryArray,
    id: &'a UInt32Array,
    logprob: &'a Float32Array,
    top: Lists<'a>,
    top_id: &'a UInt32Array,
    top_bytes: &'a BinaryArray,
    top_logprob: &'a Float32Array,
}

impl<'a> Tokens<'a> {
    fn of(cells: &Cells<'a>) -> Result<Tokens<'a>, Error> {
        let top = cells.field("top")?.lists()?;
        Ok(Tokens {
            bytes: cells.field("bytes")?.binaries()?,
            id: cells.field("id")?.numbers()?,
            logprob: cells.field("logprob")?.numbers()?,
            top_id: top.child.field("id")?.numbers()?,
            top_bytes: top.child.field("bytes")?.binaries()?,
            top_logprob: top.child.field("logprob")?.numbers()?,
            top,
        })
    }

    fn get(&self, index: usize) -> SampledToken {
        let top = |index| TopToken {
            id: number(self.top_id, index),
            bytes: self.top_bytes.value(index).into(),
            logprob: self.top_logprob.value(index),
        };
        SampledToken {
            bytes: self.bytes.value(index).into(),
            id: number(self.id, index),
            logprob: self.logprob.value(index),
            top: self.top.range(index).map(top).collect(),
        }
    }
}
