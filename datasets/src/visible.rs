//! Text from outside, made safe to show.

use std::borrow::Cow;

/// Makes text from outside safe for a terminal or a page: control characters except line feed and tab, marks that change
/// the direction of text, and characters without a glyph are written as `\u{1b}`, so that the text can neither move a
/// cursor nor hide or reorder what is shown. All other text is unchanged.
///
/// Every message, progress line and report passes through this function or [`visible_line`].
pub fn visible(text: &str) -> Cow<'_, str> {
    escape(text, is_hidden)
}

/// As [`visible`], and also escapes line feeds and tabs, for text that has to stay on one line.
pub fn visible_line(text: &str) -> Cow<'_, str> {
    escape(text, |c| is_hidden(c) || matches!(c, '\n' | '\t'))
}

/// As [`visible`], for text that is JSON already: hidden characters occur only in its strings, and are written as JSON's
/// `\u` escapes, so that every reader of JSON gets the original text.
pub fn visible_json(json: &str) -> Cow<'_, str> {
    if !json.chars().any(is_hidden) {
        return Cow::Borrowed(json);
    }
    let mut shown = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        match is_hidden(c) {
            true => {
                let units = c.encode_utf16(&mut [0; 2]).to_vec();
                shown.extend(units.iter().map(|unit| format!("\\u{unit:04x}")));
            }
            false => shown.push(c),
        }
    }
    Cow::Owned(shown)
}

fn escape(text: &str, is_escaped: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(&is_escaped) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_escaped(c) {
            true => shown.extend(c.escape_unicode()),
            false => shown.push(c),
        }
    }
    Cow::Owned(shown)
}

/// Whether a character is a control or changes how the text around it is shown. The joiners U+200C and U+200D are not:
/// scripts and emoji need them.
fn is_hidden(c: char) -> bool {
    match c {
        '\n' | '\t' => false,
        // Marks of direction, line and paragraph separators, invisible operators, and the byte order mark.
        '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{feff}' => true,
        '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' => true,
        // Annotations, and tags, which repeat ASCII invisibly.
        '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}' => true,
        c => c.is_control(),
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::{visible, visible_json, visible_line};

    #[test]
    fn ordinary_text_is_not_copied() {
        for text in ["", "a\tb\nc", "naïve 日本語 👩‍🔬 ﷺ", "\u{1f3f3}\u{fe0f}"] {
            assert!(matches!(visible(text), Cow::Borrowed(same) if same == text));
        }
    }

    #[test]
    fn controls_and_marks_of_direction_are_written_out() {
        assert_eq!(
            visible("\x1b[31m\x07\r\u{9b}"),
            "\\u{1b}[31m\\u{7}\\u{d}\\u{9b}"
        );
        assert_eq!(
            visible("a\u{202e}b\u{2066}\u{e0041}"),
            "a\\u{202e}b\\u{2066}\\u{e0041}"
        );
        assert_eq!(visible("a\nb"), "a\nb");
        assert_eq!(visible_line("a\nb\tc"), "a\\u{a}b\\u{9}c");
    }

    #[test]
    fn json_keeps_its_meaning() {
        let text = "a\u{9b}\u{202e}\u{e0041}\x1b\u{7f}\n日";
        let json = serde_json::to_string(text).unwrap();
        let shown = visible_json(&json);
        assert_eq!(
            shown,
            "\"a\\u009b\\u202e\\udb40\\udc41\\u001b\\u007f\\n日\""
        );
        assert_eq!(serde_json::from_str::<String>(&shown).unwrap(), text);
        assert_eq!(visible(&shown), shown);
    }

    #[test]
    fn escaped_text_has_nothing_left_to_escape() {
        for c in (0..=0x10_ffff).filter_map(char::from_u32) {
            let once = visible_line(&c.to_string()).into_owned();
            assert_eq!(visible_line(&once), once);
        }
    }
}
