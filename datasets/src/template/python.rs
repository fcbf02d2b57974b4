//! The parts of Python that chat templates use: the printed forms of values, `json.dumps`, and the methods of strings
//! that `minijinja_contrib::pycompat` lacks or counts in bytes.

use std::fmt::Write;

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// Returns Python's `str(value)`.
pub(super) fn str(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => repr(value),
    }
}

/// Returns Python's `repr(value)` for the values that occur in templates.
fn repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::None => "None".to_owned(),
        ValueKind::Undefined => "Undefined".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::Number => number(value),
        ValueKind::String => quote(value.as_str().unwrap_or_default()),
        // A loop, a namespace or a macro is an object with a printed form of its own.
        ValueKind::Seq => {
            let items: Vec<String> = value
                .try_iter()
                .into_iter()
                .flatten()
                .map(|item| repr(&item))
                .collect();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let items: Vec<String> = entries(value)
                .iter()
                .map(|(k, v)| format!("{}: {}", repr(k), repr(v)))
                .collect();
            format!("{{{}}}", items.join(", "))
        }
        _ => value.to_string(),
    }
}

fn entries(map: &Value) -> Vec<(Value, Value)> {
    let keys = map.try_iter().into_iter().flatten();
    keys.map(|key| (key.clone(), map.get_item(&key).unwrap_or_default()))
        .collect()
}

fn quote(text: &str) -> String {
    let mark = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::from(mark);
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
    out
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
        Some(count) => Some(" ".repeat(usize::try_from(count)?)),
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
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    Ok(out)
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
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(match number(value).as_str() {
                "nan" => "NaN",
                "inf" => "Infinity",
                "-inf" => "-Infinity",
                digits => digits,
            }),
            ValueKind::String => self.text(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(out, '[', &items, ']', depth, |out, item| {
                    self.write(out, item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut items = entries(value);
                if self.sort_keys {
                    items.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.list(out, '{', &items, '}', depth, |out, (key, value)| {
                    match key.as_str() {
                        Some(key) => self.text(out, key),
                        None => {
                            let mut name = String::new();
                            self.write(&mut name, key, depth)?;
                            self.text(out, &name);
                        }
                    }
                    out.push_str(self.key);
                    self.write(out, value, depth + 1)
                })?;
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("tojson: a value of type {kind} has no JSON form"),
                ));
            }
        }
        Ok(())
    }

    fn list<T>(
        &self,
        out: &mut String,
        open: char,
        items: &[T],
        close: char,
        depth: usize,
        mut write: impl FnMut(&mut String, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(self.item);
            }
            self.line(out, depth + 1);
            write(out, item)?;
        }
        if !items.is_empty() {
            self.line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    }

    fn text(&self, out: &mut String, text: &str) {
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
    let items = value.try_iter()?.map(|item| match attribute {
        Some(name) => item.get_attr(name).map(|part| str(&part)),
        None => Ok(str(&item)),
    });
    Ok(items.collect::<Result<Vec<_>, _>>()?.join(joiner))
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
        Some(text) if text.as_str().is_some() => str(&text),
        Some(count) => " ".repeat(usize::try_from(count)?),
    };
    let text = str(value).replace("\r\n", "\n");
    let mut out = String::new();
    for (number, line) in text.split(is_line_end).enumerate() {
        if number > 0 {
            out.push('\n');
        }
        if (number == 0 && first) || (number > 0 && (blank || !line.is_empty())) {
            out.push_str(&indentation);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// The characters at which Python's `str.splitlines` ends a line.
fn is_line_end(c: char) -> bool {
    matches!(
        c,
        '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
    )
}

/// Calls a method of Python's strings, or else a method that `pycompat` provides.
pub(super) fn method(
    state: &State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(text, name, args)
    {
        return result;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let one = || -> Result<&str, Error> { from_args::<(&str,)>(args).map(|(argument,)| argument) };
    let list = |parts: &[&str]| parts.iter().copied().map(Value::from).collect::<Value>();
    Some(match name {
        // pycompat counts bytes, but templates slice by characters.
        "find" => one().map(|part| Value::from(char_index(text, text.find(part)))),
        "rfind" => one().map(|part| Value::from(char_index(text, text.rfind(part)))),
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
