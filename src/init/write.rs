//! The text of the run file.

use serde_json::Value;

use super::{Answers, quoted};
use crate::schema;

/// Column at which comments begin, where the key leaves room.
const COMMENT_AT: usize = 36;

/// The run file, with every key of the schema: as the answers set it, else commented out.
pub(super) fn run_file(answers: &Answers) -> String {
    let schema = schema::run_file();
    let mut text = "# A run file of Potstill. Lines that begin with `#` show defaults, or what may be set; those with\n# `##` are tables that are off.\n".to_owned();
    for (table, keys) in schema::properties(&schema) {
        text += &format!("\n# {}\n", schema::description(keys));
        let mut properties = schema::properties(keys);
        // A table that must say something, and about which nothing is known, is left out.
        let off = !schema::requires(&schema, table)
            && properties
                .any(|(key, _)| schema::requires(keys, key) && set(answers, table, key).is_none());
        if off {
            text += &format!("## [{table}]\n");
            for (key, about) in schema::properties(keys) {
                text += &commented(&format!("## {key} = {}", default(about)), about);
            }
            continue;
        }
        text += &format!("[{table}]\n");
        for (key, about) in schema::properties(keys) {
            let line = match set(answers, table, key) {
                Some((value, None)) => commented(&format!("{key} = {value}"), about),
                Some((value, Some(why))) => with_comment(&format!("{key} = {value}"), &why),
                None => commented(&format!("# {key} = {}", default(about)), about),
            };
            text += &line;
        }
    }
    text
}

/// What is known of a key: its value, and why it is that where there is more to say than its meaning.
fn set(answers: &Answers, table: &str, key: &str) -> Option<(String, Option<String>)> {
    let facts = &answers.facts;
    let plain = |value: String| Some((value, None));
    match (table, key) {
        ("run", "name") => plain(quoted(&answers.name)),
        ("run", "seed") => plain("17".to_owned()),
        ("import", "path") => plain(quoted(&answers.data)),
        ("import", "columns") => Some((
            answers.detected.columns.clone(),
            Some(format!(
                "The data looks like {}{}.",
                answers.detected.name,
                match answers.detected.has_answers {
                    true => ", with answers: the teacher is asked all the same",
                    false => "",
                }
            )),
        )),
        ("teacher", "path") => plain(quoted(&answers.teacher)),
        ("teacher", "template") if !facts.has_template => Some((
            quoted("plain"),
            Some("The teacher has no chat template: messages one after the other.".to_owned()),
        )),
        ("collect", "max_new_tokens") => plain((facts.context / 2).clamp(1, 256).to_string()),
        ("collect", "signals") => {
            let top_k = (facts.vocabulary / 4).clamp(1, 64);
            plain(format!("{{ top_k = {top_k} }}"))
        }
        ("student", "every") if facts.layers > 1 => Some((
            "2".to_owned(),
            Some(format!(
                "Every second of the teacher's {} layers: a student of {}.",
                facts.layers,
                facts.layers.div_ceil(2)
            )),
        )),
        ("student", "random") if facts.layers == 1 => Some((
            "{ hidden_size = 64, intermediate_size = 128, layers = 1, heads = 2 }".to_owned(),
            Some("The teacher has one layer, so there is none to leave out.".to_owned()),
        )),
        _ => None,
    }
}

/// A key's default, or the form of its value.
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

/// With the key's meaning behind it, and its choices.
fn commented(line: &str, about: &Value) -> String {
    let choices = match schema::choices(about.get("items").unwrap_or(about)).next() {
        Some(_) => format!(" Of {}.", schema::range(about).replace('`', "")),
        None => String::new(),
    };
    with_comment(line, &(schema::description(about) + &choices))
}

/// The comment stands behind the line where both fit, else before it.
fn with_comment(line: &str, comment: &str) -> String {
    let width = line.chars().count();
    match width < COMMENT_AT && COMMENT_AT + comment.chars().count() < 110 {
        true => format!("{line:COMMENT_AT$}# {comment}\n"),
        false => format!("# {comment}\n{line}\n"),
    }
}
