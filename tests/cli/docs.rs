//! Pages that are generated from the code. `POTSTILL_UPDATE=1 cargo test --release --workspace
//! --test cli -- docs` updates them.

use std::fs;
use std::path::Path;

use crate::fixture::Run;

/// Checks that a page equals the generated text; with `POTSTILL_UPDATE` set, writes the page.
#[track_caller]
pub(crate) fn check_page(path: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("POTSTILL_UPDATE").is_some() {
        fs::write(&file, text).unwrap();
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == text,
        "{path} is stale: `POTSTILL_UPDATE=1 cargo test --release --workspace --test cli -- docs` updates it"
    );
}

#[test]
fn the_schema_is_current() {
    let output = Run::new().potstill(&["schema"]);
    assert_eq!((output.code, output.stderr.as_str()), (0, ""));
    check_page("potstill.schema.json", &output.stdout);
}

#[test]
fn the_page_of_the_run_file_is_current() {
    check_page("docs/config.md", &potstill::schema::config_page());
}

#[test]
fn the_page_of_events_is_current() {
    check_page("docs/events.md", &potstill::events::page());
}

/// Files that hold the limits of what is read from outside, with the parts of the program that they belong to.
const LIMITS: [(&str, &str); 2] = [
    ("Data, text and servers", "datasets/src/limits.rs"),
    ("Models", "model/src/limits.rs"),
];

const LIMITS_INTRO: &str = "# Limits

These are the limits of what Potstill reads from outside: data files, templates, tokenizers, models, and replies of servers. Each bounds time and memory, and is far above what honest input needs. What passes a limit is an error that names the file, the row or the reply, and the limit. Where a limit is a setting of the run file, this is its default, and [config.md](config.md) describes the setting. [security.md](security.md) says what the limits are for.

The page is generated from the files named below; `POTSTILL_UPDATE=1 cargo test --release --workspace --test cli -- docs` updates it.
";

#[test]
fn the_page_of_limits_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut page = LIMITS_INTRO.to_owned();
    for (title, file) in LIMITS {
        let source = fs::read_to_string(root.join(file)).unwrap();
        page += &format!("\n## {title}\n\n`{file}`\n\n| limit | value | name |\n|---|---:|---|\n");
        for (doc, name, value) in constants(&source) {
            page += &format!("| {doc} | {} | `{name}` |\n", amount(name, value));
        }
    }
    check_page("docs/limits.md", &page);
}

/// The documentation, the name and the value of each public constant of a source file.
fn constants(source: &str) -> Vec<(String, &str, f64)> {
    let mut doc = String::new();
    let mut found = Vec::new();
    for line in source.lines() {
        if let Some(text) = line.strip_prefix("///") {
            doc += text;
        } else if let Some(constant) = line.strip_prefix("pub const ") {
            let (name, rest) = constant.split_once(": ").unwrap();
            let value = rest.split_once(" = ").unwrap().1.trim_end_matches(';');
            let text = doc.trim().replace('|', "\\|");
            found.push((text, name, product(value)));
            doc.clear();
        } else {
            doc.clear();
        }
    }
    assert!(!found.is_empty(), "the file has no public constants");
    found
}

/// Computes a product or a shift of numbers, or the length of a duration in seconds.
fn product(value: &str) -> f64 {
    let seconds = value
        .strip_prefix("Duration::from_secs(")
        .and_then(|value| value.strip_suffix(')'));
    let number = |text: &str| -> f64 {
        let text = text.trim().replace('_', "");
        text.parse().unwrap()
    };
    let factor = |text: &str| match text.split_once("<<") {
        Some((base, shift)) => number(base) * number(shift).exp2(),
        None => number(text),
    };
    seconds.unwrap_or(value).split('*').map(factor).product()
}

/// Formats a limit by the unit in its name.
fn amount(name: &str, value: f64) -> String {
    const MIB: f64 = 1_048_576.0;
    match name {
        _ if name.contains("BYTES") && value >= MIB && value % MIB == 0.0 => {
            format!("{} MiB", value / MIB)
        }
        _ if name.contains("BYTES") => format!("{value} bytes"),
        _ if name.contains("SECONDS") || name.contains("WAIT") => format!("{value} s"),
        _ => value.to_string(),
    }
}
