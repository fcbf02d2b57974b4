//! Numbers in the notations of people and models, compared exactly.
//!
//! A number is a fraction of two decimals of any length, stored as digits and not as floats, so that numbers of any
//! size are compared without rounding.

use std::fmt;

/// Largest exponent: `1e400` is a number, and the exponent of `1e99999` is text.
const MAX_EXPONENT: usize = 400;

/// A number ± numerator / denominator. Numbers are equal if their values are equal.
#[derive(Debug, Clone)]
pub(super) struct Number {
    negative: bool,
    numerator: Decimal,
    /// Denominator, not zero; `None` is 1.
    denominator: Option<Decimal>,
}

/// A decimal number, digits · 10^−places.
#[derive(Debug, Clone, Default)]
struct Decimal {
    digits: Vec<u8>,
    places: usize,
}

impl PartialEq for Number {
    fn eq(&self, other: &Self) -> bool {
        let one = Decimal::from_digits(vec![1], 0);
        let cross = |a: &Number, b: &Number| {
            let product = a.numerator.times(b.denominator.as_ref().unwrap_or(&one));
            product.canonical()
        };
        let (left, right) = (cross(self, other), cross(other, self));
        left == right && (self.negative == other.negative || left == "0")
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numerator = self.numerator.canonical();
        if self.negative && numerator != "0" {
            f.write_str("-")?;
        }
        f.write_str(&numerator)?;
        match &self.denominator {
            None => Ok(()),
            Some(denominator) => write!(f, "/{}", denominator.canonical()),
        }
    }
}

impl Decimal {
    fn from_digits(digits: Vec<u8>, places: usize) -> Decimal {
        Decimal { digits, places }
    }

    fn is_zero(&self) -> bool {
        self.digits.iter().all(|digit| *digit == 0)
    }

    fn times(&self, other: &Decimal) -> Decimal {
        // Computes column sums from the lowest digit up, and then the carries.
        let mut columns = vec![0u64; self.digits.len() + other.digits.len()];
        for (i, a) in self.digits.iter().rev().enumerate() {
            for (column, b) in columns.iter_mut().skip(i).zip(other.digits.iter().rev()) {
                *column += u64::from(*a) * u64::from(*b);
            }
        }
        let mut carry = 0;
        let mut digits: Vec<u8> = Vec::with_capacity(columns.len());
        for column in columns {
            let sum = column + carry;
            digits.push((sum % 10) as u8);
            carry = sum / 10;
        }
        digits.reverse();
        Decimal::from_digits(digits, self.places + other.places)
    }

    fn plus(&self, other: &Decimal) -> Decimal {
        let places = self.places.max(other.places);
        let aligned = |d: &Decimal| {
            let mut digits = d.digits.clone();
            digits.resize(digits.len() + places - d.places, 0);
            digits.reverse();
            digits
        };
        let (a, b) = (aligned(self), aligned(other));
        let mut carry = 0;
        let mut digits: Vec<u8> = (0..a.len().max(b.len()) + 1)
            .map(|i| {
                let at = |digits: &[u8]| digits.get(i).copied().unwrap_or(0);
                let sum = at(&a) + at(&b) + carry;
                carry = sum / 10;
                sum % 10
            })
            .collect();
        digits.reverse();
        Decimal::from_digits(digits, places)
    }

    /// Formats the number without redundant zeros: `1234.5`, `0.05`, `0`.
    fn canonical(&self) -> String {
        let mut text: String = self.digits.iter().map(|d| char::from(b'0' + d)).collect();
        if self.places > 0 {
            let missing = (self.places + 1).saturating_sub(text.len());
            text.insert_str(0, &"0".repeat(missing));
            text.insert(text.len() - self.places, '.');
            let kept = text.trim_end_matches('0').trim_end_matches('.').len();
            text.truncate(kept);
        }
        let text = text.trim_start_matches('0');
        match text.is_empty() || text.starts_with('.') {
            true => format!("0{text}"),
            false => text.to_owned(),
        }
    }
}

/// Returns the last number in `text`.
pub(super) fn last(text: &str) -> Option<Number> {
    let text = plain(text);
    let chars: Vec<char> = text.chars().collect();
    let mut last = None;
    let mut at = 0;
    while at < chars.len() {
        match number(&chars, at) {
            None => at += 1,
            Some((_, end)) if is_power(&chars, at) => at = end,
            Some((found, end)) => {
                last = Some(found);
                at = end;
            }
        }
    }
    last
}

/// Converts LaTeX separators, signs and fractions to plain text.
fn plain(text: &str) -> String {
    let text = text
        .replace("{,}", ",")
        .replace("\\!", "")
        .replace("\\$", "$")
        .replace("\\%", "%")
        .replace("\\dfrac", "\\frac")
        .replace("\\tfrac", "\\frac");
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(at) = rest.find("\\frac{") {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let inner = from.strip_prefix("\\frac{").and_then(|from| {
            let (top, from) = from.split_once("}{")?;
            let (bottom, from) = from.split_once('}')?;
            let number = |part: &str| !part.is_empty() && !part.contains(['{', '\\']);
            (number(top) && number(bottom)).then_some((top, bottom, from))
        });
        match inner {
            None => {
                out.push_str("\\frac{");
                rest = from.get(6..).unwrap_or_default();
            }
            Some((top, bottom, from)) => {
                if out.ends_with(|c: char| c.is_ascii_digit()) {
                    out.push(' ');
                }
                out.push_str(top.trim());
                out.push('/');
                out.push_str(bottom.trim());
                rest = from;
            }
        }
    }
    out + rest
}

