//! Ranges of settings: what the run file's parser accepts, and the same as JSON Schema.
//!
//! A setting is a plain number or text in a plain struct; a range is named in the field's attribute:
//!
//! ```
//! use potstill_datasets::range::{Count, Optional};
//! use schemars::JsonSchema;
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize, JsonSchema)]
//! struct Settings {
//!     /// Optimizer steps.
//!     #[serde(with = "Count")]
//!     steps: u64,
//!     /// Number of most likely tokens to sample from.
//!     #[serde(with = "Optional::<Count>", default)]
//!     top_k: Option<usize>,
//! }
//!
//! let error = serde_json::from_str::<Settings>(r#"{"steps": 0}"#).err().unwrap();
//! assert!(error.to_string().starts_with("0 is out of range\nhint: set a whole number from 1 to 1e9"));
//! ```
//!
//! The parser reports the error at the value. Numbers are serialised as floating-point numbers
//! (`64.0`), because keys of published stages were made that way.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Number types that a setting may have.
pub trait Number: Copy {
    /// Converts a number that is in the setting's range.
    fn from_f64(value: f64) -> Self;
    /// The number as it is serialised.
    fn to_f64(self) -> f64;
}

macro_rules! number {
    ($($type:ty),*) => {$(
        impl Number for $type {
            fn from_f64(value: f64) -> Self {
                value as $type
            }

            fn to_f64(self) -> f64 {
                self as f64
            }
        }
    )*};
}

number!(u32, u64, usize, f64);

/// Durations are written in seconds.
impl Number for Duration {
    /// Durations above 30 years become 30 years: a longer one would overflow the clock.
    fn from_f64(value: f64) -> Self {
        Duration::from_secs_f64(value.min(1e9))
    }

    fn to_f64(self) -> f64 {
        self.as_secs_f64()
    }
}

/// A set of numbers that a setting may have.
pub trait Range: JsonSchema {
    /// Checks a number.
    ///
    /// # Errors
    /// The number, and on a line of its own the range as a hint.
    fn check(value: f64) -> Result<f64, String>;
}

