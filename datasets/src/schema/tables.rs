//! The columns of all tables except `signals/`, in the order in which they are stored.

use std::iter::from_fn;
use std::ops::Range;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{DataType, Field, Schema, SchemaRef};

use super::columns::{ColumnReader, list, lists, required, structs};
use super::value::{ColumnValue, field_of, record, struct_lists};
use super::{Record, batch, check_columns};
use crate::error::Error;
use crate::records::{
    Completion, Dropped, Failed, Message, NearDuplicate, OwnText, Prompt, SampledToken, Selected,
    SequenceValues, TaskSample, ToolCall, TopToken, Usage, Verdict,
};

struct_lists!(ToolCall, [id, name, arguments]);
struct_lists!(
    Message,
    [role, content, reasoning, tool_calls, tool_call_id]
);
struct_lists!(TopToken, [id, bytes, logprob]);
struct_lists!(SampledToken, [bytes, id, logprob, top]);

record!(
    Prompt,
    "prompts",
    [id, messages, tools, reference, group, source],
    any_content
);
record!(
    Completion,
    "completions",
    [
        prompt_id = prompt_id,
        sample_index = sample_index,
        reasoning = reasoning,
        answer = answer,
        tool_calls = tool_calls,
        finish_reason = finish_reason,
        prompt_tokens = usage.prompt_tokens,
        completion_tokens = usage.completion_tokens,
        tokens = tokens,
        provenance = provenance
    ],
    Completion {
        prompt_id,
        sample_index,
        reasoning,
        answer,
        tool_calls,
        finish_reason,
        usage: Usage {
            prompt_tokens,
            completion_tokens,
        },
        tokens,
        provenance,
    },
    any_content
);
record!(
    Verdict,
    "verdicts",
    [prompt_id, sample_index, grader, correct, extracted],
    any_content
);
record!(
    Selected,
    "train",
    [shard, row, prompt_id, sample_index],
    any_content
);
record!(
    Dropped,
    "dropped",
    [prompt_id, sample_index, reason],
    any_content
);
record!(
    NearDuplicate,
    "near_duplicates",
    [split, prompt_id, train_prompt_id, similarity],
    any_content
);
record!(
    Failed,
    "failures",
    [prompt_id, sample_index, reason, message],
    any_content
);
record!(
    SequenceValues,
    "samples",
    [
        prompt_id,
        sample_index,
        tokens,
        kl_nats,
        nll_nats,
        agree,
        teacher_nll_nats,
        teacher_entropy_nats,
        confidence,
        expected
    ],
    check_lengths
);
record!(
    TaskSample,
    "task samples",
    [
        prompt_id, reasoning, answer, extracted, correct, finished, tokens
    ],
    any_content
);

record!(
    OwnText,
    "own text",
    [prompt_id, sample_index, tokens, reverse_kl_nats],
    any_content
);

/// Accepts every row.
fn any_content<R>(_row: usize, _values: &R) -> Result<(), Error> {
    Ok(())
}

/// Checks that each list has an entry for each loss position.
fn check_lengths(row: usize, values: &SequenceValues) -> Result<(), Error> {
    let lengths = [
        ("confidence", values.confidence.len()),
        ("expected", values.expected.len()),
    ];
    let wrong = lengths
        .into_iter()
        .find(|(_, length)| *length != values.tokens as usize);
    match wrong {
        None => Ok(()),
        Some((column, length)) => Err(Error::Cell {
            row,
            column: column.into(),
            why: format!(
                "the list has {length} entries, and {} are expected",
                values.tokens
            ),
        }),
    }
}