/// Whether the number at `at` is an exponent, like the 2 of `cm^2`.
fn is_power(chars: &[char], at: usize) -> bool {
    let before = |n: usize| at.checked_sub(n).and_then(|i| chars.get(i));
    before(1) == Some(&'^') || (before(1) == Some(&'{') && before(2) == Some(&'^'))
}

/// Parses the number at `at`, with sign and currency; also returns its end.
fn number(chars: &[char], at: usize) -> Option<(Number, usize)> {
    let (negative, from) = sign(chars, at);
    let (whole, end) = decimal(chars, from)?;
    let is_integer = whole.places == 0;
    let done = |numerator, denominator, end| {
        let number = Number {
            negative,
            numerator,
            denominator,
        };
        Some((number, end))
    };
    if let Some((denominator, end)) = denominator(chars, end) {
        return done(whole, Some(denominator), end);
    }
    // A mixed number such as 1 1/2 is an integer, one space, and a fraction below 1.
    if is_integer
        && chars.get(end) == Some(&' ')
        && let Some((part, part_end)) = decimal(chars, end + 1)
        && let Some((denominator, fraction_end)) = denominator(chars, part_end)
        && less(&part, &denominator)
    {
        let numerator = whole.times(&denominator).plus(&part);
        return done(numerator, Some(denominator), fraction_end);
    }
    done(whole, None, end)
}

/// Whether a < b, for two integers.
fn less(a: &Decimal, b: &Decimal) -> bool {
    let (left, right) = (a.canonical(), b.canonical());
    a.places == 0 && b.places == 0 && (left.len(), &left) < (right.len(), &right)
}

/// Parses a sign and a currency in either order. A minus after a digit, a letter or a closing bracket is a subtraction
/// or a hyphen, as in `7-3` and `GPT-4`.
fn sign(chars: &[char], at: usize) -> (bool, usize) {
    let before = at.checked_sub(1).and_then(|i| chars.get(i));
    let joins = before.is_some_and(|c| c.is_alphanumeric() || matches!(c, ')' | ']' | '%'));
    let minus = |at: usize| matches!(chars.get(at), Some('-' | '\u{2212}' | '\u{2013}'));
    let currency = |at: usize| matches!(chars.get(at), Some('$' | '€' | '£' | '¥' | '₹'));
    let mut from = at;
    let mut negative = false;
    if minus(from) && !joins {
        (negative, from) = (true, from + 1);
    } else if chars.get(from) == Some(&'+') {
        from += 1;
    }
    if currency(from) {
        from += 1;
        if !negative && minus(from) {
            (negative, from) = (true, from + 1);
        }
    }
    (negative, from)
}

/// Parses the denominator after a `/` at `at`; `None` if it is zero.
fn denominator(chars: &[char], at: usize) -> Option<(Decimal, usize)> {
    chars.get(at).filter(|c| **c == '/')?;
    decimal(chars, at + 1).filter(|(denominator, _)| !denominator.is_zero())
}

/// Parses digits with thousands separators, a decimal point and an exponent from `at`.
fn decimal(chars: &[char], at: usize) -> Option<(Decimal, usize)> {
    let (mut digits, mut end) = grouped(chars, at);
    let mut places = 0;
    if chars.get(end) == Some(&'.') {
        let after = run(chars, end + 1);
        let in_a_number = at.checked_sub(1).and_then(|i| chars.get(i));
        let alone = digits.is_empty() && in_a_number.is_some_and(char::is_ascii_digit);
        if !after.is_empty() && !alone {
            places = after.len();
            end += 1 + after.len();
            digits.extend(after);
        }
    }
    if digits.is_empty() {
        return None;
    }
    match exponent(chars, end) {
        None => {}
        Some((true, by, after)) => (places, end) = (places + by, after),
        Some((false, by, after)) => {
            digits.resize(digits.len() + by.saturating_sub(places), 0);
            (places, end) = (places.saturating_sub(by), after);
        }
    }
    Some((Decimal::from_digits(digits, places), end))
}

/// Parses one to three digits followed by groups of exactly three digits, or any number of digits.
fn grouped(chars: &[char], at: usize) -> (Vec<u8>, usize) {
    let mut digits = run(chars, at);
    let mut end = at + digits.len();
    if (1..=3).contains(&digits.len()) {
        // Non-breaking spaces are thousands separators; a plain space separates numbers.
        while let Some(',' | '\u{a0}' | '\u{202f}' | '\u{2009}') = chars.get(end) {
            let group = run(chars, end + 1);
            if group.len() != 3 {
                break;
            }
            digits.extend(group);
            end += 4;
        }
    }
    (digits, end)
}

