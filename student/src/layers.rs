//! The choice of layers of a pruned student.

use std::borrow::Cow;
use std::fmt;

use potstill_datasets::range::{Count, CountOrZero, Each, Optional};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// `layers` of `[student]`: the layers of a checkpoint that a pruned student keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Layers {
    /// These layers, counted from 0.
    List(Vec<usize>),
    /// Layers 0, n, 2n, ….
    Every {
        /// The n.
        every: usize,
    },
    /// Layers of both ends of the checkpoint.
    Ends {
        /// Number of layers at the start.
        first: usize,
        /// Number of layers at the end.
        last: usize,
    },
}

/// `layers` of `[student]` as a table.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct LayerTable {
    /// Keeps layers 0, n, 2n, ….
    #[serde(with = "Optional::<Count>", default)]
    every: Option<usize>,
    /// Number of layers to keep at the start, together with `last`.
    #[serde(with = "Optional::<CountOrZero>", default)]
    first: Option<usize>,
    /// Number of layers to keep at the end, together with `first`.
    #[serde(with = "Optional::<CountOrZero>", default)]
    last: Option<usize>,
}

impl Layers {
    /// Half the layers of a checkpoint of `count` layers, from both ends; the first half is the larger one.
    #[must_use]
    pub fn half(count: usize) -> Layers {
        let kept = count.div_ceil(2);
        Layers::Ends {
            first: kept.div_ceil(2),
            last: kept / 2,
        }
    }

    /// Returns the kept layers of a checkpoint of `count` layers, in order.
    ///
    /// # Errors
    /// A layer that the checkpoint does not have, a layer that is named twice or out of order, and no layer at all: what
    /// is wrong, and on a line of its own the hint.
    pub fn indices(&self, count: usize) -> Result<Vec<usize>, String> {
        self.check()?;
        let last_layer = count.saturating_sub(1);
        match self {
            Layers::List(list) => match list.iter().find(|&&layer| layer >= count) {
                Some(layer) => Err(format!(
                    "the checkpoint has no layer {layer}\nhint: its {count} layers are 0 to {last_layer}"
                )),
                None => Ok(list.clone()),
            },
            Layers::Every { every } => Ok((0..count).step_by(*every).collect()),
            Layers::Ends { first, last } if first + last > count => Err(format!(
                "`first` {first} and `last` {last} are {} layers together, and the checkpoint has {count}\nhint: lower one of the two",
                first + last
            )),
            Layers::Ends { first, last } => Ok((0..*first).chain(count - last..count).collect()),
        }
    }

    /// Checks what does not depend on the checkpoint.
    fn check(&self) -> Result<(), String> {
        let hint = "hint: list layers in ascending order, such as [0, 2, 5], or set { every = 2 } or { first = 8, last = 7 }";
        let is_ascending = |list: &[usize]| list.windows(2).all(|pair| pair[0] < pair[1]);
        match self {
            Layers::List(list) if !is_ascending(list) => {
                Err(format!("{list:?} is not in ascending order\n{hint}"))
            }
            Layers::List(list) if list.is_empty() => Err(format!("no layer is kept\n{hint}")),
            Layers::Every { every: 0 } | Layers::Ends { first: 0, last: 0 } => {
                Err(format!("no layer is kept\n{hint}"))
            }
            _ => Ok(()),
        }
    }
}

/// Writes the choice as in the run file.
impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Layers::List(list) => write!(f, "{list:?}"),
            Layers::Every { every } => write!(f, "{{ every = {every} }}"),
            Layers::Ends { first, last } => write!(f, "{{ first = {first}, last = {last} }}"),
        }
    }
}

impl TryFrom<LayerTable> for Layers {
    type Error = String;

