//! Rewrites a template so that its rendering is bounded: see [`expression`](super::expression) for operators. Text in
//! loops and macros is charged by a call at the start of their body, because minijinja copies it without asking.

use super::expression::{Refusal, Rewriter};
use super::lexer::{TagTokens, tag_tokens};
use crate::limits::{TEMPLATE_BLOCKS, TEMPLATE_CHAIN, TEMPLATE_MACROS, TEMPLATE_NESTING};

/// Texts in the bodies of loops up to this length are paid for by the instructions of the loop.
const FREE_TEXT: usize = 64;

/// Why a template was not rewritten, with the byte after the tag that is at fault.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) end: usize,
    pub(super) start: usize,
    /// The reason; `None` if it is a matter of syntax, which minijinja describes.
    pub(super) limit: Option<String>,
}

/// A block that is open.
struct OpenBlock {
    /// Number of `elif` tags so far.
    branches: usize,
    /// For a body that may be rendered many times, the position in the output where its text is charged.
    charge_at: Option<usize>,
    /// Bytes of text in the block so far.
    text: usize,
}

struct TemplateRewriter {
    out: String,
    open: Vec<OpenBlock>,
    /// Position and amount of each charge.
    charges: Vec<(usize, usize)>,
    macros: usize,
}

/// Rewrites all expressions and tags of a template.
pub(super) fn rewrite(source: &str) -> Result<String, Fault> {
    let mut rewriter = TemplateRewriter {
        out: String::with_capacity(source.len() * 2),
        open: Vec::new(),
        charges: Vec::new(),
        macros: 0,
    };
    let mut rest = source;
    while let Some((text, tag)) = next_tag(rest) {
        rewriter.text(text);
        let after = rewriter.tag(tag).map_err(|(refusal, after)| Fault {
            start: source.len() - tag.len(),
            end: source.len() - after.len(),
            limit: refusal,
        })?;
        rest = after;
    }
    rewriter.text(rest);
    Ok(rewriter.finish())
}

/// Splits before the next opening delimiter.
fn next_tag(source: &str) -> Option<(&str, &str)> {
    let mut from = 0;
    loop {
        let at = from + source.get(from..)?.find('{')?;
        match source.as_bytes().get(at + 1) {
            Some(b'{' | b'%' | b'#') => return source.split_at_checked(at),
            _ => from = at + 1,
        }
    }
}

/// The limit that a tag passes, if it is one, and the source after the tag.
type TagFault<'s> = (Option<String>, &'s str);

impl TemplateRewriter {
    fn text(&mut self, text: &str) {
        self.out.push_str(text);
        for block in &mut self.open {
            block.text += text.len();
        }
    }

