//! The run file as a JSON Schema, and `docs/config.md`, which is generated from the schema.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

use crate::run_file::RunFile;

const CONFIG_INTRO: &str = "# The run file

One TOML table a stage. A relative path is below the run file's folder, and `${NAME}` in a path is the value of an environment variable. Keys without a default may be left out; where the default says *required*, the key must be there. `potstill init` writes a run file, `potstill check FILE` looks at one.

An editor that knows JSON Schema completes keys and marks mistakes: `potstill schema > potstill.schema.json`, then `#:schema ./potstill.schema.json` as the run file's first line (Taplo, or Even Better TOML in VS Code).

This page and `potstill.schema.json` are made from the doc comments in `src/run_file.rs`: `POTSTILL_UPDATE=1 cargo test --release --workspace --test cli -- docs` writes them again.
";

/// The JSON Schema (draft 7, which editors know best) of the run file.
pub fn run_file() -> Value {
    let mut schema = schema_of::<RunFile>();
    schema["title"] = "Potstill run file".into();
    if let Some(tables) = schema["properties"].as_object_mut() {
        for table in tables.values_mut().filter_map(Value::as_object_mut) {
            // The defaults of its keys say the same.
            table.remove("default");
        }
    }
    schema
}

/// [`run_file`] as text, as `potstill schema` prints it.
pub fn run_file_text() -> String {
    format!("{:#}\n", run_file())
}

/// `docs/config.md`.
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

/// A type's schema without references, without `null` (TOML has none) and without formats that only
/// Rust knows.
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

/// What may be absent, as if it had to be there: the schema of `T` for that of `Option<T>`.
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

/// One row a key; the keys of a table within the table follow it.
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

/// The properties of a schema, by name, in the order of their declaration.
pub(crate) fn properties(schema: &Value) -> impl Iterator<Item = (&str, &Value)> {
    let properties: Option<&Map<String, Value>> = schema["properties"].as_object();
    properties
        .into_iter()
        .flatten()
        .map(|(name, property)| (name.as_str(), property))
}

/// Whether a property has to be there.
pub(crate) fn requires(schema: &Value, name: &str) -> bool {
    let required = schema["required"].as_array();
    required.is_some_and(|names| names.iter().any(|n| n == name))
}

/// The table of the run file that has such a key.
pub(crate) fn table_of(key: &str) -> Option<String> {
    let schema = run_file();
    let has_it = |table: &Value| table["properties"].get(key).is_some();
    let mut tables = properties(&schema);
    tables
        .find(|(_, table)| has_it(table))
        .map(|(name, _)| name.to_owned())
}

/// A doc comment in one line.
pub(crate) fn description(schema: &Value) -> String {
    let text = schema["description"].as_str().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A JSON value as the run file writes it.
pub(crate) fn toml(value: &Value) -> String {
    match value {
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

/// What it may be, in words.
pub(crate) fn kind(schema: &Value) -> String {
    if schema.get("oneOf").is_some() || schema.get("enum").is_some() {
        return "choice".to_owned();
    }
    match schema["type"].as_str() {
        Some("string") => "text".to_owned(),
        Some("integer") => "whole number".to_owned(),
        Some("array") => format!("list: {}", kind(&schema["items"])),
        Some("object") if schema.get("properties").is_some() => "table".to_owned(),
        Some("object") => format!("{} by name", kind(&schema["additionalProperties"])),
        Some("boolean") => "true or false".to_owned(),
        Some(other) => other.to_owned(),
        None => String::new(),
    }
}

/// The bounds or the choices.
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

/// The choices of a key, where it is one.
pub(crate) fn choices(schema: &Value) -> impl Iterator<Item = &Value> {
    schema["oneOf"].as_array().into_iter().flatten()
}

/// The doc comment, and those of the choices.
pub(crate) fn meaning(schema: &Value) -> String {
    let items = schema.get("items").unwrap_or(schema);
    let mut text = description(schema);
    for choice in choices(items) {
        text += &format!(" `{}`: {}", choice["const"], lower(&description(choice)));
    }
    text.replace('|', "\\|")
}

fn lower(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map(|first| first.to_lowercase().chain(chars).collect())
        .unwrap_or_default()
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
        for word in [": null", "$ref", "anyOf", "\"format\"", ".0,\n"] {
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
            "`\"sft\"`, `\"shuffled\"`"
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
