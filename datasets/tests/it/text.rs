//! Tokenizers, chat templates and masks against what transformers makes of the same files.

mod align;
mod chats;
mod encode;
mod hostile_templates;
mod mask;
mod reference;
mod small;
mod template;
mod tokenizer;

use potstill_datasets::{Message, ToolCall};
use serde_json::Value;

/// A message in OpenAI's form.
fn message(json: &Value) -> Message {
    let text = |key: &str| json[key].as_str().map(str::to_owned);
    Message {
        role: serde_json::from_value(json["role"].clone()).unwrap(),
        content: text("content").unwrap_or_default(),
        reasoning: text("reasoning_content"),
        tool_calls: json["tool_calls"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|call| ToolCall {
                id: call["id"].as_str().map(str::to_owned),
                name: call["function"]["name"].as_str().unwrap().to_owned(),
                arguments: match &call["function"]["arguments"] {
                    Value::String(text) => text.clone(),
                    arguments => arguments.to_string(),
                },
            })
            .collect(),
        tool_call_id: text("tool_call_id"),
    }
}

fn messages(json: &Value) -> Vec<Message> {
    json.as_array().unwrap().iter().map(message).collect()
}