    fn tag<'s>(&mut self, tag: &'s str) -> Result<&'s str, TagFault<'s>> {
        let (kind, inner) = tag.split_at_checked(2).unwrap_or((tag, ""));
        if kind == "{#" {
            let Some((comment, after)) = inner.split_once("#}") else {
                return Err((None, ""));
            };
            self.out.push_str(kind);
            self.out.push_str(comment);
            self.out.push_str("#}");
            return Ok(after);
        }
        if kind == "{%"
            && let Some(length) = raw_block(tag)
        {
            let (raw, after) = tag.split_at_checked(length).unwrap_or((tag, ""));
            self.text(raw);
            return Ok(after);
        }
        let close = if kind == "{%" { "%}" } else { "}}" };
        let signed = inner.strip_prefix(['-', '+']).unwrap_or(inner);
        let sign = inner.get(..inner.len() - signed.len()).unwrap_or_default();
        let (tokens, after) = tag_tokens(signed, close).ok_or((None, ""))?;
        self.out.push_str(kind);
        self.out.push_str(sign);
        let written = match kind {
            "{{" => expression(&tokens),
            _ => self.statement(&tokens),
        };
        let text = written.map_err(|refusal| (explain(refusal), after))?;
        self.out.push_str(&text);
        let (space, end) = tokens
            .close
            .split_at(tokens.close.len() - tokens.close.trim_start().len());
        match self.open.last_mut() {
            // The charge goes between the tag and its text, with the sign of the tag: `{% for a in b %}… -%}`.
            Some(block) if block.charge_at == Some(usize::MAX) => {
                self.out.push_str(space);
                self.out.push_str("%}");
                block.charge_at = Some(self.out.len());
                self.charges.push((self.out.len(), 0));
                self.out.push_str(end);
            }
            _ => self.out.push_str(tokens.close),
        }
        Ok(after)
    }

    /// Rewrites a statement and keeps account of the open blocks.
    fn statement(&mut self, tag: &TagTokens<'_>) -> Result<String, StatementRefusal> {
        let mut out = String::new();
        let mut tokens = Rewriter::new(&tag.tokens);
        let name = tokens.name(&mut out)?;
        match name {
            "for" => {
                assignment_targets(&mut tokens, &mut out)?;
                tokens.expect("in", &mut out)?;
                out.push_str(&tokens.unconditional()?);
                if tokens.skip("if", &mut out) {
                    out.push_str(&tokens.expression()?);
                }
                tokens.skip("recursive", &mut out);
                self.push(true)?;
            }
            "if" => {
                out.push_str(&tokens.unconditional()?);
                self.push(false)?;
            }
            "elif" => {
                out.push_str(&tokens.unconditional()?);
                self.branch()?;
            }
            "with" => {
                with(&mut tokens, &mut out)?;
                self.push(false)?;
            }
            "set" => {
                if set(&mut tokens, &mut out)? {
                    self.push(false)?;
                }
            }
            "filter" => {
                tokens.filter_chain(&mut out)?;
                self.push(false)?;
            }
            "macro" => {
                tokens.name(&mut out)?;
                out.push_str(&tokens.arguments()?);
                self.macros += 1;
                if self.macros > TEMPLATE_MACROS {
                    return Err(StatementRefusal::Macros);
                }
                self.push(true)?;
            }
            "call" => {
                if tokens.peeks("(") {
                    out.push_str(&tokens.arguments()?);
                }
                out.push_str(&tokens.expression()?);
                self.push(true)?;
            }
            "autoescape" => {
                out.push_str(&tokens.expression()?);
                self.push(false)?;
            }
            "do" => out.push_str(&tokens.expression()?),
            "block" => {
                while !tokens.is_at_end() {
                    tokens.take(&mut out)?;
                }
                self.push(false)?;
            }
            "include" | "import" | "from" | "extends" => {
                return Err(StatementRefusal::OtherTemplate);
            }
            name if name.starts_with("end") => {
                tokens = Rewriter::new(&[]);
                out = whole(tag);
                self.pop();
            }
            "else" | "continue" | "break" => {}
            _ => return Err(StatementRefusal::Expression(Refusal::Syntax)),
        }
        match tokens.is_at_end() {
            true => Ok(out),
            false => Err(StatementRefusal::Expression(Refusal::Syntax)),
        }
    }

    fn push(&mut self, repeats: bool) -> Result<(), StatementRefusal> {
        if self.open.len() >= TEMPLATE_BLOCKS {
            return Err(StatementRefusal::Blocks);
        }
        self.open.push(OpenBlock {
            branches: 0,
            charge_at: repeats.then_some(usize::MAX),
            text: 0,
        });
        Ok(())
    }

    fn branch(&mut self) -> Result<(), StatementRefusal> {
        if let Some(block) = self.open.last_mut() {
            block.branches += 1;
            if block.branches > TEMPLATE_CHAIN {
                return Err(StatementRefusal::Expression(Refusal::Chain));
            }
        }
        Ok(())
    }

    fn pop(&mut self) {
        if let Some(OpenBlock {
            charge_at: Some(at),
            text,
            ..
        }) = self.open.pop()
            && let Some((_, amount)) = self.charges.iter_mut().find(|(charge, _)| *charge == at)
        {
            *amount = text;
        }
    }

    /// Writes the charges to their positions: `{% do potstill_charge(120) -%}`.
    fn finish(self) -> String {
        let mut text = String::with_capacity(self.out.len());
        let mut from = 0;
        for (at, amount) in self.charges {
            text.push_str(self.out.get(from..at).unwrap_or_default());
            match amount > FREE_TEXT {
                true => text.push_str(&format!("{{% do potstill_charge({amount}) ")),
                // Without a charge, the tag ends as it did.
                false => text.truncate(text.len() - 2),
            }
            from = at;
        }
        text.push_str(self.out.get(from..).unwrap_or_default());
        text
    }
}

