//! The filters, functions and tests of templates, bounded by the account of the rendering.
//!
//! [`super::expression`] writes the filters `potstill_…` in place of operators. Each filter of minijinja whose work or
//! result can be large is registered anew with a charge in front.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters, functions, tests};

use super::python;
use super::work::{ChargedText, ITEM, charge, charge_shallow, check_held, settle, weigh};

/// The second charge of a filter: the bytes of texts, and [`ITEM`] for each item of its arguments.
#[derive(Clone, Copy)]
enum Charge {
    /// Nothing else.
    Once,
    /// As often as this, since the result can be that much longer.
    Times(usize),
    /// All that the arguments hold, as often as a sort compares it.
    Sort,
    /// For each item of the number in the second argument.
    Count,
    /// The characters to strip, for each byte.
    Strip,
    /// The widths in the format.
    Format,
}

/// Registers everything.
pub(super) fn register(environment: &mut Environment<'static>) {
    operators(environment);
    python_filters(environment);
    text_filters(environment);
    list_filters(environment);
    comparisons(environment);
    environment.remove_global("debug");
    environment.add_function("range", range);
    environment.add_function("dict", |value: Option<Value>, rest: Kwargs| {
        let dict = functions::dict(value, rest)?;
        check_held(&dict).map(|()| dict)
    });
    environment.add_function("namespace", |values: Option<Value>| {
        values.as_ref().map_or(Ok(()), check_held)?;
        functions::namespace(values)
    });
    environment.add_function("potstill_charge", |bytes: usize| charge(bytes));
}

fn operators(environment: &mut Environment<'static>) {
    environment.add_filter("potstill_concat", |first: &Value, rest: Rest<Value>| {
        let mut out = ChargedText::default();
        for value in std::iter::once(first).chain(rest.iter()) {
            match value.as_str() {
                Some(text) => out.push(text)?,
                None => out.print(format_args!("{value}"))?,
            }
        }
        Ok::<_, Error>(out.text)
    });
    environment.add_filter("potstill_add", add);
    environment.add_filter("potstill_multiply", multiply);
    environment.add_filter("potstill_weigh", |value: Value| {
        weigh(&value, true).map(|_| value)
    });
    environment.add_filter("potstill_search", |value: Value| {
        charge_shallow(&value).map(|()| value)
    });
    environment.add_filter("potstill_index", |value: Value| {
        charge(value.as_str().map_or(0, str::len)).map(|()| value)
    });
    environment.add_filter("potstill_settle", settle);
    environment.add_filter("potstill_box", |value: Value| {
        check_held(&value).map(|()| value)
    });
}

fn python_filters(environment: &mut Environment<'static>) {
    environment.add_filter("tojson", python::tojson);
    environment.add_filter("string", python::str);
    environment.add_filter("join", python::join);
    environment.add_filter("indent", python::indent);
    environment.add_filter("replace", |text: &Value, from: &Value, to: &Value| {
        let [text, from, to] = [python::str(text)?, python::str(from)?, python::str(to)?];
        python::replace(&text, &from, &to, usize::MAX)
    });
    environment.add_filter("upper", |value: &Value| {
        let text = python::str(value)?;
        charge(text.len() * 2)?;
        Ok::<_, Error>(text.to_uppercase())
    });
    environment.add_filter("lower", |value: &Value| {
        let text = python::str(value)?;
        charge(text.len() * 2)?;
        Ok::<_, Error>(text.to_lowercase())
    });
    environment.add_filter("pprint", |value: &Value| {
        let mut out = ChargedText::default();
        out.print(format_args!("{value:#?}")).map(|()| out.text)
    });
}

fn text_filters(environment: &mut Environment<'static>) {
    for name in ["escape", "e"] {
        bound(
            environment,
            name,
            Charge::Times(6),
            Value::from_function(filters::escape),
        );
    }
    for (name, charge, filter) in [
        ("safe", Charge::Once, Value::from_function(filters::safe)),
        (
            "title",
            Charge::Times(3),
            Value::from_function(filters::title),
        ),
        (
            "capitalize",
            Charge::Times(3),
            Value::from_function(filters::capitalize),
        ),
        ("trim", Charge::Strip, Value::from_function(filters::trim)),
        // The items are small texts, each with a place in a list.
        (
            "split",
            Charge::Times(ITEM + 8),
            Value::from_function(filters::split),
        ),
        (
            "lines",
            Charge::Times(ITEM + 8),
            Value::from_function(filters::lines),
        ),
        ("int", Charge::Once, Value::from_function(filters::int)),
        ("float", Charge::Once, Value::from_function(filters::float)),
        (
            "format",
            Charge::Format,
            Value::from_function(filters::format),
        ),
    ] {
        bound(environment, name, charge, filter);
    }
}

