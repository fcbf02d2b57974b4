//! Data files as strangers write them: too long, without end, in another encoding, with several answers, in folders.

use std::fs;
use std::io::Write as _;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::fixture::Run;

/// Runs `import` on a data file of this name, with further keys of `[import]`, and returns its code and messages.
fn import(run: &Run, name: &str, keys: &str) -> (i32, String) {
    let data = format!("path = \"{name}\"\n{keys}\n");
    let file = crate::fixture::RUN_FILE.replace("path = \"prompts.jsonl\"\n", &data);
    run.write("run.toml", &file);
    let output = run.potstill(&["import", "run.toml"]);
    (output.code, output.stderr)
}

#[track_caller]
fn refused(run: &Run, name: &str, keys: &str, expected: &str) {
    let (code, stderr) = import(run, name, keys);
    assert_ne!(code, 0, "{name}");
    assert!(stderr.contains(expected), "{name}: {stderr}");
    assert!(stderr.contains("\nhint: "), "{name}: {stderr}");
}

#[track_caller]
fn accepted(run: &Run, name: &str, keys: &str) {
    let (code, stderr) = import(run, name, keys);
    assert_eq!(code, 0, "{name}: {stderr}");
}

#[test]
fn rows_are_at_most_as_long_as_the_setting() {
    let run = Run::new();
    let keys = "max_row_bytes = 5000";
    let long = "x".repeat(6000);
    let short = "{\"text\": \"a\"}";
    run.write(
        "line.jsonl",
        &format!("{short}\n{{\"text\": \"{long}\"}}\n"),
    );
    run.write(
        "array.json",
        &format!("[{short},\n{{\"text\": \"{long}\"}}]"),
    );
    run.write(
        "around.json",
        &format!("{{\"data\": [{short},\n{{\"text\": \"{long}\"}}]}}"),
    );
    run.write("cell.csv", &format!("text,n\na,1\n\"{long}\",2\n"));
    run.write(
        "quote.csv",
        &format!("text,n\na,1\n\"b,2\n{}", "c,3\n".repeat(3000)),
    );
    run.write("header.csv", &format!("text{}\n", ",a".repeat(6000)));
    for (name, at) in [
        ("line.jsonl", "line.jsonl:2"),
        ("array.json", "array.json:2"),
        ("around.json", "around.json:2"),
        ("cell.csv", "cell.csv:3"),
        ("quote.csv", "quote.csv:3"),
        ("header.csv", "header.csv:1"),
    ] {
        let expected = format!("{at}: the row is longer than 5000 bytes");
        refused(&run, name, keys, &expected);
        let (_, stderr) = import(&run, name, keys);
        assert!(stderr.contains("`max_row_bytes` in [import]"), "{stderr}");
    }
    let (_, stderr) = import(&run, "quote.csv", keys);
    assert!(
        stderr.contains("a quote that is opened in line 3 may not be closed"),
        "{stderr}"
    );
    accepted(&run, "line.jsonl", "max_row_bytes = 7000");
    accepted(&run, "line.jsonl", "");
}

/// `init` and `render` read with the same limits as `import`.
#[test]
fn init_and_render_have_the_limits_too() {
    let run = Run::new();
    run.write(
        "long.jsonl",
        &format!("{{\"text\": \"{}\"}}\n", "x".repeat(5 << 20)),
    );
    let output = run.potstill(&[
        "init",
        "n.toml",
        "--data",
        "long.jsonl",
        "--teacher",
        "model",
    ]);
    assert!(
        output
            .stderr
            .contains("long.jsonl:1: the row is longer than 4194304 bytes"),
        "{}",
        output.stderr
    );
    run.edit("prompts.jsonl", "long.jsonl");
    let output = run.potstill(&["render", "run.toml"]);
    assert!(
        output
            .stderr
            .contains("long.jsonl:1: the row is longer than 4194304 bytes"),
        "{}",
        output.stderr
    );
}

