//! Columns inside objects: a name with dots leads into them, unless a column has the whole name.

use serde_json::{Map, Value};

/// Most names of columns in a message.
const SHOWN_NAMES: usize = 30;

/// Returns the value of a column. A null object has null fields.
pub(super) fn lookup<'a>(fields: &'a Map<String, Value>, column: &str) -> Option<&'a Value> {
    if let Some(value) = fields.get(column) {
        return Some(value);
    }
    column.match_indices('.').find_map(|(dot, _)| {
        let (name, rest) = (column.get(..dot)?, column.get(dot + 1..)?);
        match fields.get(name)? {
            Value::Object(inner) => lookup(inner, rest),
            Value::Null => Some(&Value::Null),
            _ => None,
        }
    })
}

/// Returns the name of a column that stands beside another one, in the same object.
pub(super) fn beside(column: &str, name: &str) -> String {
    match column.rsplit_once('.') {
        Some((object, _)) => format!("{object}.{name}"),
        None => name.to_owned(),
    }
}

/// Lists the names of columns; those in objects have dots.
pub(super) fn names(fields: &Map<String, Value>) -> Vec<String> {
    let mut found = Vec::new();
    for (name, value) in fields {
        if found.len() > SHOWN_NAMES {
            break;
        }
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                let inner = names(inner).into_iter();
                found.extend(inner.map(|field| format!("{name}.{field}")));
            }
            _ => found.push(name.clone()),
        }
    }
    found
}

/// Writes the names of columns for a message.
pub(super) fn listed(names: &[String]) -> String {
    let shown: Vec<String> = names
        .iter()
        .take(SHOWN_NAMES)
        .map(|name| format!("`{}`", name.chars().take(60).collect::<String>()))
        .collect();
    match (shown.is_empty(), names.len() > SHOWN_NAMES) {
        (true, _) => "no columns at all".into(),
        (_, false) => shown.join(", "),
        (_, true) => format!("{} and more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_dot_leads_into_an_object_unless_a_column_has_the_whole_name() {
        let row =
            json!({"a": {"b": 1, "c.d": 2, "e": {"f": 3}}, "a.b": 4, "g.h": {"i": 5}, "n": null});
        let row = row.as_object().unwrap();
        let found = |column| lookup(row, column).cloned();
        assert_eq!(found("a.b"), Some(json!(4)));
        assert_eq!(found("a.c.d"), Some(json!(2)));
        assert_eq!(found("a.e.f"), Some(json!(3)));
        assert_eq!(found("g.h.i"), Some(json!(5)));
        assert_eq!(found("n.x"), Some(json!(null)));
        for none in ["a.x", "b", "a.b.c", ".", "", "a."] {
            assert_eq!(found(none), None, "{none}");
        }
        let expected = ["a.b", "a.c.d", "a.e.f", "a.b", "g.h.i", "n"];
        assert_eq!(names(row), expected);
    }
}
