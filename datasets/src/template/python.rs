//! The parts of Python that chat templates use: the printed forms of values, `json.dumps`, and the methods of strings
//! that `minijinja_contrib::pycompat` lacks or counts in bytes.

use std::fmt::Write;

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

use super::work::{ChargedText, ITEM, charge, charge_shallow, passed, settle, weigh};
use crate::limits::TEMPLATE_FORMAT_WIDTH;

/// Returns Python's `str(value)`.
///
/// # Errors
/// The error for the limit of the rendering's work.
pub(super) fn str(value: &Value) -> Result<String, Error> {
    let mut out = ChargedText::default();
    print(&mut out, value)?;
    Ok(out.text)
}

/// Appends Python's `str(value)`.
fn print(out: &mut ChargedText, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.push(text),
        None if value.is_undefined() => Ok(()),
        None => repr(out, value),
    }
}

/// Appends Python's `repr(value)` for the values that occur in templates.
fn repr(out: &mut ChargedText, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push("None"),
        ValueKind::Undefined => out.push("Undefined"),
        ValueKind::Bool => out.push(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push(&number(value)),
        ValueKind::String => quote(out, value.as_str().unwrap_or_default()),
        // A loop, a namespace or a macro is an object with a printed form of its own.
        ValueKind::Seq => {
            out.push("[")?;
            for (i, item) in value.try_iter().into_iter().flatten().enumerate() {
                out.push(if i > 0 { ", " } else { "" })?;
                repr(out, &item)?;
            }
            out.push("]")
        }
        ValueKind::Map => {
            out.push("{")?;
            for (i, (key, value)) in entries(value)?.iter().enumerate() {
                out.push(if i > 0 { ", " } else { "" })?;
                repr(out, key)?;
                out.push(": ")?;
                repr(out, value)?;
            }
            out.push("}")
        }
        _ => out.print(format_args!("{value}")),
    }
}

fn entries(map: &Value) -> Result<Vec<(Value, Value)>, Error> {
    let keys = map.try_iter().into_iter().flatten();
    keys.map(|key| {
        charge(ITEM)?;
        let value = map.get_item(&key).unwrap_or_default();
        Ok((key, value))
    })
    .collect()
}

fn quote(out: &mut ChargedText, text: &str) -> Result<(), Error> {
    let mark = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    // The longest form of a character, `\x00`, has four bytes.
    charge(text.len().saturating_mul(4))?;
    let out = &mut out.text;
    out.push(mark);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => out.extend(['\\', c]),
            c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(mark);
    Ok(())
}

/// Formats a number as Python does: integers in full, and floats as `float.__repr__` with the shortest digits that
/// parse to the same float, with an exponent below 1e-4 and from 1e16 on.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if !float.is_finite() {
        return if float.is_nan() {
            "nan"
        } else if float > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .to_owned();
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if float == 0.0 || (-4..16).contains(&exponent) {
        return format!("{float:?}");
    }
    format!(
        "{digits}e{}{:02}",
        if exponent < 0 { '-' } else { '+' },
        exponent.abs()
    )
}

/// The filter `tojson` of transformers: `json.dumps(x, ensure_ascii=False, indent=None, separators=None,
/// sort_keys=False)`. It does not escape for HTML.
pub(super) fn tojson(
    value: &Value,
    ascii: Option<Value>,
    indent: Option<Value>,
    rest: Kwargs,
) -> Result<String, Error> {
    let ascii = ascii
        .or(rest.get("ensure_ascii")?)
        .is_some_and(|flag| flag.is_true());
    let indent = indent
        .or(rest.get("indent")?)
        .filter(|indent| !indent.is_none());
    let separators: Option<Vec<String>> = rest.get("separators")?;
    let sort_keys = rest.get::<Option<bool>>("sort_keys")?.unwrap_or_default();
    rest.assert_all_used()?;
    let indent = match indent {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(count) => Some(spaces(usize::try_from(count)?)?),
    };
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators must be a pair",
            ));
        }
    };
    let style = JsonStyle {
        ascii,
        indent: indent.as_deref(),
        item,
        key,
        sort_keys,
    };
    let mut out = ChargedText::default();
    style.write(&mut out, value, 0)?;
    Ok(out.text)
}

/// Options of `json.dumps`.
struct JsonStyle<'a> {
    ascii: bool,
    indent: Option<&'a str>,
    item: &'a str,
    key: &'a str,
    sort_keys: bool,
}

