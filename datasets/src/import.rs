//! Prompts from JSONL: one object a line, in columns that the run file names.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::chat;
use crate::error::Error;
use crate::records::{Message, Prompt, Role};

/// Which columns hold a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Columns {
    /// A column of text, asked as the user's message.
    Text(String),
    /// A question and, where named, its right answer, which becomes the prompt's reference as it stands.
    QuestionAnswer {
        /// The column of the question: a string.
        question: String,
        /// The column of the answer: a string or a number.
        answer: Option<String>,
    },
    /// A column of chat messages in OpenAI's form, ending where the assistant is to answer. A column `tools` beside
    /// it, if there is one, holds the tools on offer.
    Messages(String),
}

/// What [`import_jsonl`] gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// The prompts in the order of the file, each id once.
    pub prompts: Vec<Prompt>,
    /// How many lines repeated the messages and tools of an earlier one; the earlier line's reference stays.
    pub duplicates: usize,
}

/// Reads prompts from a JSONL file, which may begin with a byte order mark and have blank lines and CRLF.
///
/// `system` is put before conversations that have no system message of their own. Reading stops once there are `limit`
/// prompts, duplicates not counted.
///
/// # Errors
/// [`Error::Io`]; for a line: [`Error::NotUtf8`], [`Error::BadJson`], [`Error::MissingColumn`], [`Error::BadPrompt`];
/// [`Error::NoPrompts`] where nothing is left.
pub fn import_jsonl(
    path: &Path,
    columns: &Columns,
    system: Option<&str>,
    limit: Option<usize>,
) -> Result<Imported, Error> {
    if limit == Some(0) {
        return Err(Error::NoPrompts {
            path: path.to_path_buf(),
            why: "the limit is 0",
        });
    }
    let file_name = path
        .file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy();
    let mut reader = BufReader::new(File::open(path).map_err(Error::io("open", path))?);
    let mut imported = Imported {
        prompts: Vec::new(),
        duplicates: 0,
    };
    let mut seen = HashSet::new();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        if reader
            .read_until(b'\n', &mut bytes)
            .map_err(Error::io("read", path))?
            == 0
        {
            break;
        }
        let at = Line { path, line };
        let text = at.text(&bytes)?;
        if text.trim().is_empty() {
            continue;
        }
        let fields = at.object(text)?;
        let prompt = at.prompt(&fields, columns, system, format!("{file_name}:{line}"))?;
        if seen.insert(prompt.id.clone()) {
            imported.prompts.push(prompt);
        } else {
            imported.duplicates += 1;
        }
        if limit == Some(imported.prompts.len()) {
            break;
        }
    }
    match imported.prompts.is_empty() {
        true => Err(Error::NoPrompts {
            path: path.to_path_buf(),
            why: "the file has no lines",
        }),
        false => Ok(imported),
    }
}

/// A line's place, for errors.
struct Line<'a> {
    path: &'a Path,
    /// From 1.
    line: usize,
}

