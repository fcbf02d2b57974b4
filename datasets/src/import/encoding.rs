//! Guesses what bytes are that are not text in UTF-8, so that a message can say how to convert them.

use std::path::Path;

use crate::error::Error;

/// The kind of a file that is not text in UTF-8, judged by its start.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Foreign {
    /// Text in another encoding, with the name that `iconv` has for it.
    Encoding {
        name: &'static str,
        iconv: &'static str,
    },
    /// Another kind of file, with what to do.
    Format {
        name: &'static str,
        hint: &'static str,
    },
}

/// First bytes of kinds of files that may have the wrong name.
const SIGNATURES: [(&[u8], &str, &str); 8] = [
    (
        b"\x1f\x8b",
        "gzip",
        "let the name end in .gz, such as `data.jsonl.gz`",
    ),
    (
        b"\x28\xb5\x2f\xfd",
        "Zstandard",
        "let the name end in .zst, such as `data.jsonl.zst`",
    ),
    (b"PAR1", "Parquet", "let the name end in .parquet"),
    (
        b"ARROW1",
        "Arrow",
        "write it as Parquet, for example with `to_parquet` of Hugging Face datasets",
    ),
    (
        b"PK\x03\x04",
        "a ZIP archive or an Excel workbook",
        "unpack it, or save the sheet as CSV in UTF-8",
    ),
    (
        b"\xd0\xcf\x11\xe0",
        "an Excel workbook",
        "save the sheet as CSV in UTF-8",
    ),
    (
        b"SQLite format 3\0",
        "an SQLite database",
        "export the table as CSV or JSON Lines",
    ),
    (b"BZh", "bzip2", "unpack it with `bunzip2`"),
];

/// Number of bytes in which UTF-16 without a byte order mark is looked for.
const FIRST_BYTES: usize = 64;

/// Looks at the first bytes of a file.
pub(super) fn foreign(first: &[u8]) -> Option<Foreign> {
    let encoding = |name, iconv| Some(Foreign::Encoding { name, iconv });
    let starts = |mark: &[u8]| first.starts_with(mark);
    if let Some((_, name, hint)) = SIGNATURES.iter().find(|(mark, ..)| starts(mark)) {
        return Some(Foreign::Format { name, hint });
    }
    if starts(b"\xff\xfe\0\0") || starts(b"\0\0\xfe\xff") {
        return encoding("UTF-32", "UTF-32");
    }
    if starts(b"\xff\xfe") {
        return encoding("UTF-16, little-endian", "UTF-16");
    }
    if starts(b"\xfe\xff") {
        return encoding("UTF-16, big-endian", "UTF-16");
    }
    let start = first.get(..FIRST_BYTES.min(first.len())).unwrap_or(first);
    let zeros = |odd: usize| {
        let bytes = start.iter().skip(odd).step_by(2);
        (
            bytes.clone().filter(|byte| **byte == 0).count(),
            bytes.count(),
        )
    };
    match (zeros(0), zeros(1)) {
        ((even, n), (odd, m)) if n > 1 && even == n && odd == m => Some(Foreign::Format {
            name: "a file of zeros",
            hint: "it was not written to its end: fetch it or write it again",
        }),
        ((even, n), (0, m)) if n > 1 && even * 2 > n && m > 0 => {
            encoding("UTF-16, big-endian", "UTF-16BE")
        }
        ((0, n), (odd, m)) if m > 1 && odd * 2 > m && n > 0 => {
            encoding("UTF-16, little-endian", "UTF-16LE")
        }
        _ => None,
    }
}

/// Returns the error for a byte that is not UTF-8, with a guess at the encoding of `text` around it. `location` is
/// the text behind the file's name.
pub(super) fn utf8_error(path: &Path, location: &str, text: &[u8]) -> Error {
    let (name, iconv) = guess(text);
    Error::invalid(
        format!(
            "{}{location} is not valid UTF-8; it looks like {name}",
            path.display()
        ),
        format!(
            "convert the file to UTF-8, for example with `iconv -f {iconv} -t UTF-8 FILE > NEW`"
        ),
    )
}

/// Names the encoding that a text which is not UTF-8 is likely to have.
pub(super) fn likely_encoding(text: &[u8]) -> &'static str {
    guess(text).0
}

/// Guesses the encoding of a text that is not UTF-8, with `iconv`'s name for it.
fn guess(text: &[u8]) -> (&'static str, &'static str) {
    if text.contains(&0) {
        return ("UTF-16 or binary data", "UTF-16");
    }
    let high: Vec<u8> = text.iter().copied().filter(|b| *b >= 0x80).collect();
    let letters = text.iter().filter(|b| b.is_ascii_alphabetic()).count();
    // Languages with Latin letters have few others, each between letters of ASCII.
    if high.len() > 4 && high.len() > letters {
        return (
            "an encoding of two bytes or of Cyrillic, such as GB18030, Shift JIS or Windows-1251",
            "GB18030",
        );
    }
    match high.iter().any(|b| (0x80..0xa0).contains(b)) {
        true => (
            "Windows-1252 (Latin-1 with more characters)",
            "WINDOWS-1252",
        ),
        false => ("Latin-1 (ISO 8859-1) or Windows-1252", "WINDOWS-1252"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks_like(first: &[u8]) -> &'static str {
        match foreign(first) {
            None => "text",
            Some(Foreign::Encoding { name, .. } | Foreign::Format { name, .. }) => name,
        }
    }

    #[test]
    fn the_start_of_a_file_tells_what_it_is() {
        let utf16 = |text: &str, bytes: fn(u16) -> [u8; 2]| -> Vec<u8> {
            text.encode_utf16().flat_map(bytes).collect()
        };
        for text in [
            "{\"text\": \"é\"}",
            "question;answer\na;b\n",
            "text\nÄpfel\n",
        ] {
            assert_eq!(looks_like(text.as_bytes()), "text");
            assert_eq!(
                looks_like(&utf16(text, u16::to_le_bytes)),
                "UTF-16, little-endian"
            );
            assert_eq!(
                looks_like(&utf16(text, u16::to_be_bytes)),
                "UTF-16, big-endian"
            );
            let marked = format!("\u{feff}{text}");
            assert_eq!(looks_like(marked.as_bytes()), "text");
            assert_eq!(
                looks_like(&utf16(&marked, u16::to_be_bytes)),
                "UTF-16, big-endian"
            );
        }
        assert_eq!(looks_like(&[0; 100]), "a file of zeros");
        assert_eq!(looks_like(b"\x1f\x8b\x08"), "gzip");
        for short in [b"".as_slice(), b"a", b"\n\n", b"1"] {
            assert_eq!(looks_like(short), "text");
        }
    }

    #[test]
    fn other_encodings_are_guessed() {
        assert!(guess(b"caf\xe9 au lait").0.starts_with("Latin-1"));
        assert!(guess(b"\x93quoted\x94").0.starts_with("Windows-1252"));
        assert!(
            guess(b"{\"text\": \"\xc4\xe3\xba\xc3\xca\xc0\xbd\xe7\xa3\xac\"}")
                .0
                .contains("GB18030")
        );
    }
}
