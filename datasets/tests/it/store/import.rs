//! The files that people have, in every format: the same rows give the same prompts and answers.

mod parquet;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use ::parquet::basic::Compression;
use ::parquet::file::properties::WriterProperties;
use arrow_array::types::Int32Type;
use arrow_array::{
    Array, ArrayRef, BinaryArray, BooleanArray, Decimal128Array, DictionaryArray, Float32Array,
    Float64Array, Int64Array, LargeStringArray, ListArray, RecordBatch, StringArray,
    StringViewArray, StructArray, TimestampSecondArray,
};
use arrow_buffer::OffsetBuffer;
use arrow_schema::Field;
use flate2::write::GzEncoder;
use potstill_datasets::{
    Columns, Completion, Detected, Error, FinishReason, ImportSettings, Imported, Message, Prompt,
    Role, detect_columns, import,
};
use tempfile::TempDir;

struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// Writes a file as pyarrow and most other programs do: with snappy, and with Arrow's own schema in the footer.
    fn parquet(&self, columns: Vec<(&str, ArrayRef)>) -> PathBuf {
        let path = self.0.path().join("p.parquet");
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .build();
        let file = File::create(&path).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        path
    }
}

fn read(path: &Path, columns: &Columns) -> Imported {
    import(&ImportSettings::new(path, columns.clone())).unwrap()
}

/// Checks the part of the message that follows the path.
#[track_caller]
fn refused(path: &Path, columns: &Columns, expected: &str) {
    let message = import(&ImportSettings::new(path, columns.clone()))
        .unwrap_err()
        .to_string();
    assert_eq!(message.strip_prefix(path.to_str().unwrap()), Some(expected));
}

fn text(name: &str) -> Columns {
    Columns::text(name)
}

fn grouped(group: &str) -> Columns {
    Columns {
        group: Some(group.into()),
        ..text("text")
    }
}

fn messages() -> Columns {
    Columns::messages("messages")
}

fn question_answer() -> Columns {
    Columns {
        question: Some("question".into()),
        answer: Some("answer".into()),
        ..Columns::default()
    }
}

fn alpaca() -> Columns {
    Columns {
        instruction: Some("instruction".into()),
        input: Some("input".into()),
        output: Some("output".into()),
        ..Columns::default()
    }
}

fn contents(imported: &Imported) -> Vec<(&str, &str)> {
    let prompts = imported.prompts.iter();
    prompts
        .map(|p| {
            (
                p.messages.last().unwrap().content.as_str(),
                p.source.as_str(),
            )
        })
        .collect()
}

fn references(imported: &Imported) -> Vec<&str> {
    imported
        .prompts
        .iter()
        .map(|p| p.reference.as_deref().unwrap())
        .collect()
}