/// Implements [`JsonSchema`] by a schema that is written out where the type is used.
macro_rules! schema {
    ($name:ident, $schema:tt) => {
        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

/// Declares a range: its rule, the rule in words, and the rule as JSON Schema.
macro_rules! range {
    ($(#[$doc:meta])* $name:ident, $rule:expr, $words:literal, $schema:tt) => {
        schema!($name, $schema);

        $(#[$doc])*
        #[derive(Debug)]
        pub enum $name {}

        impl Range for $name {
            fn check(value: f64) -> Result<f64, String> {
                let rule: fn(f64) -> bool = $rule;
                match rule(value) {
                    true => Ok(value),
                    false => Err(format!(concat!("{} is out of range\nhint: set ", $words), value)),
                }
            }
        }

        impl $name {
            /// Serialises a setting of this range, for `#[serde(with = …)]`.
            ///
            /// # Errors
            /// The serializer's own.
            pub fn serialize<N: Number, S: Serializer>(value: &N, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_f64(value.to_f64())
            }

            /// Reads a setting of this range, for `#[serde(with = …)]`.
            ///
            /// # Errors
            /// A value that is not a number or not in the range.
            pub fn deserialize<'de, N: Number, D: Deserializer<'de>>(from: D) -> Result<N, D::Error> {
                read::<Self, N, D>(from)
            }
        }
    };
}

fn read<'de, R: Range, N: Number, D: Deserializer<'de>>(from: D) -> Result<N, D::Error> {
    let value = R::check(f64::deserialize(from)?).map_err(D::Error::custom)?;
    Ok(N::from_f64(value))
}

fn is_whole(value: f64) -> bool {
    value.fract() == 0.0 && value <= 1e9
}

range!(
    /// Counts of at least one.
    Count, |v| is_whole(v) && v >= 1.0, "a whole number from 1 to 1e9",
    { "type": "integer", "minimum": 1, "maximum": 1_000_000_000 }
);
range!(
    /// Counts that may be zero.
    CountOrZero, |v| is_whole(v) && v >= 0.0, "a whole number from 0 to 1e9",
    { "type": "integer", "minimum": 0, "maximum": 1_000_000_000 }
);
range!(
    /// Counts of at least one that may be very large, such as bytes or tokens.
    Amount, |v| v.fract() == 0.0 && (1.0..=1e15).contains(&v),
    "a whole number from 1 to 1e15",
    { "type": "integer", "minimum": 1, "maximum": 1_000_000_000_000_000_u64 }
);
range!(
    /// Shares that leave something on both sides.
    Share, |v| v > 0.0 && v < 1.0, "a share above 0 and below 1",
    { "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1 }
);
range!(
    /// Shares that may be zero and leave something on the other side.
    ShareOrZero, |v| (0.0..1.0).contains(&v), "a share of at least 0 and below 1",
    { "type": "number", "minimum": 0, "exclusiveMaximum": 1 }
);
range!(
    /// Probability masses above zero.
    Mass, |v| v > 0.0 && v <= 1.0, "a number above 0 and at most 1",
    { "type": "number", "exclusiveMinimum": 0, "maximum": 1 }
);
range!(
    /// Fractions from zero to one, both included.
    Fraction, |v| (0.0..=1.0).contains(&v), "a number from 0 to 1",
    { "type": "number", "minimum": 0, "maximum": 1 }
);
range!(
    /// Shares below 1, or whole numbers: what a count of steps may be given as.
    ShareOrCount, |v| (0.0..1.0).contains(&v) || is_whole(v) && v >= 1.0,
    "a share below 1, or a whole number up to 1e9",
    { "type": "number", "minimum": 0, "maximum": 1_000_000_000 }
);
range!(
    /// Finite numbers of at least zero.
    NonNegative, |v| v >= 0.0 && v.is_finite(), "a number of at least 0",
    { "type": "number", "minimum": 0 }
);
range!(
    /// Finite numbers above zero.
    Positive, |v| v > 0.0 && v.is_finite(), "a number above 0",
    { "type": "number", "exclusiveMinimum": 0 }
);

/// A number of the range `R`, or none where the key is absent.
#[derive(Debug)]
pub struct Optional<R>(PhantomData<R>);

impl<R: Range> Optional<R> {
    /// Serialises a setting of this range, for `#[serde(with = …)]`.
    ///
    /// # Errors
    /// The serializer's own.
    pub fn serialize<N: Number, S: Serializer>(
        value: &Option<N>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        value.map(N::to_f64).serialize(to)
    }

    /// Reads a setting of this range, for `#[serde(with = …)]`.
    ///
    /// # Errors
    /// A value that is not a number or not in the range.
    pub fn deserialize<'de, N: Number, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<N>, D::Error> {
        let value = Option::<f64>::deserialize(from)?;
        let value = value.map(R::check).transpose();
        Ok(value.map_err(D::Error::custom)?.map(N::from_f64))
    }
}

impl<R: Range> JsonSchema for Optional<R> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        R::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        R::json_schema(generator)
    }
}

/// A list of numbers of the range `R`.
#[derive(Debug)]
pub struct Each<R>(PhantomData<R>);

impl<R: Range> Each<R> {
    /// Serialises a setting of this range, for `#[serde(with = …)]`.
    ///
    /// # Errors
    /// The serializer's own.
    pub fn serialize<N: Number, S: Serializer>(values: &[N], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(|value| value.to_f64()))
    }

    /// Reads a setting of this range, for `#[serde(with = …)]`.
    ///
    /// # Errors
    /// A value that is not a list of numbers, or a number that is not in the range.
    pub fn deserialize<'de, N: Number, D: Deserializer<'de>>(from: D) -> Result<Vec<N>, D::Error> {
        let values = Vec::<f64>::deserialize(from)?.into_iter().map(R::check);
        let values: Result<Vec<f64>, String> = values.collect();
        let values = values.map_err(D::Error::custom)?;
        Ok(values.into_iter().map(N::from_f64).collect())
    }
}

impl<R: Range> JsonSchema for Each<R> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("EachOf{}", R::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let items = R::json_schema(generator);
        json_schema!({ "type": "array", "items": items })
    }
}

/// A path that is not empty. The run file's loader replaces `${NAME}` in it by the environment's
/// value, and takes a relative one to be below the run file's folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FilePath {
    path: PathBuf,
    /// The path before it was taken to be below a folder: it may also be the name of a repository.
    written: String,
}

schema!(FilePath, { "type": "string", "minLength": 1 });