    fn try_from(table: LayerTable) -> Result<Layers, String> {
        match (table.every, table.first, table.last) {
            (Some(every), None, None) => Ok(Layers::Every { every }),
            (None, None, None) => Err(
                "no layer is kept\nhint: set { every = 2 } or { first = 8, last = 7 }".to_owned(),
            ),
            (None, first, last) => Ok(Layers::Ends {
                first: first.unwrap_or(0),
                last: last.unwrap_or(0),
            }),
            (Some(_), _, _) => Err(
                "`every` and the ends of the checkpoint are both given\nhint: leave out `every`, or `first` and `last`"
                    .to_owned(),
            ),
        }
    }
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Layers, D::Error> {
        struct ListOrTable;

        impl<'de> Visitor<'de> for ListOrTable {
            type Value = Layers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of layers such as [0, 2, 5], or a table such as { every = 2 }")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Layers, A::Error> {
                let list = Each::<CountOrZero>::deserialize(SeqAccessDeserializer::new(list))?;
                Ok(Layers::List(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<Layers, A::Error> {
                let table = LayerTable::deserialize(MapAccessDeserializer::new(table))?;
                Layers::try_from(table).map_err(A::Error::custom)
            }
        }

        let layers = from.deserialize_any(ListOrTable)?;
        layers.check().map_err(D::Error::custom)?;
        Ok(layers)
    }
}

impl JsonSchema for Layers {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Layers".into()
    }

    /// A schema without `type`: `items` applies to a list alone, and `properties` to a table alone.
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let items = CountOrZero::json_schema(generator);
        let table = LayerTable::json_schema(generator);
        json_schema!({
            "items": items,
            "minItems": 1,
            "properties": table.get("properties"),
            "additionalProperties": false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Layers, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_list_a_step_and_both_ends_are_read_back() {
        for (text, count, kept) in [
            ("[0,2,5]", 6, vec![0, 2, 5]),
            (r#"{"every":2}"#, 5, vec![0, 2, 4]),
            (r#"{"every":9}"#, 5, vec![0]),
            (r#"{"first":2,"last":1}"#, 5, vec![0, 1, 4]),
            (r#"{"first":0,"last":2}"#, 5, vec![3, 4]),
            (r#"{"first":3,"last":2}"#, 5, vec![0, 1, 2, 3, 4]),
        ] {
            let layers = read(text).unwrap();
            assert_eq!(layers.indices(count), Ok(kept), "{text}");
            assert_eq!(serde_json::to_string(&layers).unwrap(), text);
        }
        assert_eq!(
            read(r#"{"last":2}"#).unwrap().indices(3).unwrap(),
            [1, 2],
            "an end that is left out has no layers"
        );
        assert_eq!(Layers::half(30).indices(30).unwrap().len(), 15);
        assert_eq!(Layers::half(30).to_string(), "{ first = 8, last = 7 }");
        assert_eq!(Layers::half(5).indices(5).unwrap(), [0, 1, 4]);
        assert_eq!(Layers::half(2).indices(2).unwrap(), [0]);
    }

    #[test]
    fn choices_that_no_checkpoint_can_have_are_refused() {
        for (text, part) in [
            ("[]", "no layer is kept"),
            ("[1,1]", "[1, 1] is not in ascending order"),
            ("[2,1]", "[2, 1] is not in ascending order"),
            ("[-1]", "-1 is out of range"),
            ("[0.5]", "0.5 is out of range"),
            ("{}", "no layer is kept"),
            (r#"{"every":0}"#, "0 is out of range"),
            (r#"{"first":0,"last":0}"#, "no layer is kept"),
            (r#"{"every":2,"last":1}"#, "are both given"),
            (r#"{"evry":2}"#, "unknown field `evry`"),
            ("2", "a list of layers such as [0, 2, 5]"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn layers_outside_the_checkpoint_are_refused() {
        let error = |text: &str| read(text).unwrap().indices(4).unwrap_err();
        assert!(error("[0,4]").contains("no layer 4\nhint: its 4 layers are 0 to 3"));
        assert!(error(r#"{"first":3,"last":2}"#).contains("5 layers together"));
    }
}
