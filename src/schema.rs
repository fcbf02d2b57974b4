//! The run file as a JSON Schema, and `docs/config.md`, which is generated from the schema.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

use crate::run_file::RunFile;

const CONFIG_INTRO: &str = "# The run file

A run file is TOML, with one table for each stage. A relative path is relative to the folder of the run file, and `${NAME}` in a path is replaced by the value of an environment variable. A key must be set if its default is *required*, and may be left out otherwise. `potstill init` writes a run file, and `potstill check FILE` checks one.

An editor that knows JSON Schema completes keys and marks mistakes: run `potstill schema > potstill.schema.json`, and write `#:schema ./potstill.schema.json` as the first line of the run file (Taplo, or Even Better TOML in VS Code).

This page and `potstill.schema.json` are generated from the doc comments of the settings, which are in the crates that read them (`src/run_file.rs` lists the types): `POTSTILL_UPDATE=1 cargo test --release --workspace --test cli -- docs` generates them again.
";

/// Returns the JSON Schema of the run file, in draft 7, which most editors support.
pub fn run_file() -> Value {
    let mut schema = schema_of::<RunFile>();
    schema["title"] = "Potstill run file".into();
    if let Some(tables) = schema["properties"].as_object_mut() {
        for table in tables.values_mut().filter_map(Value::as_object_mut) {
            // The defaults of the table's keys say the same.
            table.remove("default");
        }
    }
    schema
}

/// Returns [`run_file`] as the text that `potstill schema` prints.
pub fn run_file_text() -> String {
    format!("{:#}\n", run_file())
}

/// Generates `docs/config.md`.
pub fn config_page() -> String {
    let schema = run_file();
    let mut page = CONFIG_INTRO.to_owned();
    for (name, table) in properties(&schema) {
        let required = if requires(&schema, name) {
            " Required."
        } else {
            ""
        };
        page += &format!("\n## `[{name}]`\n\n{}{required}\n\n", description(table));
        page += "| key | type | range | default | meaning |\n|---|---|---|---|---|\n";
        key_rows(table, "", &mut page);
    }
    page
}

/// Returns the schema of a type without references, without `null` (which TOML lacks) and without formats that are
/// specific to Rust.
pub(crate) fn schema_of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft07().with(|s| s.inline_subschemas = true);
    let mut schema = settings
        .into_generator()
        .into_root_schema_for::<T>()
        .to_value();
    tidy(&mut schema);
    schema
}

