//! Tokens of the tags and expressions of a template, by the rules of minijinja.

/// The kind of a [`Token`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    Name,
    Text,
    Number,
    Symbol,
}

/// A token of an expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token<'s> {
    pub(super) kind: TokenKind,
    /// The token as it is written, with the quotes of a text.
    pub(super) text: &'s str,
    /// The white space in front of the token.
    pub(super) space: &'s str,
}

/// The tokens between the two delimiters of a tag.
#[derive(Debug)]
pub(super) struct TagTokens<'s> {
    pub(super) tokens: Vec<Token<'s>>,
    /// The closing delimiter with the white space in front of it and its sign (`-` or `+`).
    pub(super) close: &'s str,
}

/// Splits what follows an opening delimiter into tokens, up to the closing delimiter (`%}` or `}}`). Returns the tokens
/// and the text after the tag, or `None` if the text has no closing delimiter or an unknown character.
pub(super) fn tag_tokens<'s>(text: &'s str, close: &str) -> Option<(TagTokens<'s>, &'s str)> {
    let mut tokens = Vec::new();
    let mut brackets = 0_usize;
    let mut at = 0;
    loop {
        let rest = text.get(at..)?;
        let word = rest.trim_start_matches(|c: char| c.is_ascii_whitespace());
        let space = rest.get(..rest.len() - word.len())?;
        if brackets == 0 {
            let unsigned = word.strip_prefix(['-', '+']).unwrap_or(word);
            let end = [word, unsigned]
                .into_iter()
                .find_map(|candidate| candidate.strip_prefix(close));
            if let Some(after) = end {
                let close = rest.get(..rest.len() - after.len())?;
                return Some((TagTokens { tokens, close }, after));
            }
        }
        let (kind, length) = token(word)?;
        let text = word.get(..length)?;
        match text {
            "(" | "[" | "{" => brackets += 1,
            ")" | "]" | "}" => brackets = brackets.checked_sub(1)?,
            _ => {}
        }
        tokens.push(Token { kind, text, space });
        at += space.len() + length;
    }
}

/// Returns the kind and the length in bytes of the token that `text` starts with.
fn token(text: &str) -> Option<(TokenKind, usize)> {
    let bytes = text.as_bytes();
    let first = *bytes.first()?;
    Some(match first {
        b'\'' | b'"' => (TokenKind::Text, quoted(bytes, first)?),
        b'0'..=b'9' => (TokenKind::Number, number(text)),
        b'_' | b'a'..=b'z' | b'A'..=b'Z' => (TokenKind::Name, name(text)),
        _ => {
            let pairs = ["//", "**", "==", "!=", ">=", "<="];
            let symbol = match pairs.iter().any(|pair| text.starts_with(pair)) {
                true => 2,
                false if b".,~+-*/%:|()[]{}<>=".contains(&first) => 1,
                false => return None,
            };
            (TokenKind::Symbol, symbol)
        }
    })
}

fn quoted(bytes: &[u8], quote: u8) -> Option<usize> {
    let mut escaped = false;
    for (at, &byte) in bytes.iter().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            _ if byte == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

fn name(text: &str) -> usize {
    let is_part = |c: char| c == '_' || c.is_ascii_alphanumeric();
    text.find(|c: char| !is_part(c)).unwrap_or(text.len())
}

/// Returns the length of a number: an integer, one in base 2, 8 or 16, or a float. A period belongs to the number unless
/// a name follows it, as in `1.real`.
fn number(text: &str) -> usize {
    let bytes = text.as_bytes();
    let at = |i: usize| bytes.get(i).copied().unwrap_or_default();
    if bytes.starts_with(b"0x") || bytes.starts_with(b"0X") {
        return 2 + bytes
            .iter()
            .skip(2)
            .take_while(|&&byte| byte.is_ascii_hexdigit() || byte == b'_')
            .count();
    }
    let prefixed = at(0) == b'0' && matches!(at(1), b'b' | b'B' | b'o' | b'O');
    let mut length = if prefixed { 2 } else { 1 };
    let (mut fraction, mut exponent) = (prefixed, prefixed);
    loop {
        match at(length) {
            b'0'..=b'9' | b'_' => {}
            b'.' if !fraction && !exponent => {
                let is_exponent = matches!(at(length + 1), b'e' | b'E')
                    && matches!(at(length + 2), b'+' | b'-' | b'0'..=b'9');
                let next = at(length + 1);
                if !is_exponent && (next == b'_' || next.is_ascii_alphabetic()) {
                    return length;
                }
                fraction = true;
            }
            b'e' | b'E' if !exponent => {
                exponent = true;
                if matches!(at(length + 1), b'+' | b'-') {
                    length += 1;
                }
            }
            _ => return length,
        }
        length += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(source: &str) -> Option<Vec<&str>> {
        let (tag, _) = tag_tokens(source, "}}")?;
        Some(tag.tokens.iter().map(|token| token.text).collect())
    }

    #[test]
    fn tokens_are_those_of_minijinja() {
        for (source, expected) in [
            (" a.b[0x1F] -}}", vec!["a", ".", "b", "[", "0x1F", "]"]),
            (
                "1.5e-3+2.e4-1.real}}",
                vec!["1.5e-3", "+", "2.e4", "-", "1", ".", "real"],
            ),
            (
                r#"'it\'s }}' ~ "%}" }}"#,
                vec![r"'it\'s }}'", "~", "\"%}\""],
            ),
            (
                "{'a': {'b': 1}} }}",
                vec!["{", "'a'", ":", "{", "'b'", ":", "1", "}", "}"],
            ),
            (
                "a//b**c!=d<=e}}",
                vec!["a", "//", "b", "**", "c", "!=", "d", "<=", "e"],
            ),
        ] {
            assert_eq!(texts(source), Some(expected), "{source}");
        }
        for source in ["a", "'a }}", "a ; b }}", ") }}", "é }}"] {
            assert_eq!(texts(source), None, "{source}");
        }
    }

    #[test]
    fn the_closing_delimiter_keeps_its_sign() {
        let (tag, rest) = tag_tokens(" if a -%}b", "%}").unwrap();
        assert_eq!((tag.close, rest), (" -%}", "b"));
    }
}
