//! Values of the run file that have a range: parsing one outside it is an error of the
//! TOML parser, which then points at the value.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// What the JSON Schema says about a type of this file. It is written out where the type is used.
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

/// Declares a newtype over a number with a rule, the sentence said when it is broken, and the same
/// rule as JSON Schema.
macro_rules! range {
    ($(#[$doc:meta])* $name:ident($inner:ty), $rule:expr, $sentence:literal, $schema:tt) => {
        schema!($name, $schema);

        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
        #[serde(try_from = "f64", into = "f64")]
        pub struct $name($inner);

        impl $name {
            /// The number.
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl TryFrom<f64> for $name {
            type Error = String;

            fn try_from(value: f64) -> Result<Self, String> {
                let rule: fn(f64) -> bool = $rule;
                if rule(value) {
                    Ok(Self(value as $inner))
                } else {
                    Err(format!(concat!($sentence, ", not {}"), value))
                }
            }
        }

        impl From<$name> for f64 {
            fn from(value: $name) -> f64 {
                value.0 as f64
            }
        }
    };
}

fn whole(value: f64) -> bool {
    value.fract() == 0.0 && value <= 1e9
}

range!(
    /// A count of at least one.
    Count(usize), |v| whole(v) && v >= 1.0, "expected a whole number from 1 to 1e9",
    { "type": "integer", "minimum": 1, "maximum": 1_000_000_000 }
);
range!(
    /// A count that may be zero.
    CountOrZero(usize), |v| whole(v) && v >= 0.0, "expected a whole number from 0 to 1e9",
    { "type": "integer", "minimum": 0, "maximum": 1_000_000_000 }
);
range!(
    /// A count of at least one that may be very large, of bytes or of tokens.
    Amount(u64), |v| v.fract() == 0.0 && (1.0..=1e15).contains(&v),
    "expected a whole number from 1 to 1e15",
    { "type": "integer", "minimum": 1, "maximum": 1_000_000_000_000_000_u64 }
);
range!(
    /// A share that leaves something on both sides.
    Share(f64), |v| v > 0.0 && v < 1.0, "expected a share above 0 and below 1",
    { "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1 }
);
range!(
    /// A probability mass that is not empty.
    Mass(f64), |v| v > 0.0 && v <= 1.0, "expected a number above 0 and at most 1",
    { "type": "number", "exclusiveMinimum": 0, "maximum": 1 }
);
range!(
    /// A fraction that may be nothing or all.
    Fraction(f64), |v| (0.0..=1.0).contains(&v), "expected a number from 0 to 1",
    { "type": "number", "minimum": 0, "maximum": 1 }
);
range!(
    /// A finite number of at least zero.
    NonNegative(f64), |v| v >= 0.0 && v.is_finite(), "expected a number of at least 0",
    { "type": "number", "minimum": 0 }
);
range!(
    /// A finite number above zero.
    Positive(f64), |v| v > 0.0 && v.is_finite(), "expected a number above 0",
    { "type": "number", "exclusiveMinimum": 0 }
);

/// Name of a run, which names a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunName(String);

schema!(RunName, {
    "type": "string",
    "pattern": "^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$"
});

impl RunName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for RunName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(legal) {
            return Err(format!(
                "expected a name that can be a folder: up to 64 letters, digits, `-`, `_` and `.`, not starting with `.`; got {name:?}"
            ));
        }
        Ok(RunName(name))
    }
}

impl From<RunName> for String {
    fn from(name: RunName) -> String {
        name.0
    }
}

/// A path with every `${NAME}` replaced by the environment's value.
pub(crate) fn expand_path(path: &Path) -> Result<PathBuf, String> {
    expand(&path.to_string_lossy(), |name| std::env::var(name).ok()).map(PathBuf::from)
}

fn expand(written: &str, variable: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = written;
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, after)) = after.split_once('}') else {
            return Err(format!("`${{` is not closed by `}}` in {written:?}"));
        };
        let value = variable(name).filter(|value| !value.is_empty()).ok_or_else(|| {
            format!(
                "the environment variable {name} is not set: `export {name}=…` first, or write the path out"
            )
        })?;
        out.push_str(before);
        out.push_str(&value);
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_expanded_and_unset_ones_named() {
        let variable = |name: &str| (name == "A").then(|| "/data".to_owned());
        assert_eq!(expand("${A}/x/${A}", variable).unwrap(), "/data/x//data");
        assert_eq!(expand("plain$5", variable).unwrap(), "plain$5");
        insta::assert_snapshot!(
            expand("${B}/x", variable).unwrap_err(),
            @"the environment variable B is not set: `export B=…` first, or write the path out"
        );
        insta::assert_snapshot!(
            expand("${A/x", variable).unwrap_err(),
            @r#"`${` is not closed by `}` in "${A/x""#
        );
    }

    /// An editor that reads the schema and the parser agree at the edges.
    #[test]
    fn schemas_say_what_the_parser_does() {
        fn edges<T: JsonSchema + TryFrom<f64>>() {
            let schema = T::json_schema(&mut SchemaGenerator::default());
            let whole = schema.get("type").unwrap() == "integer";
            let fits = |value: f64| T::try_from(value).is_ok();
            let edge = |name| schema.get(name).and_then(serde_json::Value::as_f64);
            if let Some(least) = edge("minimum") {
                assert!(fits(least) && !fits(least - 1.0) && !fits(least - 1e-6));
            }
            if let Some(most) = edge("maximum") {
                assert!(fits(most) && !fits(most + 1.0));
            }
            if let Some(below) = edge("exclusiveMinimum") {
                assert!(!fits(below) && fits(below + 1e-6));
            }
            if let Some(above) = edge("exclusiveMaximum") {
                assert!(!fits(above) && fits(above - 1e-6));
            }
            assert_eq!(fits(0.5) || fits(1.5), !whole);
        }
        edges::<Count>();
        edges::<CountOrZero>();
        edges::<Amount>();
        edges::<Share>();
        edges::<Mass>();
        edges::<NonNegative>();
        edges::<Positive>();
    }

    #[test]
    fn ranges_hold_at_their_edges() {
        assert!(Count::try_from(0.0).is_err());
        assert!(Count::try_from(1.5).is_err());
        assert_eq!(Count::try_from(1.0).unwrap().get(), 1);
        assert_eq!(CountOrZero::try_from(0.0).unwrap().get(), 0);
        assert!(Share::try_from(0.0).is_err() && Share::try_from(1.0).is_err());
        assert!(Mass::try_from(1.0).is_ok() && Mass::try_from(f64::NAN).is_err());
        assert!(Fraction::try_from(0.0).is_ok() && Fraction::try_from(1.0).is_ok());
        assert!(Fraction::try_from(1.1).is_err() && Fraction::try_from(f64::NAN).is_err());
        assert!(Positive::try_from(f64::INFINITY).is_err());
        assert!(RunName::try_from("../x".to_owned()).is_err());
        assert!(RunName::try_from("gsm8k-v1.2".to_owned()).is_ok());
    }
}