fn tidy(schema: &mut Value) {
    if let Some(of) = nullable(schema) {
        *schema = of;
    }
    match schema {
        Value::Object(fields) => {
            if fields.get("default").is_some_and(Value::is_null) {
                fields.remove("default");
            }
            if fields.get("format").is_some_and(|f| f == "uint32") {
                fields.insert("maximum".to_owned(), u32::MAX.into());
            }
            if fields.get("format").is_some_and(Value::is_string) {
                fields.remove("format");
            }
            fields.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        Value::Number(number) => {
            let whole = number
                .as_f64()
                .filter(|n| n.fract() == 0.0 && n.abs() < 1e15);
            if let (Some(whole), true) = (whole, number.is_f64()) {
                *schema = Value::from(whole as i64);
            }
        }
        _ => {}
    }
}

/// Turns the schema of `Option<T>` into that of `T`.
fn nullable(schema: &Value) -> Option<Value> {
    let fields = schema.as_object()?;
    let mut fields = fields.clone();
    if let Some(Value::Array(types)) = fields.get("type") {
        let kept = types.iter().find(|t| *t != "null")?.clone();
        fields.insert("type".to_owned(), kept);
        return Some(Value::Object(fields));
    }
    let Value::Array(choices) = fields.remove("anyOf")? else {
        return None;
    };
    let of = choices.iter().find(|choice| choice["type"] != "null")?;
    let mut of = of.as_object()?.clone();
    of.extend(fields);
    Some(Value::Object(of))
}

/// Adds a row for each key to the page. The keys of an inner table follow the row of that table.
fn key_rows(table: &Value, before: &str, page: &mut String) {
    for (name, key) in properties(table) {
        let default = match key.get("default") {
            Some(default) => format!("`{}`", toml(default)),
            None if requires(table, name) => "*required*".to_owned(),
            None => String::new(),
        };
        *page += &format!(
            "| `{before}{name}` | {} | {} | {default} | {} |\n",
            kind(key),
            range(key),
            meaning(key)
        );
        key_rows(key, &format!("{before}{name}."), page);
    }
}

/// Properties of a schema with their names, in the order of declaration.
pub(crate) fn properties(schema: &Value) -> impl Iterator<Item = (&str, &Value)> {
    let properties: Option<&Map<String, Value>> = schema["properties"].as_object();
    properties
        .into_iter()
        .flatten()
        .map(|(name, property)| (name.as_str(), property))
}

/// Whether a property is required.
pub(crate) fn requires(schema: &Value, name: &str) -> bool {
    let required = schema["required"].as_array();
    required.is_some_and(|names| names.iter().any(|n| n == name))
}

/// Finds the table of the run file that has a key of this name.
pub(crate) fn table_of(key: &str) -> Option<String> {
    let schema = run_file();
    let has_key = |table: &Value| table["properties"].get(key).is_some();
    let mut tables = properties(&schema);
    tables
        .find(|(_, table)| has_key(table))
        .map(|(name, _)| name.to_owned())
}

/// Doc comment of a schema, in one line.
pub(crate) fn description(schema: &Value) -> String {
    let text = schema["description"].as_str().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Writes a JSON value as TOML.
pub(crate) fn toml(value: &Value) -> String {
    match value {
        Value::Object(fields) if fields.is_empty() => "{}".to_owned(),
        Value::Object(fields) => {
            let pairs = fields.iter().map(|(k, v)| format!("{k} = {}", toml(v)));
            format!("{{ {} }}", pairs.collect::<Vec<_>>().join(", "))
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(toml).collect();
            format!("[{}]", items.join(", "))
        }
        other => other.to_string(),
    }
}

/// Type of a key, in words.
pub(crate) fn kind(schema: &Value) -> String {
    if schema.get("oneOf").is_some() || schema.get("enum").is_some() {
        return "choice".to_owned();
    }
    match schema["type"].as_str() {
        Some("string") => "text".to_owned(),
        Some("integer") => "whole number".to_owned(),
        Some("array") => format!("list: {}", kind(&schema["items"])),
        Some("object") if schema.get("properties").is_some() => "table".to_owned(),
        Some("object") => match kind(&schema["additionalProperties"]).as_str() {
            "" => "table".to_owned(),
            of => format!("{of} by name"),
        },
        Some("boolean") => "true or false".to_owned(),
        Some(other) => other.to_owned(),
        // `items` and `properties` without `type` admit both forms.
        None if schema.get("items").is_some() => "list or table".to_owned(),
        None => String::new(),
    }
}

/// Bounds of a number, or the choices.
pub(crate) fn range(schema: &Value) -> String {
    let choices: Vec<String> = choices(schema)
        .map(|c| format!("`{}`", c["const"]))
        .collect();
    if !choices.is_empty() {
        return choices.join(", ");
    }
    if schema["type"] == "array" {
        return range(&schema["items"]);
    }
    let bound = |name: &str, sign: &str| match schema.get(name)?.as_u64() {
        Some(1_000_000_000) => Some(format!("{sign} 1e9")),
        Some(1_000_000_000_000_000) => Some(format!("{sign} 1e15")),
        _ => schema.get(name).map(|b| format!("{sign} {b}")),
    };
    let bounds = [
        bound("minimum", "≥"),
        bound("exclusiveMinimum", ">"),
        bound("maximum", "≤"),
        bound("exclusiveMaximum", "<"),
        schema["pattern"].as_str().map(|p| format!("`{p}`")),
    ];
    bounds.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Choices of a key that has some.
pub(crate) fn choices(schema: &Value) -> impl Iterator<Item = &Value> {
    schema["oneOf"].as_array().into_iter().flatten()
}

/// Doc comment of a key, followed by those of its choices.
pub(crate) fn meaning(schema: &Value) -> String {
    let items = schema.get("items").unwrap_or(schema);
    let mut text = description(schema);
    for choice in choices(items) {
        text += &format!(" `{}`: {}", choice["const"], lower(&description(choice)));
    }
    text.replace('|', "\\|")
}

/// Text that begins in lower case, unless its first word has other capitals, as OpenAI has.
fn lower(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(char::to_lowercase);
    let mut word = chars.clone().take_while(|c| !c.is_whitespace());
    match (first, word.any(char::is_uppercase)) {
        (Some(first), false) => first.chain(chars).collect(),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(table: &str, key: &str) -> Value {
        run_file()["properties"][table]["properties"][key].clone()
    }

    #[test]
    fn toml_has_no_null_and_no_references() {
        let text = run_file_text();
        for word in [": null", "$ref", "anyOf", "\"format\": \"", ".0,\n"] {
            assert!(!text.contains(word), "{word} in {text}");
        }
        assert_eq!(run_file()["additionalProperties"], false);
        assert!(requires(&run_file(), "import") && !requires(&run_file(), "train"));
    }

    #[test]
    fn keys_have_type_range_default_and_meaning() {
        let batch = key("train", "batch");
        assert_eq!(
            (kind(&batch), range(&batch), toml(&batch["default"])),
            (
                "whole number".to_owned(),
                "≥ 1, ≤ 1e9".to_owned(),
                "8".to_owned()
            )
        );
        assert!(!description(&batch).is_empty());
        let loss = key("train", "loss");
        assert_eq!(toml(&loss["default"]), "{ forward_kl = 1 }");
        assert_eq!(
            range(&key("train", "controls")),
            "`\"sft\"`, `\"same_token\"`, `\"smoothing\"`, `\"shuffled\"`"
        );
        let limit = key("import", "limit");
        assert_eq!(
            (kind(&limit), limit.get("default")),
            ("whole number".to_owned(), None)
        );
        let signals = key("collect", "signals");
        assert!(requires(&signals, "top_k") && !requires(&signals, "temperatures"));
    }

    /// A key without a comment would be an empty cell in `docs/config.md`.
    #[test]
    fn everything_is_documented() {
        let page = config_page();
        let undocumented = page.lines().find(|line| line.ends_with("|  |"));
        assert_eq!(undocumented, None);
    }
}