/// Why a statement was not rewritten.
enum StatementRefusal {
    Expression(Refusal),
    Blocks,
    Macros,
    OtherTemplate,
}

impl From<Refusal> for StatementRefusal {
    fn from(refusal: Refusal) -> Self {
        Self::Expression(refusal)
    }
}

fn explain(refusal: StatementRefusal) -> Option<String> {
    Some(match refusal {
        StatementRefusal::Expression(Refusal::Syntax) => return None,
        StatementRefusal::Expression(Refusal::Nesting) => {
            format!(
                "brackets, `not`, `-` and conditions are nested more than {TEMPLATE_NESTING} deep"
            )
        }
        StatementRefusal::Expression(Refusal::Chain) => {
            format!("more than {TEMPLATE_CHAIN} operators, filters or `elif` follow one another")
        }
        StatementRefusal::Blocks => {
            format!("blocks are nested more than {TEMPLATE_BLOCKS} deep")
        }
        StatementRefusal::Macros => format!("it has more than {TEMPLATE_MACROS} macros"),
        StatementRefusal::OtherTemplate => "a chat template cannot use another template".to_owned(),
    })
}

fn expression(tag: &TagTokens<'_>) -> Result<String, StatementRefusal> {
    let mut tokens = Rewriter::new(&tag.tokens);
    let text = tokens.expression()?;
    match tokens.is_at_end() {
        true => Ok(text),
        false => Err(StatementRefusal::Expression(Refusal::Syntax)),
    }
}

/// Returns a tag as it is written.
fn whole(tag: &TagTokens<'_>) -> String {
    let parts = tag
        .tokens
        .iter()
        .flat_map(|token| [token.space, token.text]);
    parts.collect()
}

/// Returns the length of a raw block that `tag` starts with, from `{% raw %}` to `{% endraw %}`.
fn raw_block(tag: &str) -> Option<usize> {
    let named = |text: &str, name: &str| -> Option<usize> {
        let inner = text.strip_prefix("{%")?;
        let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
        let inner = inner
            .trim_ascii_start()
            .strip_prefix(name)?
            .trim_ascii_start();
        let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
        Some(text.len() - inner.strip_prefix("%}")?.len())
    };
    let mut at = named(tag, "raw")?;
    loop {
        at += tag.get(at..)?.find("{%")?;
        if let Some(length) = named(tag.get(at..)?, "endraw") {
            return Some(at + length);
        }
        at += 2;
    }
}

/// Reads `a`, `a, b`, `(a, b), c` or `a.b`. Returns whether an attribute is among them.
fn assignment_targets(tokens: &mut Rewriter<'_, '_>, out: &mut String) -> Result<bool, Refusal> {
    let mut open = 0_usize;
    let mut attribute = false;
    loop {
        while tokens.skip("(", out) {
            open += 1;
        }
        tokens.name(out)?;
        while tokens.skip(".", out) {
            tokens.name(out)?;
            attribute = true;
        }
        while open > 0 && tokens.skip(")", out) {
            open -= 1;
        }
        if !tokens.skip(",", out) {
            return if open == 0 {
                Ok(attribute)
            } else {
                Err(Refusal::Syntax)
            };
        }
        if open == 0 && (tokens.peeks("in") || tokens.peeks("=") || tokens.is_at_end()) {
            return Ok(attribute);
        }
        if open > TEMPLATE_NESTING {
            return Err(Refusal::Nesting);
        }
    }
}

