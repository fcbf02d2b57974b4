//! Escaping of text, and tables in HTML.

use std::fmt::Write;

/// Escapes text for an element or a quoted attribute. All text that comes from a run is escaped.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Escapes a sentence of the conclusion and marks text in backticks as code.
pub(super) fn sentence(text: &str) -> String {
    let mut out = String::new();
    for (i, part) in text.split('`').enumerate() {
        match i % 2 {
            0 => out.push_str(&escape(part)),
            _ => {
                let _ = write!(out, "<code>{}</code>", escape(part));
            }
        }
    }
    out
}

/// Writes a table in a box that scrolls sideways, so that the page does not scroll. The first cell of a row is the row's
/// heading.
pub(super) fn table(out: &mut String, label: &str, class: &str, head: &[&str], rows: &[Vec<Cell>]) {
    let _ = write!(
        out,
        "<div class=\"card scroll\" role=\"region\" aria-label=\"{}\" tabindex=\"0\"><table class=\"{class}\"><thead><tr>",
        escape(label)
    );
    let first = rows.first().map_or(&[][..], Vec::as_slice);
    for (i, name) in head.iter().enumerate() {
        let class = match first.get(i) {
            Some(Cell::Number(_)) => " class=\"number\"",
            _ => "",
        };
        let _ = write!(out, "<th scope=\"col\"{class}>{name}</th>");
    }
    out.push_str("</tr></thead><tbody>\n");
    for row in rows {
        out.push_str("<tr>");
        for cell in row {
            let _ = match cell {
                Cell::Head(html) => write!(out, "<th scope=\"row\">{html}</th>"),
                Cell::Text(html) => write!(out, "<td>{html}</td>"),
                Cell::Figure(html) => write!(out, "<td class=\"figure\">{html}</td>"),
                Cell::Number(html) => write!(out, "<td class=\"number\">{html}</td>"),
            };
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
}

/// A table cell with its content as HTML.
pub(super) enum Cell {
    /// Heading of the row.
    Head(String),
    /// Text with line breaks.
    Text(String),
    /// Figure without line breaks.
    Figure(String),
    /// Number at the right edge.
    Number(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_text_is_escaped() {
        let text = "<script>alert(\"1\" + '2')</script> & `code <b>`";
        assert_eq!(
            escape(text),
            "&lt;script&gt;alert(&quot;1&quot; + &#39;2&#39;)&lt;/script&gt; &amp; `code &lt;b&gt;`"
        );
        assert_eq!(
            sentence("a `<b>` & `sft`"),
            "a <code>&lt;b&gt;</code> &amp; <code>sft</code>"
        );
    }
}
