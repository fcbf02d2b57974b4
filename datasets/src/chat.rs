//! Chat messages from JSON in OpenAI's or ShareGPT's form, as data sets hold them. Errors are sentences without a
//! place; the caller knows the file and line. What cannot be kept is refused, never dropped.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::records::{Message, Role, ToolCall};

/// A conversation that the assistant is to answer, and its answer if the last turn is the assistant's.
pub(crate) fn conversation(value: &Value) -> Result<(Vec<Message>, Option<Message>), String> {
    let value = from_text(value);
    let Value::Array(items) = value.as_ref() else {
        return Err(format!(
            "it is {}, and must be an array of messages",
            kind(&value)
        ));
    };
    let numbered = items.iter().zip(1..);
    let mut messages: Vec<Message> = numbered
        .map(|(item, number)| message(item).map_err(|why| format!("message {number}: {why}")))
        .collect::<Result<_, _>>()?;
    let answer = messages.pop_if(|last| last.role == Role::Assistant);
    let why = match (messages.last().map(|last| last.role), &answer) {
        (Some(Role::User | Role::Tool), _) => return Ok((messages, answer)),
        (None, None) => "there are no messages",
        (None, Some(_)) => {
            "the conversation has an assistant turn alone: put before it what it answers"
        }
        (Some(Role::System), None) => {
            "the conversation ends in a system message: add what the user asks"
        }
        (Some(Role::System), Some(_)) => {
            "the assistant's turn follows a system message: put between them what the user asks"
        }
        (Some(Role::Assistant), _) => {
            "the conversation ends in two assistant turns: join them, or remove one"
        }
    };
    Err(why.into())
}

/// What a text holds if it is a JSON array, as in tables that have text alone; else the value itself.
pub(crate) fn from_text(value: &Value) -> Cow<'_, Value> {
    match value.as_str().map(serde_json::from_str) {
        Some(Ok(array @ Value::Array(_))) => Cow::Owned(array),
        _ => Cow::Borrowed(value),
    }
}

/// The tools on offer: an array, or an array as text; `None` for null and empty text.
pub(crate) fn tools(value: &Value) -> Result<Option<String>, String> {
    match value {
        Value::Null => Ok(None),
        Value::Array(_) => Ok(Some(value.to_string())),
        Value::String(text) if text.trim().is_empty() => Ok(None),
        Value::String(text) if matches!(serde_json::from_str(text), Ok(Value::Array(_))) => {
            Ok(Some(text.clone()))
        }
        other => Err(format!("it is {}, and must be a JSON array", kind(other))),
    }
}

fn message(value: &Value) -> Result<Message, String> {
    let fields = value
        .as_object()
        .ok_or_else(|| format!("it is {}, and must be an object", kind(value)))?;
    if !fields.contains_key("role") && fields.contains_key("from") {
        return sharegpt(fields);
    }
    let role = match fields.get("role") {
        Some(Value::String(name)) => Role::from_name(name).ok_or_else(|| {
            let known: Vec<String> = Role::ALL
                .iter()
                .map(|role| format!("`{}`", role.name()))
                .collect();
            format!("`{name}` is not a role; the roles are {}", known.join(", "))
        })?,
        Some(other) => return Err(format!("`role` is {}, and must be a string", kind(other))),
        None => return Err("it has no `role`".into()),
    };
    if fields
        .get("function_call")
        .is_some_and(|call| !call.is_null())
    {
        return Err("`function_call` is the old form: write it as `tool_calls`".into());
    }
    let message = Message {
        role,
        content: content(fields.get("content"))?,
        reasoning: match optional_text(fields, "reasoning")? {
            Some(reasoning) => Some(reasoning),
            None => optional_text(fields, "reasoning_content")?,
        },
        tool_calls: tool_calls(fields.get("tool_calls"))?,
        tool_call_id: optional_text(fields, "tool_call_id")?,
    };
    check_parts(message)
}