fn with(tokens: &mut Rewriter<'_, '_>, out: &mut String) -> Result<(), Refusal> {
    let mut first = true;
    while !tokens.is_at_end() {
        if !first {
            tokens.expect(",", out)?;
        }
        first = false;
        if tokens.skip("(", out) {
            assignment_targets(tokens, out)?;
            tokens.expect(")", out)?;
        } else {
            tokens.name(out)?;
        }
        tokens.expect("=", out)?;
        out.push_str(&tokens.expression()?);
    }
    Ok(())
}

/// Rewrites the rest of a `set` tag. Returns whether it opens a block.
fn set(tokens: &mut Rewriter<'_, '_>, out: &mut String) -> Result<bool, Refusal> {
    let attribute = assignment_targets(tokens, out)?;
    if tokens.is_at_end() {
        return Ok(true);
    }
    if tokens.skip("|", out) {
        tokens.filter_chain(out)?;
        return Ok(true);
    }
    tokens.expect("=", out)?;
    let mut value = tokens.expression()?;
    let mut count = 1;
    while tokens.skip(",", &mut value) {
        count += 1;
        if tokens.is_at_end() {
            break;
        }
        value.push_str(&tokens.expression()?);
    }
    match attribute || count > 1 {
        true => out.push_str(&format!("(({value})|potstill_box)")),
        false => out.push_str(&value),
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_plain_variables_stay_as_they_are() {
        for source in [
            "a {{ b }} {%- if c == 'd' and not e.f[0]['g'] -%} h {% endif %}{# {{ a ~ b }} #}",
            "{% for a, b in c.items() if b recursive %}{{ loop(a.b) }}{% else %}-{% endfor %}",
            "{% set a = 1 + 2 - b %}{% raw %}{{ a ~ b }}{% endraw %}{{ [1, 'a'] }}",
            "{% set a %}b{% endset %}{% filter upper|trim %}c{% endfilter %}",
            "{% macro a(b, c='d') %}{{ b }}{% endmacro %}{% call(x) a(1) %}e{% endcall %}",
            "{ {a} {{ a.b.c(1, *d, **e) if f else g|default('h') is not none }}",
        ] {
            assert_eq!(rewrite(source).as_deref(), Ok(source));
        }
    }

    #[test]
    fn operators_become_filters() {
        for (source, expected) in [
            ("{{ a ~ 'b' ~ c }}", "{{(( a)|potstill_concat( 'b', c)) }}"),
            ("{{a+b+1}}", "{{((a)|potstill_add(b))+1}}"),
            ("{{ a*b }}", "{{(( a)|potstill_multiply(b)) }}"),
            ("{{ a in b }}", "{{ a in(( b)|potstill_weigh) }}"),
            ("{{ 'a' in b }}", "{{ 'a' in(( b)|potstill_search) }}"),
            ("{{ a == b }}", "{{(( a)|potstill_weigh) == b }}"),
            ("{{ a[b] }}", "{{(( a)|potstill_index)[b] }}"),
            (
                "{{ a[1:] }}",
                "{{((( a)|potstill_index)[1:]|potstill_settle) }}",
            ),
            ("{{ [a] }}", "{{( [a]|potstill_box) }}"),
            ("{% set a.b = c %}", "{% set a.b =(( c)|potstill_box) %}"),
        ] {
            assert_eq!(rewrite(source).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn long_texts_in_loops_are_charged() {
        let text = "x".repeat(65);
        assert_eq!(
            rewrite(&format!("{{% for a in b -%}}{text}{{% endfor %}}")).unwrap(),
            format!("{{% for a in b %}}{{% do potstill_charge(65) -%}}{text}{{% endfor %}}")
        );
    }
}
