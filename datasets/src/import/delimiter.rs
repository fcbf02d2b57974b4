//! Finds the delimiter of a CSV file from its header and first rows.

use std::io::{BufReader, Cursor, Read};
use std::path::Path;

use super::file::{open, read_error};
use super::records::{CellRecord, Records};
use super::settings::Delimiter;
use crate::error::Error;

const DELIMITERS: [u8; 4] = [b',', b';', b'\t', b'|'];
/// Further characters that some files have between their cells.
const RARE: [char; 5] = ['^', '~', '\u{1}', '\u{1e}', '\u{1f}'];
/// Number of bytes and of records that are looked at.
const SAMPLE_BYTES: u64 = 1 << 20;
const SAMPLE_RECORDS: usize = 20;

/// Returns the delimiter of a file: the one that is set, a tab if the name says so, or the one that the header and the
/// first rows agree on.
///
/// # Errors
/// When several delimiters fit, or none does; when a file reads as one column whose name contains a delimiter.
pub(super) fn delimiter(path: &Path, set: Option<Delimiter>) -> Result<u8, Error> {
    if let Some(set) = set {
        return Ok(set.byte());
    }
    let mut sample = Vec::new();
    let mut start = open(path)?.take(SAMPLE_BYTES);
    start.read_to_end(&mut sample).map_err(read_error(path))?;
    if let Some([byte, b'\r' | b'\n', ..]) = sample.strip_prefix(b"sep=") {
        return Ok(*byte);
    }
    if is_tsv(path) {
        return match Shape::new(path, &sample, b'\t') {
            Shape {
                columns: 1, name, ..
            } => single(path, b'\t', &name),
            _ => Ok(b'\t'),
        };
    }
    let shapes = DELIMITERS.map(|delimiter| (delimiter, Shape::new(path, &sample, delimiter)));
    let splitting: Vec<_> = shapes
        .iter()
        .filter(|(_, shape)| shape.columns > 1)
        .collect();
    let fitting: Vec<_> = splitting
        .iter()
        .filter(|(_, shape)| shape.is_even)
        .collect();
    match (splitting.as_slice(), fitting.as_slice()) {
        ([], _) => {
            let name = shapes.first().map(|(_, shape)| shape.name.as_str());
            single(path, b',', name.unwrap_or_default())
        }
        // Rows that do not fit are reported with their line.
        ([(only, _)], _) | (_, [(only, _)]) => Ok(*only),
        (possible, []) => Err(ambiguous(path, "none fits all of the first rows", possible)),
        (_, possible) => {
            let possible: Vec<_> = possible.iter().map(|found| **found).collect();
            Err(ambiguous(path, "each fits the first rows", &possible))
        }
    }
}

fn is_tsv(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.to_ascii_lowercase();
    name.rsplit('.').take(2).any(|end| end == "tsv")
}

/// Accepts a file of one column, unless its name looks like several.
fn single(path: &Path, delimiter: u8, name: &str) -> Result<u8, Error> {
    let others = DELIMITERS.map(char::from).into_iter().chain(RARE);
    let Some(other) = others.into_iter().find(|other| name.contains(*other)) else {
        return Ok(delimiter);
    };
    let name: String = name.chars().take(80).collect();
    Err(Error::invalid(
        format!(
            "{}:1: the file has one column, {name:?}, whose name contains {other:?}",
            path.display()
        ),
        format!(
            "set `delimiter` in [import]: to {} if these are several columns, and to {} if the name is right",
            quoted(other),
            quoted(char::from(delimiter)),
        ),
    ))
}

fn ambiguous(path: &Path, why: &str, possible: &[&(u8, Shape)]) -> Error {
    let names = possible.iter().map(|(byte, shape)| {
        let name = quoted(char::from(*byte));
        format!("{name} ({} columns)", shape.columns)
    });
    let names: Vec<String> = names.collect();
    Error::invalid(
        format!(
            "{}: more than one delimiter splits the header, and {why}: {}",
            path.display(),
            names.join(", ")
        ),
        "set `delimiter` in [import] to the one that is right",
    )
}

