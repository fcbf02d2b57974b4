//! Files of JSON lines that check themselves: the last field of each line, `crc32c`, is the CRC-32C of the bytes before
//! it.
//!
//! A line is written by one call and may be torn if the process or the disk fails, so a last line without its line feed
//! does not count. Any other line that does not check is damage, and an error with the line's number.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use crate::error::Error;

/// Text between a line's other fields and the eight digits of its checksum.
const SUM_START: &[u8] = b",\"crc32c\":\"";
/// Text behind the digits.
const SUM_END: &[u8] = b"\"}";
/// Length of the checksum in hex digits.
const DIGITS: usize = 8;

/// Formats a value, which must be a JSON object with a field, as a line with its checksum and a line feed.
///
/// # Errors
/// An error of the serialiser, or one that says that the value is not such an object.
pub fn to_checked_line<T: Serialize>(value: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(value)?;
    if line.len() < 3 || line.pop() != Some(b'}') {
        return Err(serde::ser::Error::custom("a line is an object with fields"));
    }
    let sum = checksum(&line);
    line.extend(SUM_START);
    line.extend(sum.into_bytes());
    line.extend(SUM_END);
    line.push(b'\n');
    Ok(line)
}

/// Reads the lines of a file in order, and returns the length in bytes of the lines that are whole: a last line without
/// a line feed does not count. There are no lines if the file does not exist.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] with the number of a line that does not have its checksum or is not a `T`, and
/// `hint` as the remedy.
pub fn read_checked_lines<T: DeserializeOwned>(
    path: &Path,
    hint: &str,
    each: &mut dyn FnMut(T),
) -> Result<u64, Error> {
    match File::open(path) {
        Ok(file) => read_from(path, file, hint, each),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// Checks the lines in the first `bytes` bytes of a file.
///
/// # Errors
/// As [`read_checked_lines`], and [`Error::Invalid`] if these bytes are not whole lines, or the file is shorter.
pub fn check_first_lines(path: &Path, bytes: u64, hint: &str) -> Result<(), Error> {
    if bytes == 0 {
        return Ok(());
    }
    let file = File::open(path).map_err(Error::io("read", path))?;
    let whole = read_from(path, file.take(bytes), hint, &mut |_: IgnoredAny| ())?;
    match whole == bytes {
        true => Ok(()),
        false => Err(Error::invalid(
            format!(
                "{} was cut short or damaged: its first {bytes} bytes are not whole lines",
                path.display()
            ),
            hint,
        )),
    }
}

fn read_from<T: DeserializeOwned>(
    path: &Path,
    file: impl Read,
    hint: &str,
    each: &mut dyn FnMut(T),
) -> Result<u64, Error> {
    let (mut reader, mut line) = (BufReader::new(file), Vec::new());
    let mut whole_bytes = 0;
    for number in 1_usize.. {
        line.clear();
        let bytes = reader.read_until(b'\n', &mut line);
        let bytes = bytes.map_err(Error::io("read", path))?;
        let damaged = |why: &str| {
            let problem = format!(
                "{}:{number} is damaged or was changed: {why}",
                path.display()
            );
            Error::invalid(problem, hint)
        };
        let Some((last, text)) = line.split_last() else {
            break;
        };
        if *last != b'\n' {
            // A torn line is the beginning of a line, so it is not a whole line with another end.
            if fields_of(text).is_some() {
                return Err(damaged("its line feed is another byte"));
            }
            break;
        }
        let mut fields = fields_of(text)
            .ok_or_else(|| damaged("it does not have the checksum that is its last field"))?
            .to_vec();
        fields.push(b'}');
        each(serde_json::from_slice(&fields).map_err(|error| damaged(&error.to_string()))?);
        whole_bytes += bytes as u64;
    }
    Ok(whole_bytes)
}

/// Returns the part of a line that its checksum covers, `None` if the checksum is another one.
fn fields_of(line: &[u8]) -> Option<&[u8]> {
    let rest = line.strip_suffix(SUM_END)?;
    let (rest, digits) = rest.split_at_checked(rest.len().checked_sub(DIGITS)?)?;
    let fields = rest.strip_suffix(SUM_START)?;
    (checksum(fields).as_bytes() == digits).then_some(fields)
}

fn checksum(bytes: &[u8]) -> String {
    format!("{:08x}", crc32c::crc32c(bytes))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;

    fn values() -> Vec<Value> {
        vec![
            json!({"sent": {"request": 1, "usd": 0.5, "prompt": "JJ \n*"}}),
            json!({"step": 2, "loss": -1.25}),
            json!({"over": {"crc32c": "00000000"}}),
        ]
    }

    fn text() -> Vec<u8> {
        let lines = values().into_iter();
        lines.flat_map(|v| to_checked_line(&v).unwrap()).collect()
    }

    fn read(path: &Path) -> Result<(Vec<Value>, u64), String> {
        let mut found = Vec::new();
        let read = read_checked_lines(path, "do this", &mut |value| found.push(value));
        read.map(|bytes| (found, bytes)).map_err(|e| e.to_string())
    }

    #[test]
    fn a_line_ends_in_the_checksum_of_what_is_before_it() {
        // 22620404 is the CRC-32C of "The quick brown fox jumps over the lazy dog", RFC 3720's polynomial.
        assert_eq!(
            checksum(b"The quick brown fox jumps over the lazy dog"),
            "22620404"
        );
        let line = to_checked_line(&json!({"a": 1})).unwrap();
        let sum = checksum(b"{\"a\":1");
        assert_eq!(
            line,
            format!("{{\"a\":1,\"crc32c\":\"{sum}\"}}\n").into_bytes()
        );
        assert!(to_checked_line(&[1]).is_err());
        assert!(to_checked_line(&json!({})).is_err());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.jsonl");
        assert_eq!(read(&path), Ok((Vec::new(), 0)));
        fs::write(&path, text()).unwrap();
        assert_eq!(read(&path), Ok((values(), text().len() as u64)));
    }

    #[test]
    fn a_torn_last_line_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.jsonl");
        let text = text();
        for length in 0..text.len() {
            fs::write(&path, &text[..length]).unwrap();
            let whole = text[..length]
                .iter()
                .rposition(|b| *b == b'\n')
                .map_or(0, |at| at + 1);
            let lines = text[..whole].iter().filter(|b| **b == b'\n').count();
            let expected = (values()[..lines].to_vec(), whole as u64);
            assert_eq!(read(&path), Ok(expected), "cut at {length}");
            assert_eq!(
                check_first_lines(&path, length as u64, "").is_ok(),
                whole == length
            );
            assert!(check_first_lines(&path, text.len() as u64, "").is_err());
        }
    }

    #[test]
    fn a_flipped_bit_is_an_error_with_the_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.jsonl");
        let text = text();
        for bit in 0..text.len() * 8 {
            let mut damaged = text.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &damaged).unwrap();
            let line = text[..bit / 8].iter().filter(|b| **b == b'\n').count() + 1;
            let message = read(&path).unwrap_err();
            let place = format!("file.jsonl:{line} is damaged or was changed");
            assert!(message.contains(&place), "bit {bit}: {message}");
            assert!(message.ends_with("\nhint: do this"), "{message}");
            assert!(
                check_first_lines(&path, text.len() as u64, "").is_err(),
                "bit {bit}"
            );
        }
    }
}