/// Parses `e`, a sign and digits; returns whether the exponent is negative, its absolute value, and its end.
fn exponent(chars: &[char], at: usize) -> Option<(bool, usize, usize)> {
    chars.get(at).filter(|c| matches!(c, 'e' | 'E'))?;
    let signed = matches!(chars.get(at + 1), Some('-' | '+'));
    let from = at + 1 + usize::from(signed);
    let digits = run(chars, from);
    let end = from + digits.len();
    if digits.is_empty() || digits.len() > 4 || chars.get(end).is_some_and(|c| c.is_alphabetic()) {
        return None;
    }
    let value = digits.iter().fold(0, |sum, d| 10 * sum + usize::from(*d));
    let negative = chars.get(at + 1) == Some(&'-');
    (value <= MAX_EXPONENT).then_some((negative, value, end))
}

fn run(chars: &[char], at: usize) -> Vec<u8> {
    let from = chars.get(at..).unwrap_or_default();
    from.iter()
        .map_while(|c| c.to_digit(10).map(|digit| digit as u8))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn reads(text: &str, expected: &str) {
        let found = last(text).map(|n| n.to_string());
        assert_eq!(found.as_deref(), Some(expected), "{text:?}");
    }

    #[track_caller]
    fn equal(a: &str, b: &str) {
        assert_eq!(last(a).unwrap(), last(b).unwrap());
    }

    #[test]
    fn separators_points_and_zeros() {
        for (text, expected) in [
            ("1,234,567.50", "1234567.5"),
            ("12,345", "12345"),
            ("1{,}000", "1000"),
            ("1\u{202f}000\u{202f}000", "1000000"),
            ("007", "7"),
            ("0.0500", "0.05"),
            (".5", "0.5"),
            ("-.5", "-0.5"),
            ("72.", "72"),
            ("It is 72.", "72"),
            ("-0", "0"),
            ("0.000", "0"),
            ("1e3", "1000"),
            ("1.25e1", "12.5"),
            ("12e-3", "0.012"),
            ("2.50E+2", "250"),
        ] {
            reads(text, expected);
        }
    }

    #[test]
    fn commas_between_numbers_separate_them() {
        reads("(1,2)", "2");
        reads("1,2345", "2345");
        reads("1234,567", "567");
        reads("1, 2, 300", "300");
        reads("1,00", "0");
        reads("1 000", "0");
    }

    #[test]
    fn signs_and_hyphens() {
        for (text, expected) in [
            ("-5", "-5"),
            ("+5", "5"),
            ("\u{2212}5", "-5"),
            ("= -5", "-5"),
            ("(-5)", "-5"),
            ("-$5.20", "-5.2"),
            ("$-5.20", "-5.2"),
            ("7-3", "3"),
            ("10 - 7", "7"),
            ("x-3", "3"),
            ("(2)-3", "3"),
            ("2024-01-05", "5"),
            ("- 5", "5"),
        ] {
            reads(text, expected);
        }
    }

    #[test]
    fn units_are_ignored() {
        equal("$1,000", "1000");
        equal("50%", "50");
        equal("50\\%", "50.0");
        equal("€3", "3");
        reads("5kg", "5");
        reads("USD500", "500");
        reads("20 cm^2", "20");
        reads("20 cm^{2}", "20");
        reads("2^10 = 1024", "1024");
    }

    #[test]
    fn fractions_equal_decimals() {
        equal("3/4", "0.75");
        equal("\\frac{3}{4}", "6/8");
        equal("-\\dfrac{3}{4}", "-0.75");
        equal("1 1/2", "1.5");
        equal("1\\frac{1}{2}", "3/2");
        equal("12/4", "3");
        equal("1.5/2", "0.75");
        assert_ne!(last("1/3"), last("0.3333333333333333"));
        assert_ne!(last("1/3"), last("-1/3"));
        reads("-6/8", "-6/8");
        reads("5/0", "0");
        reads("2 4/3", "4/3");
        reads("12 / 4 = 3", "3");
        reads("\\frac{\\sqrt{2}}{4}", "4");
        reads("\\frac{1", "1");
    }

    #[test]
    fn equality_is_exact_at_any_length() {
        assert_ne!(last("9007199254740993"), last("9007199254740992"));
        equal("0.1", "0.10");
        assert_ne!(last("0.30000000000000004"), last("0.3"));
        let long = "123456789".repeat(20);
        equal(&long, &format!("{long}.000"));
        assert_ne!(last(&long), last(&format!("{long}.001")));
        assert_ne!(last("5"), last("-5"));
        equal("0", "-0.0");
    }

    #[test]
    fn text_without_a_number_gives_none_and_nothing_panics() {
        for text in [
            "",
            "none",
            "-",
            "$",
            ".",
            "e",
            ",,,",
            "½",
            "\\frac{}{}",
            "^2",
        ] {
            assert!(last(text).is_none(), "{text:?}");
        }
        for text in [
            "1e99999", "1e", "1.2.3", "3/", "/3", "1,", "1 1/", "--5", "1e-400",
        ] {
            assert!(last(text).is_some(), "{text:?}");
        }
        equal("1e400", &format!("1{}", "0".repeat(400)));
    }
}
