//! Answers in a cell: one, or a list of several.

use serde_json::{Map, Value};

use crate::chat;
use crate::records::{Message, Role};

/// Keys of an object that holds an answer.
const KEYS: [&str; 3] = ["text", "content", "answer"];

/// Returns the answers in a cell: a text or a number, a message of the assistant, an object with one of the keys `text`,
/// `content` and `answer`, or a list of these. Empty text and null are no answers.
///
/// # Errors
/// What is not understood, as a clause that follows the column's name.
pub(super) fn answers(value: &Value) -> Result<Vec<Message>, String> {
    let mut found = Vec::new();
    match value {
        Value::Null => {}
        Value::Array(items) => {
            for (item, number) in items.iter().zip(1..) {
                let added = match item {
                    Value::Array(turns) => turns.iter().try_for_each(|turn| add(turn, &mut found)),
                    item => add(item, &mut found),
                };
                added.map_err(|why| format!(": answer {number} of the list {why}"))?;
            }
        }
        Value::Object(fields) if has_list(fields) => {
            return answers(text_of(fields).unwrap_or(&Value::Null));
        }
        one => add(one, &mut found).map_err(|why| format!(" {why}"))?,
    }
    Ok(found)
}

/// Whether a list is one of answers; a cell without a list is one if it is a text or a number.
pub(super) fn is_list(value: &Value) -> bool {
    let is_list = match value {
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => text_of(fields).is_some(),
        _ => false,
    };
    is_list && answers(value).is_ok()
}

fn add(value: &Value, found: &mut Vec<Message>) -> Result<(), String> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Object(fields) if fields.contains_key("role") || fields.contains_key("from") => {
            let message = chat::message(value).map_err(|why| format!("is a message: {why}"))?;
            if message.role != Role::Assistant {
                return Err(format!(
                    "is a message of role `{}`, and must be the assistant's\nhint: a whole conversation goes into `messages`",
                    message.role.name()
                ));
            }
            found.push(message);
            return Ok(());
        }
        Value::Object(fields) => {
            let keys: Vec<&str> = KEYS
                .into_iter()
                .filter(|key| fields.contains_key(*key))
                .collect();
            match (keys.as_slice(), text_of(fields)) {
                (_, Some(Value::String(text))) => text.clone(),
                (_, Some(Value::Number(number))) => number.to_string(),
                (_, Some(Value::Null)) => return Ok(()),
                (_, Some(other)) => {
                    return Err(format!(
                        "has {} in `{}`, and must have a string or a number",
                        chat::kind(other),
                        keys.concat()
                    ));
                }
                ([], None) => {
                    return Err("is an object without `text`, `content` or `answer`".to_owned());
                }
                (keys, None) => {
                    return Err(format!(
                        "is an object with several answers: `{}`",
                        keys.join("`, `")
                    ));
                }
            }
        }
        other => {
            return Err(format!(
                "is {}, and must be a string or a number, or a list of answers",
                chat::kind(other)
            ));
        }
    };
    if !text.trim().is_empty() {
        found.push(Message::text(Role::Assistant, text));
    }
    Ok(())
}

/// Returns the value of the only key that may hold an answer.
fn text_of(fields: &Map<String, Value>) -> Option<&Value> {
    let mut values = KEYS.iter().filter_map(|key| fields.get(*key));
    values.next().filter(|_| values.next().is_none())
}

/// Whether an object holds a list of answers, as `{"text": ["a", "b"], "answer_start": [3, 7]}`.
fn has_list(fields: &Map<String, Value>) -> bool {
    !fields.contains_key("role") && matches!(text_of(fields), Some(Value::Array(_)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_cell_has_one_answer_or_several() {
        let texts = |value: Value| -> Vec<String> {
            let found = answers(&value).unwrap().into_iter();
            found.map(|message| message.content).collect()
        };
        assert_eq!(texts(json!("a")), ["a"]);
        assert_eq!(texts(json!(2.5)), ["2.5"]);
        assert_eq!(texts(json!(["a", "b", 3, " "])), ["a", "b", "3"]);
        assert_eq!(
            texts(json!([{"text": "a", "score": 1}, {"answer": 2}, {"content": "c"}])),
            ["a", "2", "c"]
        );
        assert_eq!(
            texts(json!([{"role": "assistant", "content": "a"}, {"from": "gpt", "value": "b"}])),
            ["a", "b"]
        );
        assert_eq!(
            texts(
                json!([[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]])
            ),
            ["a", "b"]
        );
        assert_eq!(
            texts(json!({"text": ["a", "b"], "answer_start": [1, 2]})),
            ["a", "b"]
        );
        assert_eq!(texts(json!(null)), Vec::<String>::new());
        assert_eq!(texts(json!([])), Vec::<String>::new());
        // The text of a list is an answer of its own.
        assert_eq!(texts(json!("[1, 2]")), ["[1, 2]"]);
    }

    #[test]
    fn what_is_not_an_answer_is_said() {
        let no = |value: Value| answers(&value).unwrap_err();
        assert_eq!(
            no(json!(true)),
            " is a boolean, and must be a string or a number, or a list of answers"
        );
        assert_eq!(
            no(json!(["a", null])),
            ": answer 2 of the list is null, and must be a string or a number, or a list of answers"
        );
        assert_eq!(
            no(json!([{"body": "a"}])),
            ": answer 1 of the list is an object without `text`, `content` or `answer`"
        );
        assert_eq!(
            no(json!([{"text": "a", "answer": "b"}])),
            ": answer 1 of the list is an object with several answers: `text`, `answer`"
        );
        assert_eq!(
            no(json!([{"text": [1]}])),
            ": answer 1 of the list has an array in `text`, and must have a string or a number"
        );
        assert!(
            no(json!([{"role": "user", "content": "a"}]))
                .starts_with(": answer 1 of the list is a message of role `user`")
        );
    }
}
