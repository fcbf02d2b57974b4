//! Text inside HTML, and tables.

use std::fmt::Write;

/// Text for an element or a quoted attribute. Everything that comes from a run goes
/// through here.
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

/// The sentences of a conclusion: escaped, with text in backticks as code.
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

/// A table in a box of its own that scrolls sideways, so that the page does not. The first
/// cell of a row is its heading. Cells are HTML.
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

/// A table's cell, as HTML.
pub(super) enum Cell {
    /// Names the row.
    Head(String),
    /// Breaks into lines.
    Text(String),
    /// A figure that stays on its line.
    Figure(String),
    /// At the right edge.
    Number(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_text_is_markup() {
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