impl JsonStyle<'_> {
    fn write(&self, out: &mut ChargedText, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push("null"),
            ValueKind::Bool => out.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push(match number(value).as_str() {
                "nan" => "NaN",
                "inf" => "Infinity",
                "-inf" => "-Infinity",
                digits => digits,
            }),
            ValueKind::String => self.text(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                charge(value.len().unwrap_or_default() * ITEM)?;
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(out, "[", &items, "]", depth, |out, item| {
                    self.write(out, item, depth + 1)
                })
            }
            ValueKind::Map => {
                let mut items = entries(value)?;
                if self.sort_keys {
                    items.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.list(out, "{", &items, "}", depth, |out, (key, value)| {
                    match key.as_str() {
                        Some(key) => self.text(out, key)?,
                        None => {
                            let mut name = ChargedText::default();
                            self.write(&mut name, key, depth)?;
                            self.text(out, &name.text)?;
                        }
                    }
                    out.push(self.key)?;
                    self.write(out, value, depth + 1)
                })
            }
            kind => Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("tojson: a value of type {kind} has no JSON form"),
            )),
        }
    }

    fn list<T>(
        &self,
        out: &mut ChargedText,
        open: &str,
        items: &[T],
        close: &str,
        depth: usize,
        mut write: impl FnMut(&mut ChargedText, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open)?;
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push(self.item)?;
            }
            self.line(out, depth + 1)?;
            write(out, item)?;
        }
        if !items.is_empty() {
            self.line(out, depth)?;
        }
        out.push(close)
    }

    fn line(&self, out: &mut ChargedText, depth: usize) -> Result<(), Error> {
        if let Some(indent) = self.indent {
            out.push("\n")?;
            for _ in 0..depth {
                out.push(indent)?;
            }
        }
        Ok(())
    }

    fn text(&self, out: &mut ChargedText, text: &str) -> Result<(), Error> {
        let is_escaped = |byte: &u8| *byte < b' ' || matches!(byte, b'"' | b'\\');
        // The longest form of a byte, `\u0000`, has six bytes.
        let longest = match self.ascii {
            true => text.len().saturating_mul(6),
            false => text.len() + 5 * text.bytes().filter(|byte| is_escaped(byte)).count(),
        };
        charge(longest)?;
        self.escape(&mut out.text, text);
        Ok(())
    }

    fn escape(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string does not fail.
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// Returns the white space of an indentation.
fn spaces(count: usize) -> Result<String, Error> {
    charge(count)?;
    Ok(" ".repeat(count))
}

/// The filter `join`, which converts each item to text as `str` does.
pub(super) fn join(
    value: &Value,
    joiner: Option<&str>,
    attribute: Option<&str>,
    rest: Kwargs,
) -> Result<String, Error> {
    let joiner = joiner.or(rest.get("d")?).unwrap_or_default();
    let attribute: Option<&str> = attribute.or(rest.get("attribute")?);
    rest.assert_all_used()?;
    let mut out = ChargedText::default();
    for (i, item) in value.try_iter()?.enumerate() {
        if i > 0 {
            out.push(joiner)?;
        }
        // An item may print nothing.
        charge(1)?;
        match attribute {
            Some(name) => print(&mut out, &item.get_attr(name)?)?,
            None => print(&mut out, &item)?,
        }
    }
    Ok(out.text)
}

/// The filter `indent`: puts the indentation in front of each line but the first and empty ones. A line feed at the end
/// stays.
pub(super) fn indent(
    value: &Value,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    rest: Kwargs,
) -> Result<String, Error> {
    let width = width.or(rest.get("width")?);
    let first = first.or(rest.get("first")?).unwrap_or_default();
    let blank = blank.or(rest.get("blank")?).unwrap_or_default();
    rest.assert_all_used()?;
    let indentation = match width {
        None => " ".repeat(4),
        Some(text) if text.as_str().is_some() => str(&text)?,
        Some(count) => spaces(usize::try_from(count)?)?,
    };
    let text = str(value)?.replace("\r\n", "\n");
    let mut out = ChargedText::default();
    for (number, line) in text.split(is_line_end).enumerate() {
        if number > 0 {
            out.push("\n")?;
        }
        if (number == 0 && first) || (number > 0 && (blank || !line.is_empty())) {
            out.push(&indentation)?;
        }
        out.push(line)?;
    }
    Ok(out.text)
}

/// The characters at which Python's `str.splitlines` ends a line.
fn is_line_end(c: char) -> bool {
    matches!(
        c,
        '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
    )
}

/// Calls a method of Python's strings, or else a method that `pycompat` provides. The result is charged like that of a
/// filter.
pub(super) fn method(
    state: &State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    for argument in std::iter::once(value).chain(args) {
        charge_shallow(argument)?;
    }
    let Some(text) = value.as_str() else {
        if name == "count" {
            weigh(value, true)?;
        }
        let result =
            minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)?;
        return settle(result);
    };
    // The largest factor between a byte of the text and what is made of it.
    let factor = match name {
        "split" | "rsplit" | "splitlines" | "partition" | "rpartition" => ITEM + 8,
        "upper" | "lower" | "title" | "capitalize" => 3,
        "strip" | "lstrip" | "rstrip" => args
            .first()
            .and_then(|characters| characters.as_str())
            .map_or(1, str::len),
        "startswith" | "endswith" => {
            args.first()
                .map_or(Ok(0), |argument| weigh(argument, true))?;
            0
        }
        "format" => {
            check_format(text, args)?;
            1
        }
        _ => 0,
    };
    charge(text.len().saturating_mul(factor))?;
    match string_method(text, name, args) {
        Some(result) => result,
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Charges the widths in a format, and refuses a large one.
pub(super) fn check_format(format: &str, arguments: &[Value]) -> Result<(), Error> {
    let too_wide = || {
        passed(format!(
            "a width or precision in a format is over {TEMPLATE_FORMAT_WIDTH}"
        ))
    };
    for number in format
        .split(|c: char| !c.is_ascii_digit())
        .filter(|run| !run.is_empty())
    {
        let width = number.parse::<u64>().unwrap_or(u64::MAX);
        if width > TEMPLATE_FORMAT_WIDTH {
            return Err(too_wide());
        }
        charge(usize::try_from(width).unwrap_or(usize::MAX))?;
    }
    // `%*d` takes the width from the arguments.
    if format.contains('*') {
        for width in arguments
            .iter()
            .filter_map(|value| i128::try_from(value.clone()).ok())
        {
            if width.unsigned_abs() > u128::from(TEMPLATE_FORMAT_WIDTH) {
                return Err(too_wide());
            }
        }
        charge(format.len() * usize::try_from(TEMPLATE_FORMAT_WIDTH).unwrap_or(usize::MAX))?;
    }
    // A field may print an argument more than once.
    let fields = format.matches(['%', '{']).count() + 1;
    for argument in arguments {
        let printed = weigh(argument, true)?;
        charge(printed.saturating_mul(fields))?;
    }
    Ok(())
}

/// Replaces the first `limit` occurrences.
pub(super) fn replace(text: &str, from: &str, to: &str, limit: usize) -> Result<Value, Error> {
    charge(text.len())?;
    let found = text.matches(from).take(limit).count();
    charge(text.len().saturating_add(found.saturating_mul(to.len())))?;
    Ok(Value::from(text.replacen(from, to, limit)))
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let one = || -> Result<&str, Error> { from_args::<(&str,)>(args).map(|(argument,)| argument) };
    let list = |parts: &[&str]| parts.iter().copied().map(Value::from).collect::<Value>();
    Some(match name {
        // pycompat counts bytes, but templates slice by characters.
        "find" => one().map(|part| Value::from(char_index(text, text.find(part)))),
        "rfind" => one().map(|part| Value::from(char_index(text, text.rfind(part)))),
        "replace" => from_args::<(&str, &str, Option<i64>)>(args).and_then(|(from, to, count)| {
            let limit = count.and_then(|count| usize::try_from(count).ok());
            replace(text, from, to, limit.unwrap_or(usize::MAX))
        }),
        "count" => one().map(|part| Value::from(text.matches(part).count())),
        "join" => from_args::<(&Value,)>(args).and_then(|(items,)| {
            let mut out = ChargedText::default();
            for (i, item) in items.try_iter()?.enumerate() {
                charge(1)?;
                if i > 0 {
                    out.push(text)?;
                }
                out.print(format_args!("{item}"))?;
            }
            Ok(Value::from(out.text))
        }),
        "removeprefix" => {
            one().map(|prefix| Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            one().map(|suffix| Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "partition" => one().map(|separator| match text.split_once(separator) {
            Some((before, after)) => list(&[before, separator, after]),
            None => list(&[text, "", ""]),
        }),
        "rpartition" => one().map(|separator| match text.rsplit_once(separator) {
            Some((before, after)) => list(&[before, separator, after]),
            None => list(&["", "", text]),
        }),
        "rsplit" => from_args::<(&str, Option<i64>)>(args).map(|(separator, splits)| {
            let limit = splits
                .and_then(|n| usize::try_from(n).ok())
                .map_or(usize::MAX, |n| n.saturating_add(1));
            let mut parts: Vec<&str> = text.rsplitn(limit, separator).collect();
            parts.reverse();
            list(&parts)
        }),
        _ => return None,
    })
}

fn char_index(text: &str, byte: Option<usize>) -> i64 {
    byte.and_then(|byte| text.get(..byte))
        .map_or(-1, |before| before.chars().count() as i64)
}

/// The test `sequence`, which is true for values with a length and items by index. In Python these include strings and
/// dicts.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Seq | ValueKind::Map | ValueKind::String
    )
}

/// The test `iterable`. In minijinja `none` can be iterated over too.
pub(super) fn is_iterable(value: &Value) -> bool {
    value.as_str().is_some() || (!value.is_none() && value.try_iter().is_ok())
}
