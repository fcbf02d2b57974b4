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

    use super::{visible, visible_line};

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
    fn escaped_text_has_nothing_left_to_escape() {
        for c in (0..=0x10_ffff).filter_map(char::from_u32) {
            let once = visible_line(&c.to_string()).into_owned();
            assert_eq!(visible_line(&once), once);
        }
    }
}
