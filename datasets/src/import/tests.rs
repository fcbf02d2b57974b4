use std::path::Path;

use super::*;
use crate::records::Role;

fn import_lines(text: impl AsRef<[u8]>, columns: &Columns) -> Result<Imported, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.jsonl");
    std::fs::write(&path, text).unwrap();
    import(&ImportSettings::new(&path, columns.clone()))
}

#[track_caller]
fn refused(text: impl AsRef<[u8]>, columns: &Columns, expected: &str) {
    let message = import_lines(text, columns).unwrap_err().to_string();
    let (_, message) = message.split_once("p.jsonl").unwrap();
    assert_eq!(message, expected);
}

fn text() -> Columns {
    Columns::text("text")
}

fn chat() -> Columns {
    Columns::messages("messages")
}

#[test]
fn text_lines_become_user_messages_and_duplicates_are_counted() {
    let lines = "\u{feff}{\"text\": \"a\"}\r\n\r\n{\"text\":\"b\",\"more\":1}\n{\"text\": \"a\"}\n{\"text\": \" a\"}";
    let imported = import_lines(lines, &text()).unwrap();
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
fn answers_are_kept_unchanged() {
    let columns = Columns {
        question: Some("q".into()),
        answer: Some("a".into()),
        ..Columns::default()
    };
    let imported = import_lines(
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
    assert_eq!(imported.answers, []);
    let columns = Columns {
        question: Some("q".into()),
        ..Columns::default()
    };
    assert_eq!(
        import_lines("{\"q\":\"1+1\",\"a\":null}", &columns)
            .unwrap()
            .prompts[0]
            .reference,
        None
    );
}

#[test]
fn a_given_answer_is_reference_and_completion() {
    let columns = Columns {
        question: Some("q".into()),
        answer: Some("a".into()),
        ..Columns::default()
    };
    let lines = r#"{"q":"1+1","a":"x\n#### 2"} {"q":"2+2","a":4.50} {"q":"1+1","a":"2"} {"q":"3+3","a":" "}"#
        .replace("} ", "}\n");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.jsonl");
    std::fs::write(&path, lines).unwrap();
    let imported = import(&ImportSettings {
        answers: AnswerSource::Given,
        ..ImportSettings::new(&path, columns)
    })
    .unwrap();
    let references = imported.prompts.iter().map(|p| p.reference.as_deref());
    assert_eq!(
        references.collect::<Vec<_>>(),
        [Some("x\n#### 2"), Some("4.5"), Some(" ")]
    );
    let answers = imported.answers.iter();
    let answers: Vec<_> = answers
        .map(|a| (a.prompt_id.as_str(), a.sample_index, a.answer.as_str()))
        .collect();
    let id = |prompt: usize| imported.prompts[prompt].id.as_str();
    assert_eq!(
        answers,
        [(id(0), 0, "x\n#### 2"), (id(0), 1, "2"), (id(1), 0, "4.5")]
    );
    assert_eq!(imported.duplicates, 0);
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
    let imported = import(&ImportSettings {
        system: Some("Be brief.".into()),
        limit: Some(2),
        ..ImportSettings::new(&path, text())
    })
    .unwrap();
    assert_eq!((imported.prompts.len(), imported.duplicates), (2, 1));
    assert_eq!(
        imported.prompts[1].messages[0],
        Message::text(Role::System, "Be brief.")
    );
    // Further prompts do not change the ids of the earlier ones.
    let one = import(&ImportSettings {
        system: Some("Be brief.".into()),
        limit: Some(1),
        ..ImportSettings::new(&path, text())
    })
    .unwrap();
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
    let imported = import(&ImportSettings {
        system: Some("not used".into()),
        ..ImportSettings::new(&path, chat())
    })
    .unwrap();
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
fn lines_that_are_not_json_objects_are_refused_with_line_and_column() {
    refused(
        "{\"text\": \"a\"}\n{\"text\": \"b\n",
        &text(),
        ":2:11 is not valid JSON: EOF while parsing a string\nhint: each line must be one whole JSON object",
    );
    refused(
        "{\n\"text\": \"b\"}",
        &text(),
        ":1:1 is not valid JSON: EOF while parsing an object\nhint: each line must be one whole JSON object",
    );
    refused(
        "[{\"text\": \"a\"}]",
        &text(),
        ":1: the line is an array\nhint: each line must be a JSON object",
    );
    refused(
        b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}",
        &text(),
        ":2:11 is not valid UTF-8; it looks like Latin-1 (ISO 8859-1) or Windows-1252\nhint: convert the file to UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW`",
    );
}

#[test]
fn wrong_columns_are_refused_with_those_that_are_there() {
    refused(
        "{\"question\": \"a\", \"answer\": \"b\"}",
        &text(),
        ":1 has no column `text`; it has `question`, `answer`\nhint: name one of these in `columns` of [import]",
    );
    refused(
        "{}",
        &text(),
        ":1 has no column `text`; it has no columns at all\nhint: name one of these in `columns` of [import]",
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
    let columns = Columns {
        question: Some("text".into()),
        answer: Some("a".into()),
        ..Columns::default()
    };
    refused(
        "{\"text\": \"q\", \"a\": null}",
        &columns,
        ":1: column `a` is null, and must be a string or a number",
    );
}

#[test]
fn an_empty_set_is_refused() {
    refused(
        "",
        &text(),
        " has no prompts: the file has no lines\nhint: put prompts into it, or name another file in `path` of [import]",
    );
    refused(
        "\n\r\n",
        &text(),
        " has no prompts: the file has no lines\nhint: put prompts into it, or name another file in `path` of [import]",
    );
    let message = import(&ImportSettings {
        limit: Some(0),
        ..ImportSettings::new(Path::new("p"), text())
    })
    .unwrap_err()
    .to_string();
    assert_eq!(
        message,
        "the limit of prompts is 0\nhint: import at least one prompt"
    );
    let message = import(&ImportSettings::new(Path::new("/no/such.jsonl"), text()))
        .unwrap_err()
        .to_string();
    assert_eq!(message, "cannot open /no/such.jsonl");
}

#[test]
fn conversations_that_cannot_be_prompts_are_refused() {
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
            r#"[{"role": "assistant", "content": "b"}]"#,
            "the conversation consists of an assistant turn\nhint: put the user's message before it",
        ),
        (
            r#"[{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]"#,
            "the assistant's turn follows a system message\nhint: put the user's message between them",
        ),
        (
            r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}]"#,
            "the conversation ends with two assistant turns\nhint: join them, or remove one",
        ),
        (
            r#"[{"from": "narrator", "value": "a"}]"#,
            "message 1: `from` is `narrator`; it may be `human`, `gpt`, `system`, `tool`, `function`, `observation` or `function_call`",
        ),
        (
            r#"[{"from": "human", "value": 3}]"#,
            "message 1: `value` is a number, and must be a string",
        ),
        (
            r#"[{"from": "function_call", "value": "f()"}]"#,
            "message 1: `value` is a function call that is not JSON: expected ident at line 1 column 2",
        ),
        (
            r#""no""#,
            "it is a string, and must be an array of messages",
        ),
        (
            r#"[{"role": "system", "content": "a"}]"#,
            "the conversation ends with a system message\nhint: add the user's message",
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
            "message 1: `function_call` is an obsolete form\nhint: write it as `tool_calls`",
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