#[test]
fn blank_and_packed_files_without_end_are_refused_at_once() {
    let run = Run::new();
    let pack = |name: &str, byte: u8, length: usize| {
        let file = fs::File::create(run.path(name)).unwrap();
        let mut packed = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        packed.write_all(b"text,n\na,1\n").unwrap();
        let block = vec![byte; 1 << 20];
        (0..length).for_each(|_| packed.write_all(&block).unwrap());
        packed.finish().unwrap();
    };
    pack("lines.csv.gz", b'\n', 20);
    pack("zeros.csv.gz", 0, 6);
    pack("letters.csv.gz", b'x', 6);
    fs::write(run.path("lines.jsonl"), vec![b'\n'; 20 << 20]).unwrap();
    fs::write(run.path("spaces.json"), vec![b' '; 20 << 20]).unwrap();
    fs::write(run.path("zeros.jsonl"), vec![0; 1 << 20]).unwrap();
    let start = Instant::now();
    refused(
        &run,
        "lines.csv.gz",
        "",
        "over 16777216 blank bytes follow each other",
    );
    refused(
        &run,
        "lines.jsonl",
        "",
        "over 16777216 blank bytes follow each other",
    );
    refused(
        &run,
        "spaces.json",
        "",
        "over 16777216 blank bytes follow each other",
    );
    refused(
        &run,
        "zeros.csv.gz",
        "",
        "zeros.csv.gz:3: the line has a NUL byte",
    );
    refused(
        &run,
        "letters.csv.gz",
        "",
        "letters.csv.gz:3: the row is longer than 4194304 bytes",
    );
    refused(&run, "zeros.jsonl", "", "it looks like a file of zeros");
    assert!(start.elapsed() < Duration::from_secs(20));
}

/// A file that expands to over 500 times its size is refused, whatever is in it.
#[test]
fn a_packed_file_may_not_expand_without_bound() {
    let run = Run::new();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packed
        .write_all("{\"text\": \"a\"}\n".repeat(1 << 20).as_bytes())
        .unwrap();
    // Gzip files may be put one behind the other.
    let member = packed.finish().unwrap();
    fs::write(run.path("bomb.jsonl.gz"), member.repeat(25)).unwrap();
    let start = Instant::now();
    let (code, stderr) = import(&run, "bomb.jsonl.gz", "");
    let is_bomb = 14 << 20 > 500 * member.len();
    assert_eq!(code != 0, is_bomb, "{stderr}");
    assert!(
        !is_bomb || stderr.contains("expands to over 500 times its size"),
        "{stderr}"
    );
    assert!(start.elapsed() < Duration::from_secs(120));
}

#[test]
fn json_is_read_strictly() {
    let run = Run::new();
    let jsonl = |text: String| run.write("p.jsonl", &text);
    jsonl("{\"text\": \"a\", \"text\": \"b\"}\n".to_owned());
    refused(
        &run,
        "p.jsonl",
        "",
        "p.jsonl:1:20 is not valid JSON: the key `text` occurs twice",
    );
    jsonl(format!(
        "{{\"text\": \"a\"}}\n{{\"x\": {}",
        "[".repeat(100_000)
    ));
    refused(
        &run,
        "p.jsonl",
        "",
        "is not valid JSON: it is nested deeper than 127 brackets",
    );
    jsonl(format!(
        "{{\"text\": \"a\", \"n\": {}}}\n",
        "9".repeat(1_000_000)
    ));
    refused(
        &run,
        "p.jsonl",
        "",
        "is not valid JSON: number out of range",
    );
    // A row with many keys is read, and a message lists some of them.
    let keys: String = (0..200_000).map(|i| format!("\"k{i}\": 1, ")).collect();
    jsonl(format!("{{{keys}\"txt\": \"a\"}}\n"));
    refused(
        &run,
        "p.jsonl",
        "",
        "p.jsonl:1 has no column `text`; it has `k0`, `k1`",
    );
    let (_, stderr) = import(&run, "p.jsonl", "");
    assert!(stderr.len() < 2000, "{}", stderr.len());
    run.write(
        "wide.csv",
        &format!(
            "text{}\n",
            (0..20_000).map(|i| format!(",c{i}")).collect::<String>()
        ),
    );
    refused(
        &run,
        "wide.csv",
        "",
        "the header has 20001 columns, more than 10000",
    );
}

#[cfg(unix)]
#[test]
fn what_is_not_a_file_is_refused_at_once() {
    let run = Run::new();
    let made = Command::new("mkfifo").arg(run.path("p.jsonl")).status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("skipped: there is no mkfifo");
        return;
    }
    let _socket = std::os::unix::net::UnixListener::bind(run.path("s.jsonl")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", run.path("z.jsonl")).unwrap();
    for name in ["p.jsonl", "s.jsonl", "z.jsonl"] {
        refused(
            &run,
            name,
            "",
            "is not a file but a pipe, a device or a socket",
        );
        let output = run.potstill(&["init", "n.toml", "--data", name, "--teacher", "model"]);
        assert!(output.stderr.contains(", not a file"), "{}", output.stderr);
    }
}

