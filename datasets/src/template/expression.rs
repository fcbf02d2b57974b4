//! Rewrites expressions so that each operation that can take long or make large values is a filter of this crate.
//!
//! minijinja counts instructions, but one instruction may double a text, and sixty of them fill any memory. Its operators
//! cannot be replaced, but its filters can. So `a ~ b` becomes `((a)|potstill_concat(b))`, and the filter charges what it
//! makes to the account of the rendering (`work.rs`). The grammar is that of minijinja's parser; chains of `~` and `+` are
//! one call. Literals are left alone where they bound the work: `x == 'user'` and `i + 1` stay as they are.

use super::lexer::{Token, TokenKind};
use crate::limits::{TEMPLATE_CHAIN, TEMPLATE_NESTING};

/// Why an expression was not rewritten.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The expression breaks the grammar; minijinja says how.
    Syntax,
    /// Brackets, unary operators or conditional expressions are nested too deeply.
    Nesting,
    /// Too many operators, filters or attributes follow one another.
    Chain,
}

/// A part of an expression as it is written into the new source.
struct Operand {
    text: String,
    /// Whether the operand is a literal without variables.
    literal: bool,
    /// Whether the operand is the literal of a number.
    number: bool,
}

impl Operand {
    fn variable(text: String) -> Self {
        Self {
            text,
            literal: false,
            number: false,
        }
    }

    /// Returns the operand as the argument of a filter.
    fn through(self, filter: &str) -> Self {
        Self::variable(format!("(({})|{filter})", self.text))
    }

    /// Returns the operand, charged for a comparison with another operand unless that bounds the work.
    fn weighed(self, filter: &str, bounded: bool) -> Self {
        match bounded || self.literal {
            true => self,
            false => self.through(filter),
        }
    }
}

/// A reader of tokens that writes the expressions anew.
pub(super) struct Rewriter<'t, 's> {
    tokens: &'t [Token<'s>],
    at: usize,
    depth: usize,
}

type Rewritten = Result<Operand, Refusal>;