/// `{from, value}`. A `function_call` is the assistant's, with the call as JSON text.
fn sharegpt(fields: &Map<String, Value>) -> Result<Message, String> {
    let from = match fields.get("from") {
        Some(Value::String(from)) => from.as_str(),
        other => {
            let found = other.map_or("absent", kind);
            return Err(format!("`from` is {found}, and must be a string"));
        }
    };
    let text = optional_text(fields, "value")?.unwrap_or_default();
    let role = match from {
        "human" | "user" => Role::User,
        "gpt" | "chatgpt" | "assistant" | "bot" | "model" => Role::Assistant,
        "system" => Role::System,
        "tool" | "function" | "function_response" | "observation" => Role::Tool,
        "function_call" => {
            let call = serde_json::from_str(&text)
                .map_err(|error| format!("`value` is a function call that is not JSON: {error}"))?;
            let calls = match call {
                Value::Array(calls) => Value::Array(calls),
                call => Value::Array(vec![call]),
            };
            let mut message = Message::text(Role::Assistant, "");
            message.tool_calls = tool_calls(Some(&calls))?;
            return check_parts(message);
        }
        _ => {
            return Err(format!(
                "`from` is `{from}`; it may be `human`, `gpt`, `system`, `tool`, `function`, `observation` or `function_call`"
            ));
        }
    };
    check_parts(Message::text(role, text))
}

fn check_parts(message: Message) -> Result<Message, String> {
    let role = message.role;
    if role != Role::Assistant && (!message.tool_calls.is_empty() || message.reasoning.is_some()) {
        return Err(format!(
            "a message of role `{}` has reasoning or tool calls; only `assistant` may",
            role.name()
        ));
    }
    let empty = message.content.trim().is_empty()
        && message.tool_calls.is_empty()
        && message.reasoning.is_none();
    // A tool may well answer nothing.
    match empty && role != Role::Tool {
        true => Err("its content is empty".into()),
        false => Ok(message),
    }
}

/// A string, or OpenAI's array of parts, of which only text can be kept.
fn content(value: Option<&Value>) -> Result<String, String> {
    match value {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => parts.iter().map(text_part).collect(),
        Some(other) => Err(format!(
            "`content` is {}, and must be a string or an array of text parts",
            kind(other)
        )),
    }
}

fn text_part(part: &Value) -> Result<&str, String> {
    match (
        part.get("type").and_then(Value::as_str),
        part.get("text").and_then(Value::as_str),
    ) {
        (Some("text"), Some(text)) => Ok(text),
        (Some(other), _) if other != "text" => Err(format!(
            "`content` has a part of type `{other}`; only text is read"
        )),
        _ => Err("a part of `content` is not of the form {\"type\": \"text\", \"text\": …}".into()),
    }
}

fn optional_text(fields: &Map<String, Value>, name: &str) -> Result<Option<String>, String> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(format!("`{name}` is {}, and must be a string", kind(other))),
    }
}

fn tool_calls(value: Option<&Value>) -> Result<Vec<ToolCall>, String> {
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(calls)) => {
            let numbered = calls.iter().zip(1..);
            numbered
                .map(|(call, number)| {
                    tool_call(call).map_err(|why| format!("tool call {number}: {why}"))
                })
                .collect()
        }
        Some(other) => Err(format!(
            "`tool_calls` is {}, and must be an array",
            kind(other)
        )),
    }
}

/// `{id, type, function: {name, arguments}}`, or name and arguments at the top as some data sets have them.
fn tool_call(call: &Value) -> Result<ToolCall, String> {
    let fields = call
        .as_object()
        .ok_or_else(|| format!("it is {}, and must be an object", kind(call)))?;
    let function = match fields.get("function") {
        Some(function) => function.as_object().ok_or("`function` must be an object")?,
        None => fields,
    };
    let name = optional_text(function, "name")?.ok_or("it has no `name`")?;
    let arguments = match function.get("arguments") {
        Some(Value::String(text)) => match serde_json::from_str::<Value>(text) {
            Ok(_) => text.clone(),
            Err(error) => return Err(format!("`arguments` is text that is not JSON: {error}")),
        },
        Some(arguments @ Value::Object(_)) => arguments.to_string(),
        None | Some(Value::Null) => "{}".into(),
        Some(other) => {
            return Err(format!(
                "`arguments` is {}, and must be an object or its JSON text",
                kind(other)
            ));
        }
    };
    Ok(ToolCall {
        id: optional_text(fields, "id")?,
        name,
        arguments,
    })
}

/// What a value is, for messages.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
