//! Typed access to the keys of a `config.json`. Errors name the file and the key.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use potstill_kernels::GateActivation;
use serde_json::{Map, Value};

use crate::Error;
use crate::limits::CONFIG_COUNT;

/// The keys of a configuration.
pub(crate) struct Keys<'a> {
    /// The file, for errors.
    pub(crate) path: &'a Path,
    pub(crate) object: &'a Map<String, Value>,
    /// Names of all keys that were asked for.
    asked: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(path: &'a Path, object: &'a Map<String, Value>) -> Self {
        Self {
            path,
            object,
            asked: RefCell::default(),
        }
    }

    /// Returns the names of the keys that were asked for.
    pub(crate) fn into_asked(self) -> BTreeSet<String> {
        self.asked.into_inner()
    }
}

impl Keys<'_> {
    /// Returns the value of a key; `null` counts as absent, as in transformers.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Reads a whole number above 0.
    pub(crate) fn count(&self, key: &'static str, default: Option<usize>) -> Result<usize, Error> {
        let Some(value) = self.get(key) else {
            return default.filter(|count| *count > 0).ok_or_else(|| {
                self.wrong(key, "absent, must be a whole number above 0".to_owned())
            });
        };
        self.count_of(key, value)
    }

    fn count_of(&self, key: &'static str, value: &Value) -> Result<usize, Error> {
        let count = value.as_u64().filter(|count| *count > 0);
        let count = count
            .ok_or_else(|| self.wrong(key, format!("{value} must be a whole number above 0")))?;
        usize::try_from(count)
            .ok()
            .filter(|_| count <= CONFIG_COUNT)
            .ok_or_else(|| {
                self.wrong(
                    key,
                    format!("{value} is larger than any model, {CONFIG_COUNT}"),
                )
            })
    }

    /// Reads a whole number that may be 0.
    pub(crate) fn index(&self, key: &'static str, default: usize) -> Result<usize, Error> {
        match self.get(key) {
            Some(value) if value.as_u64() == Some(0) => Ok(0),
            Some(value) => self.count_of(key, value),
            None => Ok(default),
        }
    }

    /// Reads a whole number above 0, if there is one.
    pub(crate) fn optional_count(&self, key: &'static str) -> Result<Option<usize>, Error> {
        self.get(key)
            .map(|value| self.count_of(key, value))
            .transpose()
    }

    /// Reads a number above 0.
    pub(crate) fn number(&self, key: &'static str, default: f64) -> Result<f64, Error> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    /// Reads a number above 0, if there is one.
    pub(crate) fn optional_number(&self, key: &'static str) -> Result<Option<f64>, Error> {
        self.get(key)
            .map(|value| self.number_of(key, value))
            .transpose()
    }

    /// Checks that a value is a number above 0.
    pub(crate) fn number_of(&self, key: &'static str, value: &Value) -> Result<f64, Error> {
        value
            .as_f64()
            .filter(|number| *number > 0.0 && number.is_finite())
            .ok_or_else(|| self.wrong(key, format!("{value} must be a number above 0")))
    }

    /// Reads true or false.
    pub(crate) fn flag(&self, key: &'static str, default: bool) -> Result<bool, Error> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.wrong(key, format!("{value} must be true or false"))),
        }
    }

    /// Reads one id or a list of at least one id; an absent key gives an empty list.
    pub(crate) fn token_ids(&self, key: &'static str) -> Result<Vec<u32>, Error> {
        let values = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) if values.is_empty() => {
                return Err(self.wrong(key, "[] names no token".to_owned()));
            }
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let read = |value: &Value| {
            id(value).ok_or_else(|| self.wrong(key, format!("{value} must be a token id")))
        };
        values.iter().map(read).collect()
    }

    /// Reads a list of indices; an absent key gives an empty list.
    pub(crate) fn indices(&self, key: &'static str) -> Result<Vec<usize>, Error> {
        let values = match self.get(key) {
            None => &[],
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => return Err(self.wrong(key, format!("{value} must be a list"))),
        };
        let index = |value: &Value| {
            let index = value.as_u64().and_then(|index| usize::try_from(index).ok());
            index.ok_or_else(|| self.wrong(key, format!("{value} must be the index of a layer")))
        };
        values.iter().map(index).collect()
    }

    /// Reads a list with one entry for each layer.
    pub(crate) fn per_layer(
        &self,
        key: &'static str,
        layers: usize,
    ) -> Result<Option<&[Value]>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) if values.len() == layers => Ok(Some(values)),
            Some(Value::Array(values)) => Err(self.wrong(
                key,
                format!(
                    "{} entries, but num_hidden_layers is {layers}",
                    values.len()
                ),
            )),
            Some(value) => Err(self.wrong(key, format!("{value} must be a list"))),
        }
    }

    /// Reads the activation of a gated feed-forward block.
    pub(crate) fn activation(
        &self,
        key: &'static str,
        default: &str,
    ) -> Result<GateActivation, Error> {
        let name = self.get(key).map_or(Some(default), Value::as_str);
        match name {
            Some("silu" | "swish") => Ok(GateActivation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(GateActivation::GeluTanh),
            _ => Err(self.unsupported(
                key,
                format!(
                    "{} is not supported, only \"silu\" and \"gelu_pytorch_tanh\"",
                    self.get(key).unwrap_or(&Value::Null)
                ),
            )),
        }
    }

    /// Checks that a key, if it is there, has one of some values. Other values would change the numbers.
    pub(crate) fn only(&self, key: &'static str, supported: &[Value]) -> Result<(), Error> {
        let same = |value: &Value, other: &Value| {
            value == other || value.as_f64().is_some_and(|v| other.as_f64() == Some(v))
        };
        match self.get(key) {
            Some(value) if !supported.iter().any(|other| same(value, other)) => {
                let supported: Vec<_> = supported.iter().map(Value::to_string).collect();
                let supported = supported.join(" or ");
                Err(self.unsupported(key, format!("{value} is not supported, only {supported}")))
            }
            _ => Ok(()),
        }
    }

    /// Makes an error about a value that makes no sense.
    pub(crate) fn wrong(&self, key: &'static str, why: String) -> Error {
        let hint = "compare the file with the one that was published with the model";
        self.error(key, format!("{why}\nhint: {hint}"))
    }

    /// Makes an error about a value that may be right, but is not supported.
    pub(crate) fn unsupported(&self, key: &'static str, why: String) -> Error {
        let hint =
            "use another model, or let a server run this one and name the server in [teacher]";
        self.error(key, format!("{why}\nhint: {hint}"))
    }

    /// Makes an error about a key from the whole message, hint included.
    pub(crate) fn error(&self, key: &'static str, why: String) -> Error {
        Error::Config {
            path: self.path.to_path_buf(),
            key,
            why,
        }
    }
}
