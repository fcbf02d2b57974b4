//! Parsing of one JSON value, in which no object may have a key twice.

use std::fmt;

use serde::de::{
    Deserialize as _, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Number, Value};

use crate::limits::ROW_JSON_DEPTH;

/// Position and reason of an error in the text of a value.
pub(super) struct JsonProblem {
    /// Line in the text, from 1.
    pub(super) line: usize,
    /// Column in the line, from 1.
    pub(super) column: usize,
    pub(super) why: String,
    /// Whether the text ends before the value does.
    pub(super) is_cut_off: bool,
}

/// Parses a text that is one JSON value.
pub(super) fn parse(text: &str) -> Result<Value, JsonProblem> {
    let mut parser = serde_json::Deserializer::from_str(text);
    let value = UniqueKeys.deserialize(&mut parser);
    let found = value.and_then(|value| parser.end().map(|()| value));
    found.map_err(|error| {
        let message = error.to_string();
        // The parser appends its position, which counts from the start of the text.
        let end = message.rfind(" at line ").unwrap_or(message.len());
        let why = match message.get(..end).unwrap_or_default() {
            "recursion limit exceeded" => {
                format!("it is nested deeper than {ROW_JSON_DEPTH} brackets")
            }
            why => why.to_owned(),
        };
        JsonProblem {
            line: error.line(),
            column: error.column(),
            why,
            is_cut_off: error.is_eof(),
        }
    })
}

/// Reads a value, and refuses an object that has a key twice: each of the two values would be right.
struct UniqueKeys;

impl<'de> DeserializeSeed<'de> for UniqueKeys {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = items.next_element_seed(UniqueKeys)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = entries.next_key_seed(Key)? {
            if fields.contains_key(&key) {
                let key = key.chars().take(60).collect::<String>();
                return Err(A::Error::custom(format!("the key `{key}` occurs twice")));
            }
            fields.insert(key, entries.next_value_seed(UniqueKeys)?);
        }
        Ok(Value::Object(fields))
    }
}

struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<String, D::Error> {
        String::deserialize(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_serde_json() {
        for text in [
            r#"{"a": [1, -2, 3.5, 1e3, true, null, "x\n\u0000"], "b": {"c": {}}, "d": 18446744073709551615}"#,
            "[]",
            "4.50",
            "\"é\"",
        ] {
            let expected: Value = serde_json::from_str(text).unwrap();
            assert_eq!(parse(text).ok(), Some(expected), "{text}");
        }
    }

    #[test]
    fn a_key_that_occurs_twice_is_refused_at_any_depth() {
        for text in [r#"{"a": 1, "a": 1}"#, r#"[{"b": {"a": 1, "\u0061": 2}}]"#] {
            assert_eq!(parse(text).err().unwrap().why, "the key `a` occurs twice");
        }
    }

    #[test]
    fn nesting_and_numbers_have_limits() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert!(parse(&nested(ROW_JSON_DEPTH)).is_ok());
        let why = parse(&nested(ROW_JSON_DEPTH + 1)).err().unwrap().why;
        assert_eq!(why, "it is nested deeper than 127 brackets");
        assert_eq!(
            parse(&"[".repeat(1_000_000)).err().unwrap().why,
            "it is nested deeper than 127 brackets"
        );
        let why = parse(&"9".repeat(1_000_000)).err().unwrap().why;
        assert_eq!(why, "number out of range");
    }
}
