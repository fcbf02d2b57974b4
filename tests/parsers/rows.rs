//! Targets: files of data that are imported.

use std::path::Path;

use potstill_datasets::{
    Columns, ImportSettings, Imported, Message, Prompt, Role, detect_columns, import,
};
use serde_json::{Value, json};

use crate::scratch::{check_error, check_error_names, file};

/// Input: a file of JSON rows, read as `.jsonl` and as `.json`; compressed with gzip if it begins as gzip does.
pub fn json_rows(data: &[u8]) {
    let is_compressed = data.starts_with(&[0x1f, 0x8b]);
    for name in ["rows.jsonl", "rows.json"] {
        match is_compressed {
            true => import_as(&format!("{name}.gz"), data),
            false => import_as(name, data),
        }
    }
}

/// Input: a file of delimited rows, read as `.csv` and as `.tsv`.
pub fn csv_rows(data: &[u8]) {
    import_as("rows.csv", data);
    import_as("rows.tsv", data);
}

/// Input: a Parquet file of any program.
pub fn parquet_rows(data: &[u8]) {
    import_as("rows.parquet", data);
}

fn import_as(name: &str, data: &[u8]) {
    let path = file(name, data);
    let detected = match detect_columns(&path) {
        Ok(detected) => detected.columns,
        Err(error) => {
            check_error_names(&error, name);
            Columns::text("text")
        }
    };
    let settings = ImportSettings::new(&path, detected);
    let imported = match import(&settings) {
        Ok(imported) => imported,
        Err(error) => return check_error_names(&error, name),
    };
    assert_eq!(imported, import(&settings).unwrap());
    check_imported(&imported);
    assert_eq!(written_and_read(&imported, &path), ids(&imported.prompts));
}

/// Checks that each prompt has the id of its content, and each answer a prompt.
fn check_imported(imported: &Imported) {
    for prompt in &imported.prompts {
        let same = Prompt::new(
            prompt.messages.clone(),
            prompt.tools.clone(),
            None,
            String::new(),
        );
        assert_eq!(same.id, prompt.id);
        assert!(!prompt.messages.is_empty());
    }
    let ids = ids(&imported.prompts);
    for answer in &imported.answers {
        assert!(ids.contains(&answer.prompt_id.as_str()));
    }
}

fn ids(prompts: &[Prompt]) -> Vec<&str> {
    prompts.iter().map(|prompt| prompt.id.as_str()).collect()
}

/// Writes the prompts as messages beside the file, imports these, and returns the ids of the prompts whose text an import
/// takes as it is.
fn written_and_read<'a>(imported: &'a Imported, path: &Path) -> Vec<&'a str> {
    let text: String = imported
        .prompts
        .iter()
        .map(|prompt| row(prompt) + "\n")
        .collect();
    let path = path.with_file_name("again.jsonl");
    std::fs::write(&path, text).unwrap();
    let read = match import(&ImportSettings::new(&path, Columns::messages("messages"))) {
        Ok(read) => read,
        Err(error) => {
            check_error(&error);
            panic!("imported prompts cannot be imported again: {error}")
        }
    };
    let known = |id: &&str| read.prompts.iter().any(|prompt| prompt.id == *id);
    ids(&imported.prompts).into_iter().filter(known).collect()
}

fn row(prompt: &Prompt) -> String {
    let messages: Vec<Value> = prompt.messages.iter().map(message).collect();
    let tools: Option<Value> =
        (prompt.tools.as_deref()).and_then(|tools| serde_json::from_str(tools).ok());
    json!({ "messages": messages, "tools": tools }).to_string()
}

fn message(message: &Message) -> Value {
    let role = match message.role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
    };
    let mut json = json!({ "role": role, "content": message.content });
    if let Some(reasoning) = &message.reasoning {
        json["reasoning_content"] = reasoning.as_str().into();
    }
    if let Some(id) = &message.tool_call_id {
        json["tool_call_id"] = id.as_str().into();
    }
    let calls = message.tool_calls.iter().map(|call| {
        json!({ "id": call.id, "type": "function",
                "function": { "name": call.name, "arguments": call.arguments } })
    });
    if !message.tool_calls.is_empty() {
        json["tool_calls"] = calls.collect();
    }
    json
}
