//! The account of the work that a rendering may do: bytes of text and values that it makes, copies or searches.
//!
//! minijinja's fuel bounds the number of instructions, and this account bounds what all of them may cost together. It
//! belongs to the thread, because a rendering does not leave its thread and filters have no other state of their own.

use std::cell::Cell;
use std::fmt;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

use crate::limits::TEMPLATE_VALUE_DEPTH;

/// The cost of an item of a list or dict in bytes.
pub(super) const ITEM: usize = 24;

thread_local! {
    static LEFT: Cell<u64> = const { Cell::new(0) };
}

/// The account of one rendering; the thread's earlier account comes back when it is dropped.
#[derive(Debug)]
pub(super) struct WorkAccount {
    earlier: u64,
}

impl WorkAccount {
    /// Opens an account of this many bytes.
    pub(super) fn open(bytes: u64) -> Self {
        Self {
            earlier: LEFT.replace(bytes),
        }
    }
}

impl Drop for WorkAccount {
    fn drop(&mut self) {
        LEFT.set(self.earlier);
    }
}

/// The limit that a rendering passed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct LimitPassed(pub(super) String);

/// Returns the error for a limit.
pub(super) fn passed(limit: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, limit.clone()).with_source(LimitPassed(limit))
}

fn exhausted() -> Error {
    passed("it makes or searches too many bytes of text and values for one conversation".to_owned())
}

/// Charges bytes to the rendering of this thread.
///
/// # Errors
/// The error for the limit if the account does not have so many.
pub(super) fn charge(bytes: usize) -> Result<(), Error> {
    let bytes = bytes as u64;
    match LEFT.get().checked_sub(bytes) {
        Some(left) => {
            LEFT.set(left);
            Ok(())
        }
        None => {
            LEFT.set(0);
            Err(exhausted())
        }
    }
}

/// A text that grows within the account.
#[derive(Debug, Default)]
pub(super) struct ChargedText {
    pub(super) text: String,
}

impl ChargedText {
    /// Appends a text.
    ///
    /// # Errors
    /// The error for the limit.
    pub(super) fn push(&mut self, text: &str) -> Result<(), Error> {
        charge(text.len())?;
        self.text.push_str(text);
        Ok(())
    }

    /// Appends what a value prints.
    ///
    /// # Errors
    /// The error for the limit.
    pub(super) fn print(&mut self, text: fmt::Arguments<'_>) -> Result<(), Error> {
        fmt::Write::write_fmt(self, text).map_err(|_| exhausted())
    }
}

impl fmt::Write for ChargedText {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // What is printed comes in small parts, which take longer than their bytes.
        charge(16)
            .and_then(|()| self.push(text))
            .map_err(|_| fmt::Error)
    }
}

/// Charges a value with all that it holds, and its texts if `texts` is set. Returns the bytes.
///
/// # Errors
/// The error for the limit; [`TEMPLATE_VALUE_DEPTH`]; a macro, a loop or a namespace within the value.
pub(super) fn weigh(value: &Value, texts: bool) -> Result<usize, Error> {
    weigh_within(value, texts, TEMPLATE_VALUE_DEPTH)
}

fn weigh_within(value: &Value, texts: bool, depth: usize) -> Result<usize, Error> {
    if let Some(text) = value.as_str() {
        let bytes = if texts { text.len() } else { 0 };
        return charge(bytes).map(|()| bytes);
    }
    let is_map = match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => false,
        ValueKind::Map => true,
        _ => return Ok(0),
    };
    if depth == 0 {
        return Err(passed(format!(
            "its lists and dicts are nested more than {TEMPLATE_VALUE_DEPTH} deep"
        )));
    }
    let mut bytes = 0;
    for item in value.try_iter()? {
        charge(ITEM)?;
        bytes += ITEM + weigh_within(&item, texts, depth - 1)?;
        if is_map {
            let held = value.get_item(&item).unwrap_or_default();
            bytes += weigh_within(&held, texts, depth - 1)?;
        }
    }
    Ok(bytes)
}

/// Checks a value that another one will hold: its depth, and that it is plain data. Macros, loops and namespaces could
/// hold one another without end.
///
/// # Errors
/// As for [`weigh`].
pub(super) fn check_held(value: &Value) -> Result<(), Error> {
    weigh_held(value, TEMPLATE_VALUE_DEPTH)
}

fn weigh_held(value: &Value, depth: usize) -> Result<(), Error> {
    let Some(object) = value.as_object() else {
        return Ok(());
    };
    let kind = value.kind();
    if !matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
        || object.type_name().ends_with("::Namespace")
        || object.type_name().starts_with("minijinja::vm::")
    {
        return Err(passed(
            "a list, a dict or a namespace cannot hold a macro, a loop or a namespace".to_owned(),
        ));
    }
    if depth == 0 {
        return Err(passed(format!(
            "its lists and dicts are nested more than {TEMPLATE_VALUE_DEPTH} deep"
        )));
    }
    for item in value.try_iter()? {
        charge(ITEM)?;
        match kind {
            ValueKind::Map => charge(3 * ITEM)
                .and_then(|()| weigh_held(&value.get_item(&item).unwrap_or_default(), depth - 1))?,
            _ => weigh_held(&item, depth - 1)?,
        }
    }
    Ok(())
}

/// Returns a list in place of a value that computes its items when they are asked for, so that no such values build upon
/// one another.
///
/// # Errors
/// The error for the limit.
pub(super) fn settle(value: Value) -> Result<Value, Error> {
    if value.kind() != ValueKind::Iterable {
        return Ok(value);
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        charge(ITEM)?;
        items.push(item);
    }
    Ok(Value::from(items))
}

/// Charges the text of a value, or its items without what they hold.
///
/// # Errors
/// The error for the limit.
pub(super) fn charge_shallow(value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => charge(text.len()),
        None if value.as_object().is_some() => charge(value.len().unwrap_or_default() * ITEM),
        None => Ok(()),
    }
}
