//! Arguments of a chat template.

use std::borrow::Cow;
use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Variables that a rendering sets itself, or that `apply_chat_template` of transformers takes for its own parameters.
const RESERVED: [&str; 27] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
    "raise_exception",
    "strftime_now",
    "namespace",
    "range",
    "dict",
    "conversation",
    "chat_template",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
];

/// Arguments of a chat template: variables that the template reads beside the conversation, such as
/// `{ enable_thinking = false }`. In transformers they are keyword arguments of `apply_chat_template`.
///
/// A value is text, a number, a boolean, a list or a table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, Value>", into = "BTreeMap<String, Value>")]
pub struct TemplateArguments(BTreeMap<String, Value>);

impl TemplateArguments {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The arguments with their names, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// The arguments as a JSON object.
    pub fn to_json(&self) -> Value {
        Value::Object(self.0.clone().into_iter().collect())
    }
}

impl TryFrom<BTreeMap<String, Value>> for TemplateArguments {
    type Error = String;

    fn try_from(arguments: BTreeMap<String, Value>) -> Result<Self, String> {
        for (name, value) in &arguments {
            if RESERVED.contains(&name.as_str()) || name.starts_with("potstill_") {
                return Err(format!(
                    "`{name}` is set for each conversation, or has a meaning of its own in templates, so it cannot be an argument\nhint: leave `{name}` out; arguments are variables such as `enable_thinking`"
                ));
            }
            let is_name = |(at, c): (usize, char)| {
                c == '_'
                    || if at == 0 {
                        c.is_alphabetic()
                    } else {
                        c.is_alphanumeric()
                    }
            };
            if name.is_empty() || !name.chars().enumerate().all(is_name) {
                return Err(format!(
                    "{name:?} is not the name of a variable, so no template can read it\nhint: use letters, digits and `_`"
                ));
            }
            if !is_plain(value) {
                return Err(format!(
                    "`{name}` is or contains a date, `nan` or `inf`, which JSON has no form for\nhint: write a date as text, such as \"26 Jul 2024\""
                ));
            }
        }
        Ok(Self(arguments))
    }
}

impl From<TemplateArguments> for BTreeMap<String, Value> {
    fn from(arguments: TemplateArguments) -> Self {
        arguments.0
    }
}

/// Whether a value of a TOML file kept its meaning when it was read as JSON. A number that is not finite becomes null,
/// and a date becomes an object with a private key.
fn is_plain(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Array(items) => items.iter().all(is_plain),
        Value::Object(fields) => fields
            .iter()
            .all(|(key, value)| !key.starts_with("$__toml_private") && is_plain(value)),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
    }
}

impl JsonSchema for TemplateArguments {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "TemplateArguments".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "object" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<TemplateArguments, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn names_that_a_rendering_sets_and_values_without_a_json_form_are_refused() {
        let arguments =
            read(r#"{ "enable_thinking": false, "a": [1, 2.5, { "b": "x" }] }"#).unwrap();
        assert_eq!(arguments.to_json()["a"][2]["b"], "x");
        for (json, part) in [
            (
                r#"{ "messages": [] }"#,
                "`messages` is set for each conversation",
            ),
            (r#"{ "bos_token": "" }"#, "leave `bos_token` out"),
            (
                r#"{ "potstill_generation_open": "" }"#,
                "cannot be an argument",
            ),
            (r#"{ "a b": 1 }"#, "is not the name of a variable"),
            (r#"{ "": 1 }"#, "is not the name of a variable"),
            (r#"{ "a": [null] }"#, "`a` is or contains a date"),
            (
                r#"{ "a": { "$__toml_private_datetime": "2026-01-01" } }"#,
                "write a date as text",
            ),
        ] {
            let why = read(json).unwrap_err();
            assert!(why.contains(part), "{json}: {why}");
        }
    }
}