impl FilePath {
    /// The path.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        &self.path
    }

    /// The path as it was written, with variables replaced.
    #[must_use]
    pub fn written(&self) -> &str {
        &self.written
    }

    /// The written path `path`, which is taken to be below `base` if it is relative.
    #[must_use]
    pub fn below(base: &Path, path: &Path) -> FilePath {
        FilePath {
            path: base.join(path),
            written: path.to_string_lossy().into_owned(),
        }
    }
}

impl AsRef<Path> for FilePath {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

impl TryFrom<String> for FilePath {
    type Error = &'static str;

    fn try_from(path: String) -> Result<Self, &'static str> {
        match path.is_empty() {
            true => Err("the path is empty\nhint: set the path of a file or folder"),
            false => Ok(PathBuf::from(path).into()),
        }
    }
}

impl From<PathBuf> for FilePath {
    fn from(path: PathBuf) -> FilePath {
        FilePath::below(Path::new(""), &path)
    }
}

impl From<FilePath> for String {
    fn from(path: FilePath) -> String {
        path.path.to_string_lossy().into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An editor that reads the schema and the parser agree at the bounds.
    #[test]
    fn the_schema_and_the_parser_agree_at_the_bounds() {
        fn bounds<R: Range>() {
            let schema = R::json_schema(&mut SchemaGenerator::default());
            let is_whole = schema.get("type").unwrap() == "integer";
            let fits = |value: f64| R::check(value).is_ok();
            let bound = |name| schema.get(name).and_then(serde_json::Value::as_f64);
            if let Some(least) = bound("minimum") {
                assert!(fits(least) && !fits(least - 1.0) && !fits(least - 1e-6));
            }
            if let Some(most) = bound("maximum") {
                assert!(fits(most) && !fits(most + 1.0));
            }
            if let Some(below) = bound("exclusiveMinimum") {
                assert!(!fits(below) && fits(below + 1e-6));
            }
            if let Some(above) = bound("exclusiveMaximum") {
                assert!(!fits(above) && fits(above - 1e-6));
            }
            assert_eq!(fits(0.5) || fits(1.5), !is_whole);
        }
        bounds::<Count>();
        bounds::<CountOrZero>();
        bounds::<Amount>();
        bounds::<Share>();
        bounds::<Mass>();
        bounds::<Fraction>();
        bounds::<ShareOrCount>();
        bounds::<NonNegative>();
        bounds::<Positive>();
    }

    #[test]
    fn not_a_number_and_infinity_are_out_of_every_range() {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(Count::check(value).is_err() && CountOrZero::check(value).is_err());
            assert!(Amount::check(value).is_err() && Share::check(value).is_err());
            assert!(Mass::check(value).is_err() && Fraction::check(value).is_err());
            assert!(ShareOrCount::check(value).is_err());
            assert!(NonNegative::check(value).is_err() && Positive::check(value).is_err());
        }
    }

    #[test]
    fn settings_are_read_and_written_as_numbers() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Settings {
            #[serde(with = "Count")]
            steps: u64,
            #[serde(with = "Optional::<Mass>", default)]
            top_p: Option<f64>,
            #[serde(with = "Each::<Positive>", default)]
            temperatures: Vec<f64>,
            #[serde(with = "Positive")]
            timeout: Duration,
        }
        let text = r#"{"steps":3.0,"top_p":0.5,"temperatures":[2.0],"timeout":1.5}"#;
        let settings: Settings = serde_json::from_str(text).unwrap();
        assert_eq!(settings.timeout, Duration::from_millis(1500));
        assert_eq!(serde_json::to_string(&settings).unwrap(), text);
        let absent: Settings = serde_json::from_str(r#"{"steps":3,"timeout":1}"#).unwrap();
        assert_eq!((absent.top_p, absent.temperatures), (None, Vec::new()));
        let wrong = r#"{"steps":3,"timeout":1,"temperatures":[1,0]}"#;
        let error = serde_json::from_str::<Settings>(wrong).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("0 is out of range\nhint: set a number above 0"),
            "{error}"
        );
    }

    #[test]
    fn a_path_is_not_empty() {
        assert!(FilePath::try_from(String::new()).is_err());
        let path = FilePath::try_from("models/tiny".to_owned()).unwrap();
        assert_eq!(path.as_path(), Path::new("models/tiny"));
        assert_eq!(String::from(path), "models/tiny");
    }
}