/// Writes a character as a TOML string.
fn quoted(delimiter: char) -> String {
    match delimiter {
        '\t' => "\"\\t\"".to_owned(),
        c if c.is_control() => format!("\"\\u{:04x}\"", u32::from(c)),
        c => format!("\"{c}\""),
    }
}

/// The columns into which a delimiter splits the start of a file.
struct Shape {
    /// Number of columns of the header.
    columns: usize,
    /// Name of the first column.
    name: String,
    /// Whether the first rows have as many cells as the header.
    is_even: bool,
}

impl Shape {
    fn new(path: &Path, sample: &[u8], delimiter: u8) -> Shape {
        let bytes: Box<dyn Read> = Box::new(Cursor::new(sample.to_vec()));
        let mut records = Records::new(path, BufReader::new(bytes), delimiter, usize::MAX);
        let (mut counts, mut name) = (Vec::new(), String::new());
        let mut record = CellRecord::default();
        // A sample may end inside a record, which counts if it is the only one.
        while counts.len() <= SAMPLE_RECORDS
            && let Ok(true) = records.read(&mut record)
        {
            if counts.is_empty() {
                let first = record.cells().next().unwrap_or_default();
                name = String::from_utf8_lossy(first).into_owned();
            }
            counts.push(record.ends.len());
        }
        let is_cut = sample.len() as u64 >= SAMPLE_BYTES && counts.len() <= SAMPLE_RECORDS;
        if is_cut && counts.len() > 1 {
            counts.pop();
        }
        let columns = counts.first().copied().unwrap_or(1);
        Shape {
            columns,
            name,
            is_even: counts.iter().all(|count| *count == columns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(name: &str, text: &str) -> Result<char, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let error = |error: Error| error.to_string().split_once(name).unwrap().1.to_owned();
        delimiter(&path, None).map(char::from).map_err(error)
    }

    #[test]
    fn the_header_and_the_rows_tell_the_delimiter() {
        for (text, expected) in [
            ("", ','),
            ("text\nHello, you; and you\n", ','),
            ("question,answer\na,b\n", ','),
            ("question;answer\nIs it 1, 2, or 3?;b\n", ';'),
            ("question\tanswer\na, b\tc;d\n", '\t'),
            ("question|answer\na, b|c;d\n", '|'),
            ("q;a, b\n1;2\n", ';'),
            ("\"q;x\",a\n\"1;2\",3\n", ','),
            ("q;a\n\"x\n;,y\";2\n", ';'),
            ("sep=|\nq|a\n1|2\n", '|'),
            // The row that does not fit is reported when it is read.
            ("q,a\n1\n", ','),
        ] {
            assert_eq!(found("p.csv", text), Ok(expected), "{text:?}");
        }
        assert_eq!(found("p.tsv", "a,b\tc\n1\t2"), Ok('\t'));
        assert_eq!(found("p.tsv.gz.csv", "a;b\n1;2"), Ok(';'));
    }

    #[test]
    fn unclear_delimiters_are_refused_with_a_hint() {
        let refused = |name: &str, text: &str, expected: &str| {
            let error = found(name, text).unwrap_err();
            assert!(error.contains(expected), "{error}");
            assert!(
                error.contains("\nhint: set `delimiter` in [import]"),
                "{error}"
            );
        };
        refused(
            "p.csv",
            "a,b;c\n1,2;3\n",
            "each fits the first rows: \",\" (2 columns), \";\" (2 columns)",
        );
        refused("p.csv", "a,b;c\n1\n", "none fits all of the first rows");
        refused(
            "p.csv",
            "\"question;answer\"\n\"a;b\"\n",
            ":1: the file has one column, \"question;answer\", whose name contains ';'",
        );
        refused("p.csv", "question^answer\na^b\n", "whose name contains '^'");
        refused("p.tsv", "question;answer\na;b\n", "whose name contains ';'");
    }
}
