//! The tags `{% generation %}` and `{% endgeneration %}`, which transformers defines for assistant text.
//!
//! In transformers the pair is a Jinja extension that parses to a call block, so the text between the tags has its own
//! scope. minijinja has no extensions, so the source is rewritten before minijinja parses it. `{%- generation -%}`
//! becomes `{%- with %}{{ potstill_generation_open }}{% if true -%}`, and `{%- endgeneration -%}` becomes
//! `{%- endif %}{{ potstill_generation_close }}{% endwith -%}`. `with` provides the scope, and both ends are block tags,
//! so whitespace control and trimmed line ends do not change. (A call block of minijinja does not work, because
//! `{% set x = x + 1 %}` does not see the outer x in it.) The values of the two variables are private-use characters
//! that do not occur in the conversation; [`GenerationMarks::take`] removes them from the rendering.

use std::ops::Range;

/// Name of the variable that marks the start of a block.
pub(super) const OPEN: &str = "potstill_generation_open";
/// Name of the variable that marks the end of a block.
pub(super) const CLOSE: &str = "potstill_generation_close";

/// Rewrites the generation tags of a template to tags that minijinja knows. The second value says whether there are any.
pub(super) fn rewrite(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut found = false;
    let mut raw = false;
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (text, tail) = rest.split_at(at);
        out.push_str(text);
        let (tag, after) = tail.split_at(tag_end(tail, raw));
        rest = after;
        match tag_name(tag) {
            Some("raw") => raw = true,
            Some("endraw") => raw = false,
            Some("generation") if !raw => {
                found = true;
                let tags = format!("with %}}{{{{ {OPEN} }}}}{{% if true");
                out.push_str(&tag.replacen("generation", &tags, 1));
                continue;
            }
            Some("endgeneration") if !raw => {
                let tags = format!("endif %}}{{{{ {CLOSE} }}}}{{% endwith");
                out.push_str(&tag.replacen("endgeneration", &tags, 1));
                continue;
            }
            _ => {}
        }
        out.push_str(tag);
    }
    out.push_str(rest);
    (out, found)
}

/// Returns the length in bytes of the tag, expression or comment that `text` starts with, or 1 for a `{` that begins none
/// of them. Within `{% raw %}`, only `{% endraw %}` counts as a tag.
fn tag_end(text: &str, raw: bool) -> usize {
    let close = match text.as_bytes().get(1) {
        Some(b'%') => "%}",
        Some(b'{') if !raw => "}}",
        Some(b'#') if !raw => return text.find("#}").map_or(text.len(), |end| end + 2),
        _ => return 1,
    };
    if raw {
        // Other tags are text here, and may contain an unpaired quote.
        return if tag_name(text) == Some("endraw") {
            text.find(close).map_or(text.len(), |end| end + 2)
        } else {
            1
        };
    }
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(2) {
        match quote {
            Some(open) => {
                if escaped {
                    escaped = false;
                } else if c == '\\' {
                    escaped = true;
                } else if c == open {
                    quote = None;
                }
            }
            None if c == '\'' || c == '"' => quote = Some(c),
            None if text.get(at..).is_some_and(|rest| rest.starts_with(close)) => return at + 2,
            None => {}
        }
    }
    text.len()
}

/// Returns the word that a block tag starts with.
fn tag_name(tag: &str) -> Option<&str> {
    let inner = tag.strip_prefix("{%")?;
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
    let end = inner
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(inner.len());
    inner.get(..end)
}

/// The two characters that mark the start and the end of a block in one rendering.
#[derive(Debug, Clone, Copy)]
pub(super) struct GenerationMarks {
    pub(super) open: char,
    pub(super) close: char,
}

impl GenerationMarks {
    /// Chooses the first two characters of the private-use plane 15 that occur in none of the texts.
    pub(super) fn unused_in(texts: &[&str]) -> Self {
        let mut unused =
            ('\u{F0000}'..='\u{FFFFD}').filter(|&c| !texts.iter().any(|text| text.contains(c)));
        let open = unused.next().unwrap_or('\u{10FFFC}');
        Self {
            open,
            close: unused.next().unwrap_or('\u{10FFFD}'),
        }
    }

    /// Removes the marks from a rendering. Returns the text and the byte ranges that were between marks. A block within a
    /// block belongs to the outer one.
    pub(super) fn take(self, rendered: &str) -> (String, Vec<Range<usize>>) {
        let mut text = String::with_capacity(rendered.len());
        let mut spans = Vec::new();
        let mut depth = 0_usize;
        let mut start = 0;
        for c in rendered.chars() {
            if c == self.open {
                if depth == 0 {
                    start = text.len();
                }
                depth += 1;
            } else if c == self.close {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    spans.push(start..text.len());
                }
            } else {
                text.push(c);
            }
        }
        (text, spans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_rewritten_with_their_whitespace_control() {
        let open = "with %}{{ potstill_generation_open }}{% if true";
        let close = "endif %}{{ potstill_generation_close }}{% endwith";
        for (source, expected) in [
            (
                "a{% generation %}b{% endgeneration %}c",
                format!("a{{% {open} %}}b{{% {close} %}}c"),
            ),
            (
                "{%- generation -%}b{%- endgeneration -%}",
                format!("{{%- {open} -%}}b{{%- {close} -%}}"),
            ),
            (
                "{%generation%}b{%+endgeneration+%}",
                format!("{{%{open}%}}b{{%+{close}+%}}"),
            ),
        ] {
            assert_eq!(rewrite(source), (expected, true));
        }
    }

    #[test]
    fn text_comments_strings_and_raw_blocks_are_left_alone() {
        for source in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{{ \"\\\"{% generation %}\" }}",
            "{% raw %}it's {% generation %} {{ {% endraw %}",
            "{% set generation = 1 %}{{ generation }}",
            "{ {a} { % generation % }",
            "generation {",
            "{% unclosed generation",
            "{",
            "",
        ] {
            assert_eq!(rewrite(source), (source.to_owned(), false));
        }
    }

    #[test]
    fn marks_are_characters_that_the_texts_do_not_contain() {
        let marks = GenerationMarks::unused_in(&["a\u{F0000}b", "\u{F0002}"]);
        assert_eq!((marks.open, marks.close), ('\u{F0001}', '\u{F0003}'));
        let (text, spans) =
            marks.take("a\u{F0001}bé\u{F0001}c\u{F0003}\u{F0003}d\u{F0001}\u{F0003}\u{F0000}");
        assert_eq!(text, "abécd\u{F0000}");
        assert_eq!(spans, [1..5, 6..6]);
    }
}