#[test]
fn the_delimiter_is_detected_or_set() {
    let run = Run::new();
    for (delimiter, name) in [
        (',', "a.csv"),
        (';', "b.csv"),
        ('\t', "c.csv"),
        ('|', "d.csv"),
        ('\t', "e.tsv"),
    ] {
        run.write(
            name,
            &format!("text{delimiter}n\nWhat, and why?{delimiter}1\n")
                .replace("What, and", "\"What, and\"")
                .replace("\"What, and\" why?", "\"What, and why?\""),
        );
        accepted(&run, name, "");
        let output = run.potstill(&[
            "init",
            "--force",
            "n.toml",
            "--data",
            name,
            "--teacher",
            "model",
        ]);
        assert!(
            output.stderr.contains("looks like text"),
            "{}",
            output.stderr
        );
    }
    run.write("one.csv", "\"text;n\"\n\"a;1\"\n");
    refused(
        &run,
        "one.csv",
        "",
        "the file has one column, \"text;n\", whose name contains ';'",
    );
    refused(
        &run,
        "one.csv",
        "delimiter = \",\"",
        "has no column `text`; it has `text;n`",
    );
    run.write("both.csv", "text,n;m\na,1;2\n");
    refused(&run, "both.csv", "", "each fits the first rows");
    accepted(&run, "both.csv", "delimiter = \",\"");
    refused(
        &run,
        "both.csv",
        "delimiter = \";\"",
        "it has `text,n`, `m`",
    );
    refused(
        &run,
        "both.csv",
        "delimiter = \";;\"",
        "`delimiter` in [import]",
    );
    refused(
        &run,
        "prompts.jsonl",
        "delimiter = \";\"",
        "is not CSV, and `delimiter` of [import] is set",
    );
    run.write("open.csv", "text,n\n\"a,1\nb,2\n");
    refused(
        &run,
        "open.csv",
        "",
        "open.csv:2: a cell begins with a quote that is not closed",
    );
    run.write("caret.csv", "text^n\na^1\n");
    refused(&run, "caret.csv", "", "whose name contains '^'");
    accepted(&run, "caret.csv", "delimiter = \"^\"");
}

#[test]
fn other_encodings_are_named() {
    let run = Run::new();
    let utf16: Vec<u8> = "text,n\nä,1\n"
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    fs::write(run.path("u.csv"), &utf16).unwrap();
    refused(
        &run,
        "u.csv",
        "",
        "u.csv is not UTF-8: it looks like UTF-16, little-endian",
    );
    fs::write(
        run.path("m.jsonl"),
        [b"\xff\xfe".as_slice(), &utf16].concat(),
    )
    .unwrap();
    refused(&run, "m.jsonl", "", "it looks like UTF-16, little-endian");
    fs::write(run.path("l.csv"), b"text,n\ncaf\xe9,1\n").unwrap();
    refused(
        &run,
        "l.csv",
        "",
        "l.csv:2: cell 1 is not valid UTF-8; it looks like Latin-1",
    );
    fs::write(run.path("w.jsonl"), b"{\"text\": \"\x93a\x94\"}\n").unwrap();
    refused(
        &run,
        "w.jsonl",
        "",
        "w.jsonl:1:11 is not valid UTF-8; it looks like Windows-1252",
    );
    fs::write(run.path("g.jsonl"), b"\x1f\x8b\x08\0\0\0\0\0").unwrap();
    refused(&run, "g.jsonl", "", "it looks like gzip");
}

