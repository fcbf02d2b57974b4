//! The frequencies of rotary positions (Su et al. 2021) and their scalings, from `config.json`.
//!
//! ```text
//! f_i = θ^(−2i/r), i < r/2          angle of position p: p · f_i          cos and sin are multiplied by a
//! ```
//!
//! The scalings change f and the factor a: `linear`, `llama3` (Llama 3.1), `yarn` (Peng et al. 2023) and `longrope` (Ding
//! et al. 2024), each as in transformers' `modeling_rope_utils.py`, in f32. `dynamic` equals the unscaled form up to the
//! length of the context, and longer texts are refused anyway.

use serde_json::{Map, Value};

use crate::Error;
use crate::keys::Keys;
use crate::limits::ROTARY_COLUMNS;

/// Frequencies of the pairs that are rotated in each head.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RotaryTable {
    /// Base θ.
    pub(crate) theta: f64,
    /// Frequency of each pair, r/2 of them.
    pub(crate) frequencies: Vec<f32>,
    /// Frequencies of documents that are longer than a limit.
    pub(crate) long: Option<LongFrequencies>,
    /// Factor a on cosines and sines.
    pub(crate) factor: f32,
}

impl RotaryTable {
    /// Number of columns of a head that are rotated, r.
    pub(crate) fn width(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Returns what the scaling divides each frequency by.
    pub(crate) fn divisors(&self) -> Vec<f32> {
        let plain = unscaled(self.theta, self.width());
        (plain.iter().zip(&self.frequencies))
            .map(|(plain, scaled)| plain / scaled)
            .collect()
    }
}

/// Computes the frequencies of r rotated columns without scaling.
fn unscaled(theta: f64, width: usize) -> Vec<f32> {
    let theta = theta as f32;
    (0..width / 2)
        .map(|pair| 1.0 / theta.powf((2 * pair) as f32 / width as f32))
        .collect()
}

/// The second set of frequencies of `longrope`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LongFrequencies {
    /// Longest document, in tokens, that uses the first set.
    pub(crate) limit: usize,
    pub(crate) frequencies: Vec<f32>,
}

/// A rotary table of a configuration, and where its values are.
pub(crate) struct RotaryKeys<'a> {
    keys: &'a Keys<'a>,
    /// Key that the table is under, for errors.
    key: &'static str,
    table: Option<&'a Map<String, Value>>,
    /// Base θ if the table has none.
    theta: f64,
}