fn list_filters(environment: &mut Environment<'static>) {
    for (name, charge, filter) in [
        ("last", Charge::Once, Value::from_function(filters::last)),
        (
            "list",
            Charge::Times(ITEM),
            Value::from_function(filters::list),
        ),
        ("items", Charge::Once, Value::from_function(filters::items)),
        (
            "reverse",
            Charge::Once,
            Value::from_function(filters::reverse),
        ),
        ("sum", Charge::Once, Value::from_function(filters::sum)),
        (
            "select",
            Charge::Times(ITEM),
            Value::from_function(filters::select),
        ),
        (
            "reject",
            Charge::Times(ITEM),
            Value::from_function(filters::reject),
        ),
        (
            "selectattr",
            Charge::Once,
            Value::from_function(filters::selectattr),
        ),
        (
            "rejectattr",
            Charge::Once,
            Value::from_function(filters::rejectattr),
        ),
        (
            "map",
            Charge::Times(ITEM),
            Value::from_function(filters::map),
        ),
        (
            "chain",
            Charge::Times(ITEM),
            Value::from_function(filters::chain),
        ),
        (
            "zip",
            Charge::Times(ITEM),
            Value::from_function(filters::zip),
        ),
        ("batch", Charge::Count, Value::from_function(filters::batch)),
        ("slice", Charge::Count, Value::from_function(filters::slice)),
        ("min", Charge::Sort, Value::from_function(filters::min)),
        ("max", Charge::Sort, Value::from_function(filters::max)),
        ("sort", Charge::Sort, Value::from_function(filters::sort)),
        (
            "unique",
            Charge::Sort,
            Value::from_function(filters::unique),
        ),
        (
            "groupby",
            Charge::Sort,
            Value::from_function(filters::groupby),
        ),
        (
            "dictsort",
            Charge::Sort,
            Value::from_function(filters::dictsort),
        ),
    ] {
        bound(environment, name, charge, filter);
    }
}

/// Registers a filter with a charge in front of it and a check of the list that it returns.
fn bound(environment: &mut Environment<'static>, name: &'static str, rate: Charge, filter: Value) {
    environment.add_filter(name, move |state: &State, arguments: Rest<Value>| {
        for argument in arguments.iter() {
            charge_shallow(argument)?;
        }
        charge_for(rate, &arguments)?;
        let result = settle(filter.call(state, &arguments)?)?;
        let nests = ["batch", "slice", "groupby", "items", "dictsort", "zip"];
        if nests.contains(&name) {
            check_held(&result)?;
        }
        Ok::<_, Error>(result)
    });
}

fn charge_for(rate: Charge, arguments: &[Value]) -> Result<(), Error> {
    let bytes = |value: &Value| value.as_str().map_or(0, str::len);
    let first = arguments.first().map_or(0, bytes);
    let second = arguments.get(1);
    match rate {
        Charge::Once => Ok(()),
        Charge::Times(factor) => charge(first.saturating_mul(factor)),
        Charge::Sort => {
            let held: usize = arguments
                .iter()
                .map(|argument| weigh(argument, true))
                .sum::<Result<_, _>>()?;
            let items = arguments.first().and_then(Value::len).unwrap_or(1);
            let comparisons = usize::try_from(items.max(1).ilog2()).unwrap_or_default() + 1;
            charge((held + first * ITEM).saturating_mul(comparisons))
        }
        Charge::Count => {
            let count = second.and_then(Value::as_usize).unwrap_or_default();
            // A slice is a list of its own, also if it is empty.
            charge((first + count.saturating_mul(4)).saturating_mul(ITEM))
        }
        Charge::Strip => charge(first.saturating_mul(second.map_or(1, bytes).max(1))),
        Charge::Format => {
            let format = arguments
                .first()
                .and_then(|value| value.as_str())
                .unwrap_or_default();
            python::check_format(format, arguments.get(1..).unwrap_or_default())
        }
    }
}

fn comparisons(environment: &mut Environment<'static>) {
    for (names, compare) in [
        (
            &["eq", "equalto", "=="][..],
            tests::is_eq as fn(&Value, &Value) -> bool,
        ),
        (&["ne", "!="], tests::is_ne),
        (&["lt", "lessthan", "<"], tests::is_lt),
        (&["le", "<="], tests::is_le),
        (&["gt", "greaterthan", ">"], tests::is_gt),
        (&["ge", ">="], tests::is_ge),
    ] {
        for &name in names {
            environment.add_test(name, move |value: &Value, other: &Value| {
                if value.as_object().is_some() || value.as_str().is_some() {
                    weigh(other, true)?;
                }
                Ok::<_, Error>(compare(value, other))
            });
        }
    }
    environment.add_test("in", |state: &State, value: &Value, other: &Value| {
        weigh(other, true)?;
        tests::is_in(state, value, other)
    });
    for (name, is_cased) in [
        ("lower", tests::is_lower as fn(&str) -> bool),
        ("upper", tests::is_upper),
    ] {
        environment.add_test(name, move |text: &str| {
            charge(text.len()).map(|()| is_cased(text))
        });
    }
    environment.add_test("sequence", python::is_sequence);
    environment.add_test("iterable", python::is_iterable);
}