#[test]
fn a_list_of_answers_is_several_answers() {
    let run = Run::new();
    let rows = [
        json!({ "prompt": "A?", "responses": ["a", "b"] }),
        json!({ "prompt": "B?", "responses": [{ "role": "assistant", "content": "c" }] }),
        json!({ "prompt": "C?", "responses": [{ "text": "d" }, { "text": "e" }, { "text": "d" }] }),
    ];
    run.write("many.jsonl", &rows.map(|row| format!("{row}\n")).concat());
    let flags = ["--force", "--data", "many.jsonl", "--teacher", "model"];
    let output = run.potstill(&[&["init", "run.toml"], &flags[..]].concat());
    assert!(
        output.stderr.contains("looks like prompt and response"),
        "{}",
        output.stderr
    );
    let text = fs::read_to_string(run.path("run.toml")).unwrap();
    assert!(text.contains("output = \"responses\""), "{text}");
    let file = crate::fixture::RUN_FILE
        .replace("prompts.jsonl", "many.jsonl")
        .replace(
            "{ text = \"text\" }",
            "{ instruction = \"prompt\", output = \"responses\" }\nanswers = \"given\"",
        );
    let start = file.find("[teacher]").unwrap();
    let end = file.find("[curate]").unwrap();
    let file = format!(
        "{}[teacher]\npath = \"model\"\ntemplate = \"plain\"\n\n{}",
        &file[..start],
        &file[end..]
    );
    run.write("run.toml", &file);
    let imported = run.potstill(&["import", "run.toml"]);
    assert_eq!(imported.code, 0, "{}", imported.stderr);
    let collected = run.potstill(&["collect", "run.toml"]);
    assert_eq!(collected.code, 0, "{}", collected.stderr);
    assert!(collected.stderr.contains("5 "), "{}", collected.stderr);
    // What is not understood is said, by `init` and by `import`.
    run.write(
        "odd.jsonl",
        "{\"question\": \"A?\", \"answers\": [{\"body\": \"a\"}]}\n",
    );
    let output = run.potstill(&[
        "init",
        "n.toml",
        "--data",
        "odd.jsonl",
        "--teacher",
        "model",
    ]);
    let expected = "not read as answers: column `answers`: answer 1 of the list is an object without `text`, `content` or `answer`";
    assert!(output.stderr.contains(expected), "{}", output.stderr);
    run.edit("many.jsonl", "odd.jsonl");
    run.edit(
        "instruction = \"prompt\", output = \"responses\"",
        "instruction = \"question\", output = \"answers\"",
    );
    let output = run.potstill(&["import", "run.toml"]);
    assert!(
        output
            .stderr
            .contains("odd.jsonl:1: column `answers`: answer 1 of the list is an object"),
        "{}",
        output.stderr
    );
}

#[test]
fn columns_may_be_nested_and_files_in_folders() {
    let run = Run::new();
    fs::create_dir(run.path("shards")).unwrap();
    let line = |i: usize| format!("{}\n", json!({ "data": { "question": format!("Q{i}?") } }));
    for shard in 0..3 {
        let lines: String = (0..4).map(|i| line(4 * shard + i)).collect();
        run.write(&format!("shards/part-{shard}.jsonl"), &lines);
    }
    run.write("shards/README.md", "about");
    let columns = |run: &Run, path: &str, columns: &str| {
        let file = crate::fixture::RUN_FILE
            .replace("prompts.jsonl", path)
            .replace("{ text = \"text\" }", columns);
        run.write("run.toml", &file);
        run.potstill(&["render", "run.toml", "--rows", "12"])
    };
    for path in ["shards", "shards/", "shards/part-*.jsonl"] {
        let output = columns(&run, path, "{ text = \"data.question\" }");
        assert_eq!(output.code, 0, "{}", output.stderr);
        assert!(
            output.stdout.contains("part-2.jsonl:4, "),
            "{}",
            output.stdout
        );
    }
    let output = columns(&run, "shards", "{ text = \"data.answer\" }");
    assert!(
        output
            .stderr
            .contains("part-0.jsonl:1 has no column `data.answer`; it has `data.question`"),
        "{}",
        output.stderr
    );
    run.write("shards/x.csv", "text\na\n");
    let output = columns(&run, "shards", "{ text = \"data.question\" }");
    assert!(
        output.stderr.contains("has files of several formats"),
        "{}",
        output.stderr
    );
    run.write(
        "wrapped.json",
        "{\"n\": 1, \"data\": [{\"text\": \"a\"},\n{\"text\": \"b\"}]}",
    );
    let output = columns(&run, "wrapped.json", "{ text = \"text\" }");
    assert!(
        output.stdout.contains("wrapped.json:2, "),
        "{}{}",
        output.stdout,
        output.stderr
    );
    // Headers must agree before any row is read.
    fs::create_dir(run.path("tables")).unwrap();
    run.write("tables/a.csv", "text,n\na,1\n");
    run.write("tables/b.csv", "text,m\nb,1\n");
    let output = columns(&run, "tables", "{ text = \"text\" }");
    assert!(
        output.stderr.contains("b.csv has other columns than"),
        "{}",
        output.stderr
    );
    let output = columns(&run, "model", "{ text = \"text\" }");
    assert!(
        output
            .stderr
            .contains("model is a folder without data files"),
        "{}",
        output.stderr
    );
}
