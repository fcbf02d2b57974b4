//! `prompts/`: conversations that end where the teacher is to answer.

use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray};
use arrow_schema::{DataType, Fields, Schema, SchemaRef};

use super::columns::{
    Cells, Lists, list, lists, optional, optional_strings, required, strings, structs, text,
};
use super::{Record, batch, check_columns};
use crate::error::Error;
use crate::records::{Message, Prompt, Role, ToolCall};

impl Record for Prompt {
    const TABLE: &'static str = "prompts";
    const GROUP_ROWS: usize = 1024;

    fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            required("id", DataType::Utf8),
            required("messages", list(DataType::Struct(message_fields()))),
            optional("tools", DataType::Utf8),
            optional("reference", DataType::Utf8),
            optional("group", DataType::Utf8),
            required("source", DataType::Utf8),
        ]))
    }

    fn to_batch(rows: &[Self]) -> Result<RecordBatch, Error> {
        let messages: Vec<&Message> = rows.iter().flat_map(|row| &row.messages).collect();
        batch::<Self>(vec![
            strings("id", rows.iter().map(|row| row.id.as_str()))?,
            lists(
                "messages",
                rows.iter().map(|row| row.messages.len()),
                message_column(&messages)?,
            )?,
            optional_strings("tools", rows.iter().map(|row| row.tools.as_deref()))?,
            optional_strings("reference", rows.iter().map(|row| row.reference.as_deref()))?,
            optional_strings("group", rows.iter().map(|row| row.group.as_deref()))?,
            strings("source", rows.iter().map(|row| row.source.as_str()))?,
        ])
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>, Error> {
        check_columns::<Self>(&batch.schema())?;
        let column = |name| Cells::of(Self::TABLE, batch, name);
        let (id, source) = (column("id")?.strings()?, column("source")?.strings()?);
        let (tools, reference) = (column("tools")?.strings()?, column("reference")?.strings()?);
        let group = column("group")?.strings()?;
        let lists = column("messages")?.lists()?;
        let messages = Messages::of(&lists.child)?;
        let rows = (0..batch.num_rows()).map(|row| {
            let message = |index| messages.get(index).map_err(|why| lists.child.bad(row, why));
            Ok(Prompt {
                id: id.value(row).to_owned(),
                messages: lists.range(row).map(message).collect::<Result<_, _>>()?,
                tools: text(tools, row),
                reference: text(reference, row),
                group: text(group, row),
                source: source.value(row).to_owned(),
            })
        });
        rows.collect()
    }
}

fn message_fields() -> Fields {
    Fields::from(vec![
        required("role", DataType::Utf8),
        required("content", DataType::Utf8),
        optional("reasoning", DataType::Utf8),
        required("tool_calls", list(DataType::Struct(tool_call_fields()))),
        optional("tool_call_id", DataType::Utf8),
    ])
}

fn message_column(messages: &[&Message]) -> Result<ArrayRef, Error> {
    let calls: Vec<&ToolCall> = messages
        .iter()
        .flat_map(|message| &message.tool_calls)
        .collect();
    let children = vec![
        strings(
            "messages.role",
            messages.iter().map(|message| message.role.name()),
        )?,
        strings(
            "messages.content",
            messages.iter().map(|message| message.content.as_str()),
        )?,
        optional_strings(
            "messages.reasoning",
            messages.iter().map(|message| message.reasoning.as_deref()),
        )?,
        tool_call_lists(
            "messages.tool_calls",
            messages.iter().map(|message| message.tool_calls.len()),
            &calls,
        )?,
        optional_strings(
            "messages.tool_call_id",
            messages
                .iter()
                .map(|message| message.tool_call_id.as_deref()),
        )?,
    ];
    structs("messages", message_fields(), children)
}

struct Messages<'a> {
    role: &'a StringArray,
    content: &'a StringArray,
    reasoning: &'a StringArray,
    tool_calls: ToolCalls<'a>,
    tool_call_id: &'a StringArray,
}

impl<'a> Messages<'a> {
    fn of(cells: &Cells<'a>) -> Result<Messages<'a>, Error> {
        Ok(Messages {
            role: cells.field("role")?.strings()?,
            content: cells.field("content")?.strings()?,
            reasoning: cells.field("reasoning")?.strings()?,
            tool_calls: ToolCalls::of(&cells.field("tool_calls")?)?,
            tool_call_id: cells.field("tool_call_id")?.strings()?,
        })
    }

    fn get(&self, index: usize) -> Result<Message, String> {
        let role = self.role.value(index);
        Ok(Message {
            role: Role::from_name(role).ok_or_else(|| format!("`{role}` is not a role"))?,
            content: self.content.value(index).to_owned(),
            reasoning: text(self.reasoning, index),
            tool_calls: self.tool_calls.get(index),
            tool_call_id: text(self.tool_call_id, index),
        })
    }
}

pub(super) fn tool_call_fields() -> Fields {
    Fields::from(vec![
        optional("id", DataType::Utf8),
        required("name", DataType::Utf8),
        required("arguments", DataType::Utf8),
    ])
}

/// A list column of tool calls, of `lengths` each.
pub(super) fn tool_call_lists(
    column: &str,
    lengths: impl Iterator<Item = usize>,
    calls: &[&ToolCall],
) -> Result<ArrayRef, Error> {
    let children = vec![
        optional_strings(column, calls.iter().map(|call| call.id.as_deref()))?,
        strings(column, calls.iter().map(|call| call.name.as_str()))?,
        strings(column, calls.iter().map(|call| call.arguments.as_str()))?,
    ];
    lists(
        column,
        lengths,
        structs(column, tool_call_fields(), children)?,
    )
}

pub(super) struct ToolCalls<'a> {
    lists: Lists<'a>,
    id: &'a StringArray,
    name: &'a StringArray,
    arguments: &'a StringArray,
}

impl<'a> ToolCalls<'a> {
    pub(super) fn of(cells: &Cells<'a>) -> Result<ToolCalls<'a>, Error> {
        let lists = cells.lists()?;
        let id = lists.child.field("id")?.strings()?;
        let name = lists.child.field("name")?.strings()?;
        let arguments = lists.child.field("arguments")?.strings()?;
        Ok(ToolCalls {
            lists,
            id,
            name,
            arguments,
        })
    }

    pub(super) fn get(&self, row: usize) -> Vec<ToolCall> {
        let call = |index| ToolCall {
            id: text(self.id, index),
            name: self.name.value(index).to_owned(),
            arguments: self.arguments.value(index).to_owned(),
        };
        self.lists.range(row).map(call).collect()
    }
}
