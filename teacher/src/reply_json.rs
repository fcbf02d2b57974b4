//! JSON that comes from a server.
//!
//! The parsers descend into nested JSON by recursion, so deep nesting overflows the stack, which ends the process. Every
//! parse of a server's bytes in this crate goes through this module, which measures the nesting first.

use potstill_datasets::limits::REPLY_JSON_DEPTH;
use serde::Deserialize;

/// Parses JSON with the fast parser.
///
/// # Errors
/// A text for people, if the JSON nests too deep or is not valid.
pub(crate) fn parse<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, String> {
    check_depth(json)?;
    sonic_rs::from_slice(json).map_err(|error| error.to_string())
}

/// Parses JSON of any form.
///
/// # Errors
/// As for [`parse`].
pub(crate) fn value(json: &[u8]) -> Result<serde_json::Value, String> {
    check_depth(json)?;
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

/// Refuses JSON with more than [`REPLY_JSON_DEPTH`] open brackets at any place. Brackets in strings do not count. The
/// text need not be valid: as far as a parser reads it, this function sees the same strings and brackets.
fn check_depth(json: &[u8]) -> Result<(), String> {
    let mut depth = 0_usize;
    let mut at = 0;
    while let Some(&byte) = json.get(at) {
        match byte {
            b'"' => at = end_of_string(json, at + 1),
            b'[' | b'{' => {
                depth += 1;
                if depth > REPLY_JSON_DEPTH {
                    return Err(format!(
                        "it nests more than {REPLY_JSON_DEPTH} brackets (limit REPLY_JSON_DEPTH)"
                    ));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    Ok(())
}

/// The position of the quote that ends the string whose text begins at `at`, or the end of the JSON.
fn end_of_string(json: &[u8], mut at: usize) -> usize {
    while let Some(found) = memchr::memchr2(b'"', b'\\', json.get(at..).unwrap_or_default()) {
        at += found;
        if json.get(at) == Some(&b'"') {
            return at;
        }
        at += 2;
    }
    json.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_count_outside_of_strings_alone() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert!(value(nested(REPLY_JSON_DEPTH - 1).as_bytes()).is_ok());
        assert!(check_depth(nested(REPLY_JSON_DEPTH).as_bytes()).is_ok());
        assert!(check_depth(nested(REPLY_JSON_DEPTH + 1).as_bytes()).is_err());
        let wide = format!("[{}]", vec!["[{}]"; 10_000].join(","));
        assert!(check_depth(wide.as_bytes()).is_ok());
        // Quotes and backslashes inside of strings.
        let brackets = "[{".repeat(1000);
        for text in [
            brackets.clone(),
            format!("\"{brackets}"),
            format!("\\{brackets}\\"),
        ] {
            let json = serde_json::to_vec(&[&text]).unwrap();
            assert_eq!(value(&json).unwrap()[0], text);
        }
        // A string ends where a parser ends it.
        assert!(check_depth(format!(r#"["\\",{brackets}"#).as_bytes()).is_err());
        assert!(check_depth(format!(r#"["\"",{brackets}"#).as_bytes()).is_err());
        assert!(check_depth(format!(r#"["\",{brackets}"#).as_bytes()).is_ok());
        for odd in ["", "\"", "\"\\", "\\", "]]]]", "\"\\\""] {
            assert!(check_depth(odd.as_bytes()).is_ok(), "{odd}");
        }
    }
}