/// The function `range`, as a list.
fn range(first: i64, end: Option<i64>, step: Option<i64>) -> Result<Value, Error> {
    let (start, end) = end.map_or((0, first), |end| (first, end));
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "cannot create range with step of 0",
        ));
    }
    let mut items = Vec::new();
    let mut item = start;
    while (step > 0 && item < end) || (step < 0 && item > end) {
        charge(ITEM)?;
        items.push(Value::from(item));
        match item.checked_add(step) {
            Some(next) => item = next,
            None => break,
        }
    }
    Ok(Value::from(items))
}

/// `a + b + …`, from left to right.
fn add(first: Value, rest: Rest<Value>) -> Result<Value, Error> {
    let mut terms = rest.0.into_iter().peekable();
    let mut sum = first;
    while let Some(term) = terms.next() {
        if let (Some(left), Some(right)) = (sum.as_str(), term.as_str()) {
            // One text for all texts that follow one another.
            let mut out = ChargedText::default();
            out.push(left)?;
            out.push(right)?;
            while let Some(next) = terms.peek().and_then(|next| next.as_str()) {
                out.push(next)?;
                terms.next();
            }
            sum = Value::from(out.text);
        } else if is_list(&sum) && is_list(&term) {
            charge((sum.len().unwrap_or_default() + term.len().unwrap_or_default()) * ITEM)?;
            let items: Vec<Value> = sum.try_iter()?.chain(term.try_iter()?).collect();
            sum = Value::from(items);
        } else {
            sum = arithmetic('+', &sum, &term, i128::checked_add, |a, b| a + b)?;
        }
    }
    Ok(sum)
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

/// `a * b`.
fn multiply(left: Value, right: Value) -> Result<Value, Error> {
    let repeats = |value: &Value| value.as_str().is_some() || is_list(value);
    let (repeated, count) = match (repeats(&left), repeats(&right)) {
        (true, _) => (&left, &right),
        (_, true) => (&right, &left),
        _ => return arithmetic('*', &left, &right, i128::checked_mul, |a, b| a * b),
    };
    let count = count.as_usize().ok_or_else(|| {
        let what = if is_list(repeated) {
            "sequences and iterables"
        } else {
            "strings"
        };
        let problem = format!("{what} can only be multiplied with integers");
        Error::new(ErrorKind::InvalidOperation, problem)
    })?;
    if let Some(text) = repeated.as_str() {
        charge(text.len().saturating_mul(count))?;
        return Ok(Value::from(text.repeat(count)));
    }
    let length = repeated.len().unwrap_or_default();
    charge(length.saturating_mul(count).saturating_mul(ITEM))?;
    let items: Vec<Value> = repeated.try_iter()?.collect();
    Ok(Value::from(
        std::iter::repeat_n(items, count)
            .flatten()
            .collect::<Vec<Value>>(),
    ))
}

/// Computes as minijinja does: whole numbers (and truth values) in 128 bits, anything else as floats.
fn arithmetic(
    operator: char,
    left: &Value,
    right: &Value,
    integers: fn(i128, i128) -> Option<i128>,
    floats: fn(f64, f64) -> f64,
) -> Result<Value, Error> {
    let is_float = |value: &Value| value.kind() == ValueKind::Number && !value.is_integer();
    let integer = |value: &Value| i128::try_from(value.clone()).ok();
    let float = |value: &Value| match is_float(value) {
        true => f64::try_from(value.clone()).ok(),
        false => integer(value).map(|integer| integer as f64),
    };
    let result = if is_float(left) || is_float(right) {
        float(left)
            .zip(float(right))
            .map(|(a, b)| Value::from(floats(a, b)))
    } else if let Some((a, b)) = integer(left).zip(integer(right)) {
        let result = integers(a, b).ok_or_else(|| {
            let problem = format!("unable to calculate {left} {operator} {right}");
            Error::new(ErrorKind::InvalidOperation, problem)
        })?;
        Some(i64::try_from(result).map_or_else(|_| Value::from(result), Value::from))
    } else {
        None
    };
    result.ok_or_else(|| {
        let (left, right) = (left.kind(), right.kind());
        let problem =
            format!("tried to use {operator} operator on unsupported types {left} and {right}");
        Error::new(ErrorKind::InvalidOperation, problem)
    })
}
