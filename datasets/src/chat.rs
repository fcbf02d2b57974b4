//! Conversion of JSON in OpenAI's or ShareGPT's form to chat messages. Content that cannot be kept is refused, never
//! dropped. Errors are sentences without a position, because only the caller knows the file and the line; they may end
//! with a line that begins with `hint: `.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::records::{Message, Role, ToolCall};

/// Returns the messages of a prompt, and the answer if the last turn is the assistant's.
pub(crate) fn conversation(value: &Value) -> Result<(Vec<Message>, Option<Message>), String> {
    let value = parse_array_text(value);
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
            "the conversation consists of an assistant turn\nhint: put the user's message before it"
        }
        (Some(Role::System), None) => {
            "the conversation ends with a system message\nhint: add the user's message"
        }
        (Some(Role::System), Some(_)) => {
            "the assistant's turn follows a system message\nhint: put the user's message between them"
        }
        (Some(Role::Assistant), _) => {
            "the conversation ends with two assistant turns\nhint: join them, or remove one"
        }
    };
    Err(why.into())
}

/// Parses a text that is a JSON array, as it occurs in tables without lists; returns any other value unchanged.
pub(crate) fn parse_array_text(value: &Value) -> Cow<'_, Value> {
    match value.as_str().map(serde_json::from_str) {
        Some(Ok(array @ Value::Array(_))) => Cow::Owned(array),
        _ => Cow::Borrowed(value),
    }
}

/// Returns the tools, which may be an array or the text of one, as text; `None` for null and empty text.
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

/// Converts a message in either form.
pub(crate) fn message(value: &Value) -> Result<Message, String> {
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
        return Err("`function_call` is an obsolete form\nhint: write it as `tool_calls`".into());
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

/// Converts a message of the form `{from, value}`. A `function_call` is the assistant's and has the call as JSON text.
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
    // The result of a tool may be empty.
    match empty && role != Role::Tool {
        true => Err("its content is empty".into()),
        false => Ok(message),
    }
}

/// Returns the text of a string or of OpenAI's array of parts, which must all be text.
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

/// Converts a tool call of the form `{id, type, function: {name, arguments}}`, or with name and arguments at the top as
/// in some data sets.
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

/// Names the type of a value for a message.
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
