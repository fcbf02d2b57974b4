use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Name of a run, which names a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunName(String);

impl JsonSchema for RunName {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "RunName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$" })
    }
}

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
                "{name:?} cannot be the name of a folder\nhint: use up to 64 letters, digits, `-`, `_` and `.`, and begin with another character than `.`"
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

#[cfg(test)]
mod tests {
    use super::RunName;

    #[test]
    fn a_name_can_be_a_folder() {
        assert!(RunName::try_from("../x".to_owned()).is_err());
        assert!(RunName::try_from("gsm8k-v1.2".to_owned()).is_ok());
    }
}
