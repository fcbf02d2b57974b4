//! Parquet files as pyarrow and others write them.

use super::*;

#[test]
fn parquet_text_may_be_of_any_type() {
    let folder = Folder::new();
    let values = ["a", "b", "a", "ü"];
    let dictionary: DictionaryArray<Int32Type> = values.into_iter().collect();
    let numbers = [
        (
            Arc::new(Int64Array::from(vec![1, -2, 1, 4])) as ArrayRef,
            ["1", "-2", "4"],
        ),
        (
            Arc::new(Float64Array::from(vec![145.0, 0.1, 145.0, 2.5])),
            ["145.0", "0.1", "2.5"],
        ),
        (
            Arc::new(Float32Array::from(vec![145.0, 0.1, 145.0, 2.5])),
            ["145.0", "0.1", "2.5"],
        ),
        (
            Arc::new(
                Decimal128Array::from(vec![450, -1, 450, 7])
                    .with_precision_and_scale(9, 2)
                    .unwrap(),
            ),
            ["4.50", "-0.01", "0.07"],
        ),
        (
            Arc::new(LargeStringArray::from(vec!["x", "y", "x", "z"])),
            ["x", "y", "z"],
        ),
    ];
    let questions: [ArrayRef; 4] = [
        strings(&values),
        Arc::new(LargeStringArray::from(values.to_vec())),
        Arc::new(StringViewArray::from(values.to_vec())),
        Arc::new(dictionary),
    ];
    for question in &questions {
        for (answer, expected) in &numbers {
            let path = folder.parquet(vec![
                ("question", question.clone()),
                ("answer", answer.clone()),
            ]);
            let imported = read(&path, &question_answer());
            assert_eq!(imported.duplicates, 1);
            assert_eq!(
                contents(&imported),
                [
                    ("a", "p.parquet:1"),
                    ("b", "p.parquet:2"),
                    ("ü", "p.parquet:4")
                ]
            );
            assert_eq!(references(&imported), expected.as_slice());
            assert_eq!(detect_columns(&path).unwrap().columns, question_answer());
        }
    }
}

/// Messages, tools and calls as a table has them: every field in every row, null where JSON had none.
fn table_of_conversations() -> Vec<(&'static str, ArrayRef)> {
    let none = || Arc::new(StringArray::new_null(3)) as ArrayRef;
    let call = record(vec![
        ("id", strings(&["c1"])),
        (
            "function",
            record(vec![
                ("name", strings(&["f"])),
                (
                    "arguments",
                    record(vec![
                        ("city", strings(&["Rome"])),
                        ("other", Arc::new(StringArray::new_null(1))),
                    ]),
                ),
            ]),
        ),
    ]);
    let conversation = record(vec![
        (
            "content",
            Arc::new(StringArray::from(vec![Some("a"), None, Some("b")])),
        ),
        ("role", strings(&["user", "assistant", "user"])),
        ("name", none()),
        ("tool_calls", list(&[0, 1, 0], call)),
        (
            "timestamp",
            Arc::new(TimestampSecondArray::from(vec![1, 2, 3])),
        ),
    ]);
    let tools = record(vec![
        ("type", strings(&["function"])),
        ("strict", Arc::new(BooleanArray::from(vec![None]))),
    ]);
    vec![
        (
            "image",
            Arc::new(BinaryArray::from(vec![b"\xff\xd8".as_slice(), b"\xff"])),
        ),
        ("messages", list(&[2, 1], conversation)),
        ("tools", list(&[1, 0], tools)),
        ("made", Arc::new(TimestampSecondArray::from(vec![1, 2]))),
    ]
}

#[test]
fn parquet_conversations_are_those_of_jsonl() {
    let folder = Folder::new();
    let path = folder.parquet(table_of_conversations());
    assert_eq!(
        detect_columns(&path).unwrap(),
        Detected {
            columns: messages(),
            name: "messages",
            has_answers: true,
            ignored: Vec::new(),
        }
    );
    let from_table = read(&path, &messages());
    let lines = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {"city": "Rome"}}}]}], "tools": [{"type": "function"}]}
{"messages": [{"role": "user", "content": "b"}], "tools": []}"#;
    let from_lines = read(&folder.write("p.jsonl", lines), &messages());
    let without_source = |imported: &Imported| -> Vec<Prompt> {
        let prompts = imported.prompts.iter().cloned();
        prompts
            .map(|p| Prompt {
                source: String::new(),
                ..p
            })
            .collect()
    };
    assert_eq!(without_source(&from_table), without_source(&from_lines));
    assert_eq!(from_table.answers, from_lines.answers);
    assert_eq!(from_table.answers.len(), 1);
}

#[test]
fn parquet_that_is_not_right_is_refused_with_its_row() {
    let folder = Folder::new();
    let n: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
    let path = folder.parquet(vec![("text", strings(&["a", " "])), ("n", n.clone())]);
    refused(&path, &text("text"), ", row 2: column `text` is empty");
    refused(
        &path,
        &text("n"),
        ", row 1: column `n` is a number, and must be a string",
    );
    refused(
        &path,
        &text("txt"),
        " has no column `txt`; it has `text`, `n`\nhint: name one of these in `columns` of [import]",
    );
    refused(
        &folder.parquet(vec![("text", strings(&[]))]),
        &text("text"),
        " has no prompts: the file has no rows\nhint: put prompts into it, or name another file in `path` of [import]",
    );
    let path = folder.parquet(vec![("text", strings(&["a"]))]);
    let whole = fs::read(&path).unwrap();
    for cut in [0, 3, whole.len() / 2, whole.len() - 1] {
        let path = folder.write("p.parquet", &whole[..cut]);
        refused(
            &path,
            &text("text"),
            " cannot be read as Parquet\nhint: fetch it again, or write it again with snappy or zstd compression",
        );
    }
}

/// A column that is not needed is not read, so damage in it has no effect.
#[test]
fn parquet_columns_that_are_not_needed_are_not_decoded() {
    let folder = Folder::new();
    let filler: Vec<String> = (0..200)
        .map(|i| format!("{:x}", i * 7_919_u64.pow(3)))
        .collect();
    let filler: Vec<&str> = filler.iter().map(String::as_str).collect();
    let texts: Vec<String> = (0..200).map(|i| format!("text {i}")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let path = folder.parquet(vec![
        ("filler", strings(&filler)),
        ("text", strings(&texts)),
    ]);
    let mut bytes = fs::read(&path).unwrap();
    // The first column's pages come first in the file.
    bytes[4..300].fill(0xff);
    fs::write(&path, bytes).unwrap();
    assert_eq!(read(&path, &text("text")).prompts.len(), 200);
    assert!(matches!(
        import(&ImportSettings::new(&path, text("filler"))),
        Err(Error::UnreadableParquet { .. })
    ));
}