impl<'a> RotaryKeys<'a> {
    /// Finds the table of a configuration: `rope_parameters` (transformers 5), with an entry for each type of layer or
    /// not, or `rope_scaling`. θ is in the table, beside it as `rope_theta`, or the family's default.
    pub(crate) fn find(
        keys: &'a Keys<'a>,
        layer_type: &str,
        default_theta: f64,
    ) -> Result<Self, Error> {
        let table = |key: &'static str| match keys.get(key) {
            None => Ok(None),
            Some(Value::Object(table)) => Ok(Some(table)),
            Some(value) => Err(keys.wrong(key, format!("{value} is not a table"))),
        };
        let (parameters, scaling) = (table("rope_parameters")?, table("rope_scaling")?);
        let of_type = parameters.and_then(|table| table.get(layer_type));
        let parameters = of_type.and_then(Value::as_object).or(parameters);
        let (key, table) = match parameters {
            Some(_) => ("rope_parameters", parameters),
            None => ("rope_scaling", scaling),
        };
        let inside = table.and_then(|table| table.get("rope_theta"));
        let theta = match inside {
            Some(value) => keys.number_of("rope_theta", value)?,
            None => keys.number("rope_theta", default_theta)?,
        };
        let found = Self {
            keys,
            key,
            table,
            theta,
        };
        for name in ["rope_type", "type"] {
            if let Some(value) = found.value(name).filter(|value| !value.is_string()) {
                return Err(found.wrong(format!("{name} {value} must be a text")));
            }
        }
        Ok(found)
    }

    /// Takes `table` if the configuration has none.
    pub(crate) fn or(self, table: Option<&'a Map<String, Value>>) -> Self {
        Self {
            table: self.table.or(table),
            ..self
        }
    }

    /// Makes a table without scaling.
    pub(crate) fn unscaled(keys: &'a Keys<'a>, theta: f64) -> Self {
        Self {
            keys,
            key: "rope_parameters",
            table: None,
            theta,
        }
    }

    /// Returns the part of each head that is rotated, in columns.
    pub(crate) fn width(&self, head_dim: usize) -> Result<usize, Error> {
        let inside = self.value("partial_rotary_factor");
        let part = match inside.or(self.keys.get("partial_rotary_factor")) {
            Some(value) => self.keys.number_of("partial_rotary_factor", value)?,
            None => 1.0,
        };
        let width = (head_dim as f64 * part) as usize;
        if part > 1.0 || width == 0 || !width.is_multiple_of(2) {
            let why = format!(
                "rotary positions would rotate {width} of the {head_dim} columns of a head, \
                 but must rotate an even number of them"
            );
            return Err(self.keys.wrong("head_dim", why));
        }
        Ok(width)
    }

    /// Returns a number of the table, if it is there and not 0.
    pub(crate) fn number(&self, name: &str) -> Result<Option<f64>, Error> {
        match self.value(name) {
            None => Ok(None),
            Some(value) if value.as_f64() == Some(0.0) => Ok(None),
            Some(value) => match value.as_f64().filter(|number| *number > 0.0) {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong(format!("{name} {value} must be a number above 0"))),
            },
        }
    }

    /// Returns a flag of the table, if it is there.
    pub(crate) fn flag(&self, name: &str) -> Option<bool> {
        self.value(name).and_then(Value::as_bool)
    }

    /// Returns the name of the scaling. Earlier versions of transformers named this key `type`, later ones `rope_type`.
    /// Phi-3 has two earlier names of `longrope`.
    pub(crate) fn scaling(&self) -> &str {
        let name = self.value("rope_type").or(self.value("type"));
        match name.and_then(Value::as_str).unwrap_or("default") {
            "su" => "longrope",
            "yarn"
                if self
                    .keys
                    .get("model_type")
                    .is_some_and(|name| name == "phi3") =>
            {
                "longrope"
            }
            name => name,
        }
    }

    /// Computes the table for r rotated columns.
    pub(crate) fn table(&self, width: usize, context: usize) -> Result<RotaryTable, Error> {
        if width > ROTARY_COLUMNS {
            let why = format!(
                "rotary positions would rotate {width} columns of a head, and at most {ROTARY_COLUMNS} are supported"
            );
            return Err(self.keys.wrong("head_dim", why));
        }
        let frequencies = unscaled(self.theta, width);
        let plain = |frequencies| RotaryTable {
            theta: self.theta,
            frequencies,
            long: None,
            factor: 1.0,
        };
        match self.scaling() {
            "default" | "dynamic" => Ok(plain(frequencies)),
            "linear" => {
                let factor = self.required("factor")? as f32;
                Ok(plain(frequencies.iter().map(|f| f / factor).collect()))
            }
            "llama3" => Ok(plain(self.llama3(&frequencies)?)),
            "yarn" => self.yarn(&frequencies, context),
            "longrope" => self.longrope(&frequencies, context),
            other => Err(self.keys.unsupported(self.key, format!(
                "rope_type \"{other}\" is not supported, only \"default\", \"linear\", \"dynamic\", \"llama3\", \"yarn\" and \"longrope\""
            ))),
        }
    }

    fn llama3(&self, frequencies: &[f32]) -> Result<Vec<f32>, Error> {
        let [factor, low, high, original] = [
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ]
        .map(|name| self.required(name).map(|number| number as f32));
        let (factor, low, high, original) = (factor?, low?, high?, original?);
        let scaled = |f: &f32| {
            let wavelength = std::f32::consts::TAU / f;
            let share = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 - share) * f / factor + share * f
        };
        Ok(frequencies.iter().map(scaled).collect())
    }

    fn yarn(&self, frequencies: &[f32], context: usize) -> Result<RotaryTable, Error> {
        let original = self.original_context(context)?;
        let factor = (self.number("factor")?).unwrap_or(context as f64 / original);
        let width = 2 * frequencies.len();
        let column = |rotations: f64| {
            width as f64 * (original / (rotations * std::f64::consts::TAU)).ln()
                / (2.0 * self.theta.ln())
        };
        let mut low = column(self.number("beta_fast")?.unwrap_or(32.0));
        let mut high = column(self.number("beta_slow")?.unwrap_or(1.0));
        if self.flag("truncate") != Some(false) {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(width as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let scaled = |(pair, f): (usize, &f32)| {
            let ramp = ((pair as f32 - low as f32) / (high as f32 - low as f32)).clamp(0.0, 1.0);
            f / factor as f32 * ramp + f * (1.0 - ramp)
        };
        let magnitude = |scale| yarn_magnitude(factor, scale);
        let both = (self.number("mscale")?, self.number("mscale_all_dim")?);
        let attention = match (self.number("attention_factor")?, both) {
            (Some(given), _) => given,
            (None, (Some(scale), Some(all))) => magnitude(scale) / magnitude(all),
            _ => magnitude(1.0),
        };
        Ok(RotaryTable {
            theta: self.theta,
            frequencies: frequencies.iter().enumerate().map(scaled).collect(),
            long: None,
            factor: attention as f32,
        })
    }

    fn longrope(&self, frequencies: &[f32], context: usize) -> Result<RotaryTable, Error> {
        let original = self.original_context(context)?;
        let factor = (self.number("factor")?).unwrap_or(context as f64 / original);
        let attention = match self.number("attention_factor")? {
            Some(given) => given,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original.ln()).sqrt(),
        };
        let divided = |name| -> Result<Vec<f32>, Error> {
            let divisors = self.numbers(name, frequencies.len())?;
            Ok((frequencies.iter().zip(divisors))
                .map(|(f, divisor)| f / divisor)
                .collect())
        };
        Ok(RotaryTable {
            theta: self.theta,
            frequencies: divided("short_factor")?,
            long: Some(LongFrequencies {
                limit: original as usize,
                frequencies: divided("long_factor")?,
            }),
            factor: attention as f32,
        })
    }

    /// Returns the length that the model was first trained on. A key beside the table wins, as in transformers.
    pub(crate) fn original_context(&self, context: usize) -> Result<f64, Error> {
        let name = "original_max_position_embeddings";
        let found = match self.keys.optional_number(name)? {
            Some(outside) => Some(outside),
            None => self.number(name)?,
        };
        Ok(found.unwrap_or(context as f64))
    }

    pub(crate) fn numbers(&self, name: &str, count: usize) -> Result<Vec<f32>, Error> {
        let values = self.value(name).and_then(Value::as_array);
        let numbers: Option<Vec<f32>> = values.and_then(|values| {
            let number = |value: &Value| value.as_f64().filter(|v| *v > 0.0).map(|v| v as f32);
            values.iter().map(number).collect()
        });
        numbers
            .filter(|numbers| numbers.len() == count)
            .ok_or_else(|| self.wrong(format!("{name} must be a list of {count} numbers above 0")))
    }

    fn required(&self, name: &str) -> Result<f64, Error> {
        self.number(name)?
            .ok_or_else(|| self.wrong(format!("{name} is absent, must be a number above 0")))
    }

    fn value(&self, name: &str) -> Option<&Value> {
        let value = self.table.and_then(|table| table.get(name));
        value.filter(|value| !value.is_null())
    }

    fn wrong(&self, why: String) -> Error {
        self.keys.wrong(self.key, why)
    }
}

/// YaRN's g(m) = 0.1 · m · ln(factor) + 1, and 1 for a factor up to 1.
pub(crate) fn yarn_magnitude(factor: f64, scale: f64) -> f64 {
    if factor > 1.0 {
        0.1 * scale * factor.ln() + 1.0
    } else {
        1.0
    }
}