impl<'t, 's> Rewriter<'t, 's> {
    pub(super) fn new(tokens: &'t [Token<'s>]) -> Self {
        Self {
            tokens,
            at: 0,
            depth: 0,
        }
    }

    /// Returns whether all tokens are read.
    pub(super) fn is_at_end(&self) -> bool {
        self.at == self.tokens.len()
    }

    fn peek(&self) -> Option<&Token<'s>> {
        self.tokens.get(self.at)
    }

    pub(super) fn peeks(&self, text: &str) -> bool {
        self.peek()
            .is_some_and(|token| token.kind != TokenKind::Text && token.text == text)
    }

    /// Takes the next token if it is `text`, and writes it to `out`.
    pub(super) fn skip(&mut self, text: &str, out: &mut String) -> bool {
        let found = self.peeks(text);
        if found {
            // The token is there.
            let _ = self.take(out);
        }
        found
    }

    /// Takes a token and writes it to `out`.
    pub(super) fn take(&mut self, out: &mut String) -> Result<Token<'s>, Refusal> {
        let token = *self.peek().ok_or(Refusal::Syntax)?;
        self.at += 1;
        out.push_str(token.space);
        out.push_str(token.text);
        Ok(token)
    }

    pub(super) fn expect(&mut self, text: &str, out: &mut String) -> Result<(), Refusal> {
        match self.skip(text, out) {
            true => Ok(()),
            false => Err(Refusal::Syntax),
        }
    }

    pub(super) fn name(&mut self, out: &mut String) -> Result<&'s str, Refusal> {
        match self.take(out)? {
            Token {
                kind: TokenKind::Name,
                text,
                ..
            } => Ok(text),
            _ => Err(Refusal::Syntax),
        }
    }

    fn nested(&mut self, read: impl FnOnce(&mut Self) -> Rewritten) -> Rewritten {
        self.depth += 1;
        if self.depth > TEMPLATE_NESTING {
            return Err(Refusal::Nesting);
        }
        let operand = read(self);
        self.depth -= 1;
        operand
    }

    /// Rewrites an expression with its conditions (`a if b else c`).
    pub(super) fn expression(&mut self) -> Result<String, Refusal> {
        self.conditional().map(|operand| operand.text)
    }

    fn conditional(&mut self) -> Rewritten {
        self.nested(|this| {
            let mut operand = this.disjunction()?;
            let mut links = 0;
            while this.peeks("if") {
                links = link(links)?;
                let mut text = operand.text;
                this.take(&mut text)?;
                text.push_str(&this.disjunction()?.text);
                if this.skip("else", &mut text) {
                    text.push_str(&this.conditional()?.text);
                }
                operand = Operand::variable(text);
            }
            Ok(operand)
        })
    }

    /// Rewrites an expression without conditions.
    pub(super) fn unconditional(&mut self) -> Result<String, Refusal> {
        self.disjunction().map(|operand| operand.text)
    }

    fn disjunction(&mut self) -> Rewritten {
        self.chain(&["or"], |this| this.chain(&["and"], Self::negation))
    }

    /// Reads operands between operators that stay as they are.
    fn chain(&mut self, operators: &[&str], read: impl Fn(&mut Self) -> Rewritten) -> Rewritten {
        let mut operand = read(self)?;
        let mut links = 0;
        while operators.iter().any(|operator| self.peeks(operator)) {
            links = link(links)?;
            let mut text = operand.text;
            self.take(&mut text)?;
            text.push_str(&read(self)?.text);
            operand = Operand::variable(text);
        }
        Ok(operand)
    }

    fn negation(&mut self) -> Rewritten {
        if !self.peeks("not") {
            return self.comparison();
        }
        self.nested(|this| {
            let mut text = String::new();
            this.take(&mut text)?;
            text.push_str(&this.negation()?.text);
            Ok(Operand::variable(text))
        })
    }

    /// Comparisons are charged for the operands that they may have to read in full.
    fn comparison(&mut self) -> Rewritten {
        let mut operands = vec![self.sum()?];
        let mut operators: Vec<String> = Vec::new();
        loop {
            let mut operator = String::new();
            if self.skip("not", &mut operator) {
                self.expect("in", &mut operator)?;
            } else {
                let known = ["==", "!=", "<=", ">=", "<", ">", "in"];
                if !known.into_iter().any(|text| self.skip(text, &mut operator)) {
                    break;
                }
            }
            link(operators.len())?;
            operators.push(operator);
            operands.push(self.sum()?);
        }
        let single = operators.len() == 1;
        let bounded = single && operands.iter().any(|operand| operand.literal);
        let contains = single && operators.iter().any(|operator| operator.ends_with("in"));
        let count = operands.len();
        let mut operators = operators.into_iter();
        let mut text = String::new();
        for (i, operand) in operands.into_iter().enumerate() {
            let operand = match contains {
                // Only the container is searched; a literal is compared with its items, which bounds each comparison.
                true if i == 0 => operand,
                true if bounded => operand.weighed("potstill_search", false),
                true => operand.weighed("potstill_weigh", false),
                false if count == 1 => return Ok(operand),
                false => operand.weighed("potstill_weigh", bounded || (single && i > 0)),
            };
            text.push_str(&operand.text);
            text.push_str(&operators.next().unwrap_or_default());
        }
        Ok(Operand::variable(text))
    }

    /// `+` of numbers with a literal stays as it is. Other terms become `((a)|potstill_add(b, c))`.
    fn sum(&mut self) -> Rewritten {
        let mut sum = self.joined()?;
        let mut terms: Vec<Operand> = Vec::new();
        let mut links = 0;
        while self.peeks("+") || self.peeks("-") {
            links = link(links)?;
            let mut operator = String::new();
            let adds = self.take(&mut operator)?.text == "+";
            let term = self.joined()?;
            if adds && !term.number && !(sum.number && terms.is_empty()) {
                terms.push(term);
            } else {
                sum = call(sum, "potstill_add", std::mem::take(&mut terms));
                let number = sum.number && term.number;
                let text = format!("{}{operator}{}", sum.text, term.text);
                sum = Operand {
                    number,
                    ..Operand::variable(text)
                };
            }
        }
        Ok(call(sum, "potstill_add", terms))
    }

    fn joined(&mut self) -> Rewritten {
        let first = self.product()?;
        let mut parts = Vec::new();
        while self.skip("~", &mut String::new()) {
            link(parts.len())?;
            parts.push(self.product()?);
        }
        Ok(call(first, "potstill_concat", parts))
    }

    fn product(&mut self) -> Rewritten {
        let mut product = self.power()?;
        let mut links = 0;
        while ["*", "/", "//", "%"]
            .into_iter()
            .any(|operator| self.peeks(operator))
        {
            links = link(links)?;
            let mut operator = String::new();
            let multiplies = self.take(&mut operator)?.text == "*";
            let factor = self.power()?;
            product = match multiplies && !(product.number && factor.number) {
                true => call(product, "potstill_multiply", vec![factor]),
                false => Operand::variable(format!("{}{operator}{}", product.text, factor.text)),
            };
        }
        Ok(product)
    }

    fn power(&mut self) -> Rewritten {
        self.chain(&["**"], Self::filtered)
    }

    fn filtered(&mut self) -> Rewritten {
        let operand = self.signed()?;
        let operand = self.postfix(operand)?;
        self.filters(operand)
    }

    fn signed(&mut self) -> Rewritten {
        if !self.peeks("-") {
            return self.primary();
        }
        self.nested(|this| {
            let mut text = String::new();
            this.take(&mut text)?;
            let operand = this.signed()?;
            text.push_str(&operand.text);
            Ok(Operand { text, ..operand })
        })
    }

    fn primary(&mut self) -> Rewritten {
        let mut text = String::new();
        let token = self.take(&mut text)?;
        match (token.kind, token.text) {
            (TokenKind::Number, _) => Ok(Operand {
                text,
                literal: true,
                number: true,
            }),
            (TokenKind::Text, _) => {
                while self
                    .peek()
                    .is_some_and(|token| token.kind == TokenKind::Text)
                {
                    self.take(&mut text)?;
                }
                Ok(Operand {
                    text,
                    literal: true,
                    number: false,
                })
            }
            (TokenKind::Name, name) => {
                let constants = ["true", "True", "false", "False", "none", "None"];
                let literal = constants.contains(&name);
                Ok(Operand {
                    text,
                    literal,
                    number: false,
                })
            }
            (_, "(") => self.nested(|this| this.items(text, ")")),
            (_, "[") => self.nested(|this| this.items(text, "]")),
            (_, "{") => self.nested(|this| this.items(text, "}")),
            _ => Err(Refusal::Syntax),
        }
    }

    /// Reads a list, a tuple, a dict or an expression in parentheses after its opening bracket. Values that hold others
    /// are checked for their depth.
    fn items(&mut self, mut text: String, close: &str) -> Rewritten {
        let mut literal = true;
        let mut count = 0;
        let mut commas = 0;
        while !self.skip(close, &mut text) {
            if count > 0 {
                self.expect(",", &mut text)?;
                commas += 1;
                if self.skip(close, &mut text) {
                    break;
                }
            }
            let item = self.conditional()?;
            literal &= item.literal;
            text.push_str(&item.text);
            if close == "}" {
                self.expect(":", &mut text)?;
                let value = self.conditional()?;
                literal &= value.literal;
                text.push_str(&value.text);
            }
            count += 1;
        }
        let holds = close != ")" || commas > 0;
        Ok(match literal || !holds {
            true => Operand {
                text,
                literal: literal && count > 0,
                number: false,
            },
            false => Operand::variable(format!("({text}|potstill_box)")),
        })
    }

    /// Reads attributes, items, slices and calls.
    fn postfix(&mut self, mut operand: Operand) -> Rewritten {
        let mut links = 0;
        loop {
            if self.peeks(".") {
                let mut text = operand.text;
                self.take(&mut text)?;
                let attribute = self.take(&mut text)?;
                if !matches!(attribute.kind, TokenKind::Name | TokenKind::Number) {
                    return Err(Refusal::Syntax);
                }
                operand = Operand::variable(text);
            } else if self.peeks("[") {
                operand = self.nested(|this| this.subscript(operand))?;
            } else if self.peeks("(") {
                let mut text = operand.text;
                text.push_str(&self.arguments()?);
                operand = Operand::variable(text);
            } else {
                return Ok(operand);
            }
            links = link(links)?;
        }
    }

    fn subscript(&mut self, base: Operand) -> Rewritten {
        let mut inner = String::new();
        self.take(&mut inner)?;
        let mut parts = 0;
        let mut by_key = false;
        while !self.skip("]", &mut inner) {
            if self.skip(":", &mut inner) {
                parts += 1;
                continue;
            }
            let key = self.conditional()?;
            let written = key.text.trim();
            by_key =
                key.literal && (!key.number || (written.len() <= 2 && !written.starts_with('-')));
            inner.push_str(&key.text);
        }
        Ok(match parts {
            // A key, or one of the first items, is found at once.
            0 if by_key => Operand::variable(format!("{}{inner}", base.text)),
            0 => Operand::variable(format!("{}{inner}", base.through("potstill_index").text)),
            1 | 2 => {
                let slice = format!("{}{inner}", base.through("potstill_index").text);
                Operand::variable(format!("({slice}|potstill_settle)"))
            }
            _ => return Err(Refusal::Syntax),
        })
    }

    /// Reads the arguments of a call in parentheses.
    pub(super) fn arguments(&mut self) -> Result<String, Refusal> {
        let read = |this: &mut Self| {
            let mut text = String::new();
            this.expect("(", &mut text)?;
            let mut count = 0;
            while !this.skip(")", &mut text) {
                if count > 0 {
                    this.expect(",", &mut text)?;
                    if this.skip(")", &mut text) {
                        break;
                    }
                }
                let splat = this.skip("**", &mut text) || this.skip("*", &mut text);
                text.push_str(&this.expression()?);
                if !splat && this.skip("=", &mut text) {
                    text.push_str(&this.expression()?);
                }
                count += 1;
            }
            Ok(Operand::variable(text))
        };
        self.nested(read).map(|operand| operand.text)
    }

    fn filters(&mut self, mut operand: Operand) -> Rewritten {
        let mut links = 0;
        while self.peeks("|") || self.peeks("is") {
            links = link(links)?;
            let mut text = operand.text;
            let is_test = self.take(&mut text)?.text == "is";
            if is_test {
                self.skip("not", &mut text);
            }
            self.filter_call(&mut text)?;
            if is_test && self.test_has_bare_argument() {
                let argument = self.signed()?;
                let argument = self.postfix(argument)?;
                text.push_str(&format!("({})", argument.text));
            }
            operand = Operand::variable(text);
        }
        Ok(operand)
    }

    /// Reads the name of a filter or test, and its arguments in parentheses.
    fn filter_call(&mut self, text: &mut String) -> Result<(), Refusal> {
        self.name(text)?;
        while self.skip(".", text) {
            self.name(text)?;
        }
        if self.peeks("(") {
            text.push_str(&self.arguments()?);
        }
        Ok(())
    }

    /// Returns whether a test's argument follows without parentheses, as in `n is divisibleby 3`.
    fn test_has_bare_argument(&self) -> bool {
        let before = self.at.checked_sub(1).and_then(|at| self.tokens.get(at));
        if before.is_some_and(|token| token.text == ")" && token.kind == TokenKind::Symbol) {
            return false;
        }
        self.peek().is_some_and(|token| match token.kind {
            TokenKind::Name => !["and", "or", "else", "is"].contains(&token.text),
            TokenKind::Text | TokenKind::Number => true,
            TokenKind::Symbol => ["+", "-", "[", "{"].contains(&token.text),
        })
    }

    /// Reads a chain of filters without a value, as in `{% filter upper|trim %}`.
    pub(super) fn filter_chain(&mut self, text: &mut String) -> Result<(), Refusal> {
        let mut links = 0;
        self.filter_call(text)?;
        while self.skip("|", text) {
            links = link(links)?;
            self.filter_call(text)?;
        }
        Ok(())
    }
}

/// Counts one more operator of a chain.
fn link(links: usize) -> Result<usize, Refusal> {
    match links < TEMPLATE_CHAIN {
        true => Ok(links + 1),
        false => Err(Refusal::Chain),
    }
}

/// Returns `((first)|filter(second, …))`, or the first operand if there is no other.
fn call(first: Operand, filter: &str, others: Vec<Operand>) -> Operand {
    if others.is_empty() {
        return first;
    }
    let arguments: Vec<String> = others.into_iter().map(|operand| operand.text).collect();
    Operand::variable(format!(
        "(({})|{filter}({}))",
        first.text,
        arguments.join(",")
    ))
}