fn strings(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

/// A list column: row i has the next `lengths[i]` elements.
fn list(lengths: &[usize], elements: ArrayRef) -> ArrayRef {
    let field = Arc::new(Field::new("item", elements.data_type().clone(), true));
    Arc::new(ListArray::new(
        field,
        OffsetBuffer::from_lengths(lengths.iter().copied()),
        elements,
        None,
    ))
}

fn record(fields: Vec<(&str, ArrayRef)>) -> ArrayRef {
    let field = |(name, array): (&str, ArrayRef)| {
        (
            Arc::new(Field::new(name, array.data_type().clone(), true)),
            array,
        )
    };
    let fields: Vec<_> = fields.into_iter().map(field).collect();
    Arc::new(StructArray::from(fields))
}

// ---- answers ----

#[test]
fn a_last_turn_of_the_assistant_is_an_answer() {
    let folder = Folder::new();
    let path = folder.write("p.jsonl", r#"{"messages": [{"role": "user", "content": "b"}]}
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "1"}]}
{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "2", "reasoning": "hm"}]}
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "3"}]}
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "1"}]}
{"messages": [{"role": "user", "content": "a"}]}
{"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "2"}]}
{"messages": [{"role": "user", "content": "w"}, {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"x": 1}}}]}], "tools": [{"type": "function"}]}
"#);
    let imported = import(&ImportSettings {
        system: Some("S".into()),
        ..ImportSettings::new(&path, messages())
    })
    .unwrap();
    assert_eq!(
        contents(&imported),
        [("b", "p.jsonl:1"), ("a", "p.jsonl:2"), ("w", "p.jsonl:8")]
    );
    assert_eq!(imported.duplicates, 2);
    assert!(
        imported
            .prompts
            .iter()
            .all(|p| p.messages.len() == 2 && p.messages[0].role == Role::System)
    );
    assert_eq!(
        imported.prompts[2].tools.as_deref(),
        Some(r#"[{"type":"function"}]"#)
    );

    let place = |answer: &Completion| {
        imported
            .prompts
            .iter()
            .position(|p| p.id == answer.prompt_id)
            .unwrap()
    };
    let answers: Vec<_> = imported
        .answers
        .iter()
        .map(|a| {
            (
                place(a),
                a.sample_index,
                a.answer.as_str(),
                a.reasoning.as_deref(),
                a.finish_reason,
            )
        })
        .collect();
    assert_eq!(
        answers,
        [
            (0, 0, "2", Some("hm"), FinishReason::Stop),
            (0, 1, "2", None, FinishReason::Stop),
            (1, 0, "1", None, FinishReason::Stop),
            (1, 1, "3", None, FinishReason::Stop),
            (2, 0, "", None, FinishReason::ToolCalls),
        ]
    );
    let called = &imported.answers[4];
    assert_eq!(called.tool_calls[0].arguments, r#"{"x":1}"#);
    assert!(
        called.tokens.is_empty() && called.usage.completion_tokens == 0 && called.provenance == 0
    );
}

#[test]
fn sharegpt_is_the_same_conversation() {
    let folder = Folder::new();
    let path = folder.write("p.json", r#"[
{"messages": [{"from": "system", "value": "S"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "1"},
              {"from": "user", "value": "w"}, {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
              {"from": "observation", "value": "sun"}, {"from": "gpt", "value": "2"}],
 "tools": "[{\"name\": \"f\"}]"},
{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "1"},
              {"role": "user", "content": "w"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
              {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "2"}],
 "tools": "[{\"name\": \"f\"}]"},
{"messages": [{"from": "human", "value": "b"}], "tools": ""}]"#);
    let imported = import(&ImportSettings::new(&path, messages())).unwrap();
    assert_eq!(
        (
            imported.prompts.len(),
            imported.answers.len(),
            imported.duplicates
        ),
        (2, 1, 1)
    );
    assert_eq!(
        contents(&imported),
        [("sun", "p.json:2"), ("b", "p.json:10")]
    );
    assert_eq!(
        imported.prompts[0].messages[4].tool_calls[0].arguments,
        r#"{"x":1}"#
    );
    assert_eq!(imported.answers[0].answer, "2");
    assert_eq!(imported.prompts[1].tools, None);
}

#[test]
fn an_instruction_takes_its_input_and_gives_its_output() {
    let folder = Folder::new();
    let path = folder.write(
        "p.json",
        r#"[
{"instruction": "Sum up.", "input": "A long text.", "output": "Short."},
{"instruction": "Greet.", "input": "", "output": "Hi."},
{"instruction": "Greet.", "output": "Hello."},
{"instruction": "Sing.", "input": null, "output": ""}]"#,
    );
    let imported = import(&ImportSettings::new(&path, alpaca())).unwrap();
    let asked: Vec<_> = contents(&imported)
        .into_iter()
        .map(|(text, _)| text)
        .collect();
    assert_eq!(asked, ["Sum up.\n\nA long text.", "Greet.", "Sing."]);
    let answers: Vec<_> = imported
        .answers
        .iter()
        .map(|a| (a.sample_index, a.answer.as_str()))
        .collect();
    assert_eq!(answers, [(0, "Short."), (0, "Hi."), (1, "Hello.")]);
    assert_eq!(
        detect_columns(&path).unwrap(),
        Detected {
            columns: alpaca(),
            name: "alpaca",
            has_answers: true,
            ignored: Vec::new(),
        }
    );
    let path = folder.write(
        "p.jsonl",
        r#"{"instruction": "Greet.", "input": 3, "output": "a"}"#,
    );
    refused(
        &path,
        &alpaca(),
        ":1: column `input` is a number, and must be a string",
    );
    let path = folder.write("p.jsonl", r#"{"instruction": "Greet."}"#);
    refused(
        &path,
        &alpaca(),
        ":1 has no column `output`; it has `instruction`\nhint: name one of these in `columns` of [import]",
    );
}

// ---- CSV ----

#[test]
fn csv_has_quotes_line_ends_and_a_byte_order_mark() {
    let folder = Folder::new();
    let path = folder.write(
        "p.csv",
        "\u{feff}question,answer,\"n,m\"\r\n\"What, \"\"2\"\" + 2?\",4,x\r\n\r\n\"two\nlines\",\"a\n#### 5.0\",\nlast,6,\n",
    );
    let imported = read(&path, &question_answer());
    assert_eq!(
        contents(&imported),
        [
            ("What, \"2\" + 2?", "p.csv:2"),
            ("two\nlines", "p.csv:4"),
            ("last", "p.csv:7")
        ]
    );
    assert_eq!(references(&imported), ["4", "a\n#### 5.0", "6"]);
    assert_eq!(detect_columns(&path).unwrap().columns, question_answer());

    let path = folder.write("p.tsv", "text\tn\na, \"b\"\t1\n");
    assert_eq!(
        contents(&read(&path, &text("text"))),
        [("a, \"b\"", "p.tsv:2")]
    );
    let row = r#""[{""role"": ""user"", ""content"": ""a""}, {""role"": ""assistant"", ""content"": ""b""}]","#;
    let path = folder.write("p.csv", format!("messages,tools\n{row}\n"));
    let imported = read(&path, &messages());
    assert_eq!(
        (contents(&imported), imported.answers[0].answer.as_str()),
        (vec![("a", "p.csv:2")], "b")
    );
}

#[test]
fn csv_that_is_not_right_is_refused_with_its_line() {
    let folder = Folder::new();
    let csv = |text: &[u8]| folder.write("p.csv", text);
    refused(
        &csv(b"text,n\n\"a\nb\",1\nc, d, e\n"),
        &text("text"),
        ":4: the row has 3 cells, and the header has 2\nhint: put cells that contain a delimiter, a quote or a line end in quotes",
    );
    refused(
        &csv(b"a,b\n1,2\n"),
        &text("text"),
        ":2 has no column `text`; it has `a`, `b`\nhint: name one of these in `columns` of [import]",
    );
    refused(
        &csv(b"text,n\na,1\n ,2\n"),
        &text("text"),
        ":3: column `text` is empty",
    );
    refused(
        &csv(b"text,n\na,1\n\xff,2\n"),
        &text("text"),
        ":3: cell 1 is not valid UTF-8; it looks like Latin-1 (ISO 8859-1) or Windows-1252\nhint: convert the file to UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW`",
    );
    refused(
        &csv(b"text,text\na,1\n"),
        &text("text"),
        ":1: the header has the column `text` twice\nhint: rename one of them",
    );
    for none in ["", "text\n"] {
        refused(
            &csv(none.as_bytes()),
            &text("text"),
            " has no prompts: the file has no rows\nhint: put prompts into it, or name another file in `path` of [import]",
        );
    }
    refused(
        &csv(b"messages\n[{'role': 'user'}]\n"),
        &messages(),
        ":2: column `messages`: it is a string, and must be an array of messages",
    );
}

// ---- any ----

#[test]
fn a_row_says_which_part_it_belongs_to() {
    let folder = Folder::new();
    let lines = "{\"text\":\"a\",\"kind\":\"sum\"}\n{\"text\":\"b\",\"kind\":null}\n";
    let (a, b) = ("a", "b");
    let paths = [
        folder.write("p.jsonl", lines),
        folder.write("p.csv", "text,kind\na,sum\nb,\n"),
        folder.parquet(vec![
            ("text", Arc::new(StringArray::from(vec![a, b]))),
            ("other", Arc::new(StringArray::from(vec![a, b]))),
            ("kind", Arc::new(StringArray::from(vec![Some("sum"), None]))),
        ]),
    ];
    for path in paths {
        let imported = import(&ImportSettings::new(&path, grouped("kind"))).unwrap();
        let groups: Vec<_> = imported
            .prompts
            .iter()
            .map(|p| p.group.as_deref())
            .collect();
        assert_eq!(groups, [Some("sum"), None], "{}", path.display());
        let absent = import(&ImportSettings::new(&path, grouped("sort"))).unwrap_err();
        assert!(absent.to_string().contains("`sort`"), "{absent}");
    }
}

#[test]
fn the_limit_stops_reading_in_every_format() {
    let folder = Folder::new();
    let texts: Vec<String> = (0..100).map(|i| format!("text {i}")).collect();
    let object = |text: &String| format!("{{\"text\": \"{text}\"}}");
    let objects: Vec<String> = texts.iter().map(object).collect();
    let columns = text("text");
    let paths = [
        folder.write("p.jsonl", objects.join("\n") + "\nbroken"),
        folder.write("p.json", format!("[{}, broken", objects.join(","))),
        folder.write("p.csv", format!("text,n\n{},\nbroken", texts.join(",\n"))),
        folder.parquet(vec![("text", Arc::new(StringArray::from(texts.clone())))]),
    ];
    for path in paths {
        let imported = import(&ImportSettings {
            limit: Some(70),
            ..ImportSettings::new(&path, columns.clone())
        })
        .unwrap();
        let found: Vec<&str> = contents(&imported)
            .into_iter()
            .map(|(text, _)| text)
            .collect();
        assert_eq!(found, texts[..70], "{}", path.display());
    }
}

#[test]
fn a_packed_file_is_read_like_the_plain_one() {
    let folder = Folder::new();
    let pack = |name: &str, parts: &[&str]| {
        let mut bytes = Vec::new();
        for part in parts {
            let mut packer = GzEncoder::new(&mut bytes, flate2::Compression::default());
            packer.write_all(part.as_bytes()).unwrap();
            packer.finish().unwrap();
        }
        (folder.write(name, &bytes), bytes)
    };
    // Two gzip members, as they result from appending.
    let (lines, bytes) = pack(
        "p.jsonl.gz",
        &["{\"text\": \"a\"}\n", "{\"text\": \"b\"}\n"],
    );
    let (array, _) = pack("p.json.GZ", &["[{\"text\": \"a\"}, {\"text\": \"b\"}]"]);
    let (table, _) = pack("p.csv.gz", &["text\na\nb\n"]);
    for path in [&lines, &array, &table] {
        let imported = read(path, &text("text"));
        let texts: Vec<&str> = contents(&imported)
            .into_iter()
            .map(|(text, _)| text)
            .collect();
        assert_eq!(texts, ["a", "b"], "{}", path.display());
    }
    assert_eq!(
        read(&lines, &text("text")).prompts[1].source,
        "p.jsonl.gz:2"
    );
    fs::write(&lines, &bytes[..bytes.len() - 12]).unwrap();
    let error = import(&ImportSettings::new(&lines, text("text"))).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn a_file_of_another_kind_is_refused() {
    let folder = Folder::new();
    for name in ["p.txt", "p", "p.gz", "p.parquet.gz"] {
        refused(
            &folder.write(name, "{\"text\": \"a\"}"),
            &text("text"),
            " has a format that Potstill does not read\nhint: the name must end in .jsonl, .ndjson, .json, .csv or .tsv, each with or without .gz or .zst, or in .parquet: rename the file, or convert it",
        );
    }
    let path = folder.write("P.JSONL", "{\"text\": \"a\"}");
    assert_eq!(
        read(&path, &text("text")).prompts[0].messages,
        [Message::text(Role::User, "a")]
    );
    let missing = folder.0.path().join("no.parquet");
    assert!(matches!(
        import(&ImportSettings::new(&missing, text("text"))),
        Err(Error::Io { .. })
    ));
}
