//! Generates the text of the run file.

use potstill_student::Layers;
use serde_json::Value;

use super::{RunFileInputs, quoted};
use crate::schema;

/// Column at which a comment begins if the key leaves enough room.
const COMMENT_AT: usize = 36;

/// Generates the run file with every key of the schema: set as `inputs` say, or commented out.
pub(super) fn run_file(inputs: &RunFileInputs) -> String {
    let schema = schema::run_file();
    let mut text = "# A run file of Potstill. Lines that begin with `#` show keys that are not set, with their defaults;\n# lines that begin with `##` show tables that are not used.\n".to_owned();
    for (table, keys) in schema::properties(&schema) {
        text += &format!("\n# {}\n", schema::description(keys));
        let mut properties = schema::properties(keys);
        // A table with a required key whose value is not known cannot be written.
        let unused = !schema::requires(&schema, table)
            && properties.any(|(key, _)| {
                schema::requires(keys, key) && set_value(inputs, table, key).is_none()
            });
        if unused {
            text += &format!("## [{table}]\n");
            for (key, about) in schema::properties(keys) {
                text += &commented(&format!("## {key} = {}", default(about)), about);
            }
            continue;
        }
        text += &format!("[{table}]\n");
        for (key, about) in schema::properties(keys) {
            let line = match set_value(inputs, table, key) {
                Some((value, None)) => commented(&format!("{key} = {value}"), about),
                Some((value, Some(why))) => with_comment(&format!("{key} = {value}"), &why),
                None => match proposed_value(inputs, table, key) {
                    Some((value, why)) => with_comment(&format!("# {key} = {value}"), &why),
                    None => commented(&format!("# {key} = {}", default(about)), about),
                },
            };
            text += &line;
        }
    }
    text
}

/// Returns the value that the inputs give to a key, and the reason for it where the key's meaning
/// alone does not explain the value.
fn set_value(inputs: &RunFileInputs, table: &str, key: &str) -> Option<(String, Option<String>)> {
    let facts = &inputs.facts;
    let plain = |value: String| Some((value, None));
    match (table, key) {
        ("run", "name") => plain(quoted(&inputs.name)),
        ("run", "seed") => plain("17".to_owned()),
        ("import", "path") => plain(quoted(&inputs.data)),
        ("import", "columns") => Some((
            inputs.detected.columns.clone(),
            Some(format!(
                "The data looks like {}{}.",
                inputs.detected.shape,
                match inputs.detected.has_answers {
                    true => ", with answers; the teacher answers the prompts all the same",
                    false => "",
                }
            )),
        )),
        ("teacher", "path") => plain(quoted(&inputs.teacher)),
        ("teacher", "template") if !facts.has_template => Some((
            quoted("plain"),
            Some("The teacher has no chat template, so messages are concatenated.".to_owned()),
        )),
        ("collect", "samples") => Some((
            "4".to_owned(),
            Some(
                "Number of answers to each prompt. Those of a local teacher cost only time."
                    .to_owned(),
            ),
        )),
        ("collect", "max_new_tokens") => plain((facts.context / 2).clamp(1, 256).to_string()),
        ("collect", "signals") => {
            let top_k = (facts.vocabulary / 4).clamp(1, 64);
            plain(format!("{{ top_k = {top_k} }}"))
        }
        ("student", "layers") if facts.layers > 1 => {
            let why = format!(
                "Both ends of the teacher's {} layers: a student of {}.",
                facts.layers,
                facts.layers.div_ceil(2)
            );
            Some((Layers::half(facts.layers).to_string(), Some(why)))
        }
        ("student", "random") if facts.layers == 1 => Some((
            "{ hidden_size = 64, intermediate_size = 128, layers = 1, heads = 2 }".to_owned(),
            Some("The teacher has only one layer, so none can be pruned.".to_owned()),
        )),
        _ => None,
    }
}

/// Returns a value that the inputs suggest for a key that stays commented out, and what the value does.
fn proposed_value(inputs: &RunFileInputs, table: &str, key: &str) -> Option<(String, String)> {
    let switch = inputs.facts.thinking_switch?;
    if (table, key) != ("teacher", "template_arguments") {
        return None;
    }
    let (value, does) = match switch {
        "reasoning_effort" => ("\"low\"", "makes the teacher's reasoning short"),
        _ => ("false", "lets the teacher answer without reasoning"),
    };
    Some((
        format!("{{ {switch} = {value} }}"),
        format!("Arguments of the teacher's chat template, which reads `{switch}`; this {does}."),
    ))
}

/// Formats the default of a key, or a placeholder that shows the form of its value.
fn default(about: &Value) -> String {
    match about.get("default") {
        Some(default) => schema::toml(default),
        None => match about["type"].as_str() {
            Some("string") => "\"…\"".to_owned(),
            Some("object") => "{ … }".to_owned(),
            Some("array") => "[…]".to_owned(),
            _ => "…".to_owned(),
        },
    }
}

/// Adds the description of a key and its choices to a line.
fn commented(line: &str, about: &Value) -> String {
    let choices = match schema::choices(about.get("items").unwrap_or(about)).next() {
        Some(_) => format!(" One of {}.", schema::range(about).replace('`', "")),
        None => String::new(),
    };
    with_comment(line, &(schema::description(about) + &choices))
}

/// Puts a comment behind a line if both fit into the width, otherwise on a line before it.
fn with_comment(line: &str, comment: &str) -> String {
    let width = line.chars().count();
    match width < COMMENT_AT && COMMENT_AT + comment.chars().count() < 110 {
        true => format!("{line:COMMENT_AT$}# {comment}\n"),
        false => format!("# {comment}\n{line}\n"),
    }
}