impl Line<'_> {
    fn path(&self) -> PathBuf {
        self.path.to_path_buf()
    }

    fn bad(&self, why: String) -> Error {
        Error::BadPrompt {
            path: self.path(),
            line: self.line,
            why,
        }
    }

    fn text<'b>(&self, bytes: &'b [u8]) -> Result<&'b str, Error> {
        let bytes = if self.line == 1 {
            bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
        } else {
            bytes
        };
        std::str::from_utf8(bytes).map_err(|error| Error::NotUtf8 {
            path: self.path(),
            line: self.line,
            column: error.valid_up_to() + 1,
        })
    }

    fn object(&self, text: &str) -> Result<Map<String, Value>, Error> {
        match serde_json::from_str(text.trim_end()) {
            Ok(Value::Object(fields)) => Ok(fields),
            Ok(other) => Err(self.bad(format!(
                "the line is {}; each must be a JSON object",
                chat::kind(&other)
            ))),
            Err(error) => {
                // The place in the message is that within the line.
                let message = error.to_string();
                let why = message
                    .split(" at line ")
                    .next()
                    .unwrap_or_default()
                    .to_owned();
                Err(Error::BadJson {
                    path: self.path(),
                    line: self.line,
                    column: error.column(),
                    why,
                })
            }
        }
    }

    fn column<'b>(&self, fields: &'b Map<String, Value>, column: &str) -> Result<&'b Value, Error> {
        fields.get(column).ok_or_else(|| {
            let names: Vec<String> = fields.keys().map(|name| format!("`{name}`")).collect();
            let present = if names.is_empty() {
                "no columns at all".into()
            } else {
                names.join(", ")
            };
            Error::MissingColumn {
                path: self.path(),
                line: self.line,
                column: column.into(),
                present,
            }
        })
    }

    fn prompt(
        &self,
        fields: &Map<String, Value>,
        columns: &Columns,
        system: Option<&str>,
        source: String,
    ) -> Result<Prompt, Error> {
        let (mut messages, tools, reference) = match columns {
            Columns::Text(text) => (vec![self.question(fields, text)?], None, None),
            Columns::QuestionAnswer { question, answer } => {
                let reference = answer
                    .as_ref()
                    .map(|answer| self.reference(fields, answer))
                    .transpose()?;
                (vec![self.question(fields, question)?], None, reference)
            }
            Columns::Messages(column) => {
                let value = self.column(fields, column)?;
                let messages = chat::messages(value)
                    .map_err(|why| self.bad(format!("column `{column}`: {why}")))?;
                let tools = fields.get("tools").map(chat::tools).transpose();
                (
                    messages,
                    tools
                        .map_err(|why| self.bad(format!("column `tools`: {why}")))?
                        .flatten(),
                    None,
                )
            }
        };
        let own = messages
            .first()
            .is_some_and(|message| message.role == Role::System);
        if let (Some(system), false) = (system, own) {
            messages.insert(0, Message::text(Role::System, system));
        }
        Ok(Prompt::new(messages, tools, reference, source))
    }

    fn question(&self, fields: &Map<String, Value>, column: &str) -> Result<Message, Error> {
        match self.column(fields, column)? {
            Value::String(text) if text.trim().is_empty() => {
                Err(self.bad(format!("column `{column}` is empty")))
            }
            Value::String(text) => Ok(Message::text(Role::User, text)),
            other => Err(self.bad(format!(
                "column `{column}` is {}, and must be a string",
                chat::kind(other)
            ))),
        }
    }

    fn reference(&self, fields: &Map<String, Value>, column: &str) -> Result<String, Error> {
        match self.column(fields, column)? {
            Value::String(text) => Ok(text.clone()),
            Value::Number(number) => Ok(number.to_string()),
            other => Err(self.bad(format!(
                "column `{column}` is {}, and must be a string or a number",
                chat::kind(other)
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn import(text: impl AsRef<[u8]>, columns: &Columns) -> Result<Imported, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.jsonl");
        std::fs::write(&path, text).unwrap();
        import_jsonl(&path, columns, None, None)
    }

    #[track_caller]
    fn refused(text: impl AsRef<[u8]>, columns: &Columns, expected: &str) {
        let message = import(text, columns).unwrap_err().to_string();
        let (_, message) = message.split_once("p.jsonl").unwrap();
        assert_eq!(message, expected);
    }

    fn text() -> Columns {
        Columns::Text("text".into())
    }

    fn chat() -> Columns {
        Columns::Messages("messages".into())
    }

    #[test]
    fn text_lines_become_user_messages_and_duplicates_are_counted() {
        let lines = "\u{feff}{\"text\": \"a\"}\r\n\r\n{\"text\":\"b\",\"more\":1}\n{\"text\": \"a\"}\n{\"text\": \" a\"}";
        let imported = import(lines, &text()).unwrap();
        assert_eq!(imported.duplicates, 1);
        let prompts: Vec<_> = imported
            .prompts
            .iter()
            .map(|p| (p.messages[0].content.as_str(), p.source.as_str()))
            .collect();
        assert_eq!(
            prompts,
            [("a", "p.jsonl:1"), ("b", "p.jsonl:3"), (" a", "p.jsonl:5")]
        );
        assert!(
            imported
                .prompts
                .iter()
                .all(|p| p.messages.len() == 1 && p.messages[0].role == Role::User)
        );
    }

    #[test]
    fn answers_are_kept_as_they_stand() {
        let columns = Columns::QuestionAnswer {
            question: "q".into(),
            answer: Some("a".into()),
        };
        let imported = import(
            "{\"q\":\"1+1\",\"a\":\"x\\n#### 2\"}\n{\"q\":\"2+2\",\"a\":4.50}\n",
            &columns,
        )
        .unwrap();
        let references: Vec<_> = imported
            .prompts
            .iter()
            .map(|p| p.reference.as_deref().unwrap())
            .collect();
        assert_eq!(references, ["x\n#### 2", "4.5"]);
        let columns = Columns::QuestionAnswer {
            question: "q".into(),
            answer: None,
        };
        assert_eq!(
            import("{\"q\":\"1+1\",\"a\":null}", &columns)
                .unwrap()
                .prompts[0]
                .reference,
            None
        );
    }

    #[test]
    fn the_limit_counts_prompts_and_the_system_message_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.jsonl");
        std::fs::write(
            &path,
            "{\"text\":\"a\"}\n{\"text\":\"a\"}\n{\"text\":\"b\"}\nnot JSON\n",
        )
        .unwrap();
        let imported = import_jsonl(&path, &text(), Some("Be brief."), Some(2)).unwrap();
        assert_eq!((imported.prompts.len(), imported.duplicates), (2, 1));
        assert_eq!(
            imported.prompts[1].messages[0],
            Message::text(Role::System, "Be brief.")
        );
        // More prompts leave the ids of the earlier ones alone.
        let one = import_jsonl(&path, &text(), Some("Be brief."), Some(1)).unwrap();
        assert_eq!(one.prompts[0], imported.prompts[0]);
    }

    #[test]
    fn chat_messages_come_in_openais_form() {
        let line = r#"{"messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n"},
            {"role": "assistant", "content": null, "reasoning_content": "hm",
             "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}},
                            {"name": "g", "arguments": {"y": [2]}}]},
            {"role": "tool", "tool_call_id": "c1", "content": ""}],
            "tools": [{"type": "function"}]}"#
            .replace('\n', " ");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.jsonl");
        std::fs::write(&path, line).unwrap();
        let imported = import_jsonl(&path, &chat(), Some("not used"), None).unwrap();
        let prompt = &imported.prompts[0];
        assert_eq!(prompt.tools.as_deref(), Some(r#"[{"type":"function"}]"#));
        let [system, user, assistant, tool] = prompt.messages.as_slice() else {
            panic!("{:?}", prompt.messages);
        };
        assert_eq!(
            (system.content.as_str(), user.content.as_str()),
            ("S", "ab")
        );
        assert_eq!(
            (assistant.content.as_str(), assistant.reasoning.as_deref()),
            ("", Some("hm"))
        );
        let calls: Vec<_> = assistant
            .tool_calls
            .iter()
            .map(|c| (c.id.as_deref(), c.name.as_str(), c.arguments.as_str()))
            .collect();
        assert_eq!(
            calls,
            [(Some("c1"), "f", "{\"x\": 1}"), (None, "g", "{\"y\":[2]}")]
        );
        assert_eq!(
            (tool.role, tool.tool_call_id.as_deref()),
            (Role::Tool, Some("c1"))
        );
    }

    #[test]
    fn lines_that_are_no_json_objects_are_refused_with_their_place() {
        refused(
            "{\"text\": \"a\"}\n{\"text\": \"b\n",
            &text(),
            ":2:11 is not valid JSON: EOF while parsing a string; each line must be one whole JSON object",
        );
        refused(
            "{\n\"text\": \"b\"}",
            &text(),
            ":1:1 is not valid JSON: EOF while parsing an object; each line must be one whole JSON object",
        );
        refused(
            "[{\"text\": \"a\"}]",
            &text(),
            ":1: the line is an array; each must be a JSON object",
        );
        refused(
            b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}",
            &text(),
            ":2:11 is not valid UTF-8: convert the file to UTF-8",
        );
    }

    #[test]
    fn wrong_columns_are_refused_with_those_that_are_there() {
        refused(
            "{\"question\": \"a\", \"answer\": \"b\"}",
            &text(),
            ":1 has no column `text`; it has `question`, `answer`. Name one of these in `columns`",
        );
        refused(
            "{}",
            &text(),
            ":1 has no column `text`; it has no columns at all. Name one of these in `columns`",
        );
        refused(
            "{\"text\": 3}",
            &text(),
            ":1: column `text` is a number, and must be a string",
        );
        refused(
            "{\"text\": \"a\"}\n{\"text\": \" \"}",
            &text(),
            ":2: column `text` is empty",
        );
        let columns = Columns::QuestionAnswer {
            question: "text".into(),
            answer: Some("a".into()),
        };
        refused(
            "{\"text\": \"q\", \"a\": null}",
            &columns,
            ":1: column `a` is null, and must be a string or a number",
        );
    }

    #[test]
    fn an_empty_set_is_refused() {
        refused("", &text(), " gives no prompts: the file has no lines");
        refused(
            "\n\r\n",
            &text(),
            " gives no prompts: the file has no lines",
        );
        let message = import_jsonl(Path::new("p"), &text(), None, Some(0))
            .unwrap_err()
            .to_string();
        assert_eq!(message, "p gives no prompts: the limit is 0");
        let message = import_jsonl(Path::new("/no/such.jsonl"), &text(), None, None)
            .unwrap_err()
            .to_string();
        assert_eq!(message, "cannot open /no/such.jsonl");
    }

    #[test]
    fn conversations_that_cannot_be_asked_are_refused() {
        for (messages, expected) in [
            (r#"1"#, "it is a number, and must be an array of messages"),
            (r#"[]"#, "there are no messages"),
            (
                r#"["a"]"#,
                "message 1: it is a string, and must be an object",
            ),
            (r#"[{"content": "a"}]"#, "message 1: it has no `role`"),
            (
                r#"[{"role": "human", "content": "a"}]"#,
                "message 1: `human` is not a role; the roles are `system`, `user`, `assistant`, `tool`",
            ),
            (
                r#"[{"role": "user", "content": ""}]"#,
                "message 1: its content is empty",
            ),
            (r#"[{"role": "user"}]"#, "message 1: its content is empty"),
            (
                r#"[{"role": "user", "content": {"a": 1}}]"#,
                "message 1: `content` is an object, and must be a string or an array of text parts",
            ),
            (
                r#"[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]"#,
                "message 1: `content` has a part of type `image_url`; only text is read",
            ),
            (
                r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]"#,
                "the conversation ends in an assistant turn, so there is nothing to ask: remove that turn",
            ),
            (
                r#"[{"role": "system", "content": "a"}]"#,
                "the conversation ends in a system message: add what the user asks",
            ),
            (
                r#"[{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]"#,
                "message 1: a message of role `user` has reasoning or tool calls; only `assistant` may",
            ),
            (
                r#"[{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]"#,
                "message 1: tool call 1: `arguments` is text that is not JSON: EOF while parsing an object at line 1 column 1",
            ),
            (
                r#"[{"role": "assistant", "content": "", "function_call": {"name": "f"}}]"#,
                "message 1: `function_call` is the old form: write it as `tool_calls`",
            ),
        ] {
            let line = format!("{{\"messages\": {messages}}}");
            refused(line, &chat(), &format!(":1: column `messages`: {expected}"));
        }
        refused(
            r#"{"messages": [{"role": "user", "content": "a"}], "tools": "none"}"#,
            &chat(),
            ":1: column `tools`: it is a string, and must be a JSON array",
        );
    }
}
