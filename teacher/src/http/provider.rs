//! Known providers of models: prices, limits and terms from `providers.toml`.

use std::collections::BTreeMap;
use std::path::Path;

use potstill_datasets::range::{NonNegative, Optional};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Price of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// USD for a million tokens of prompts.
    #[serde(with = "NonNegative")]
    pub input: f64,
    /// USD for a million cached tokens of prompts. Default: `input`.
    #[serde(with = "Optional::<NonNegative>", default)]
    pub cached_input: Option<f64>,
    /// USD for a million tokens of answers, reasoning included.
    #[serde(with = "NonNegative")]
    pub output: f64,
}

/// A model of a provider: an entry of `providers.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    /// Base URL, to which `/chat/completions` is added.
    pub url: String,
    /// Environment variable that holds the key; `None` if no key is needed.
    pub key_env: Option<String>,
    /// Name of the model at the provider.
    pub model: String,
    /// The server's variant of the protocol.
    #[serde(default)]
    pub dialect: super::Dialect,
    /// Whether the model takes requests as OpenAI's reasoning models do.
    #[serde(default)]
    pub reasoning_model: bool,
    /// Context length: prompt and answer together, tokens.
    pub context: Option<u32>,
    /// Longest answer, tokens.
    pub max_output: Option<u32>,
    /// Largest number of most likely tokens with log-probabilities; 0 if the server gives none.
    #[serde(default)]
    pub top_logprobs: u32,
    /// Whether responses contain the text of the reasoning.
    #[serde(default)]
    pub returns_reasoning: bool,
    /// Price of tokens.
    pub price: Option<Price>,
    /// Licence or terms for training on the answers.
    pub terms: String,
    /// Source of the entry's facts.
    pub source: String,
    /// Date on which the source was read, YYYY-MM-DD.
    pub checked: String,
}

/// The built-in providers, by name.
///
/// # Errors
/// [`Error::Providers`] if the built-in file is not valid.
pub fn known_providers() -> Result<BTreeMap<String, Provider>, Error> {
    parse(include_str!("providers.toml"), Path::new("providers.toml"))
}

/// Adds the entries of the user's file `users_toml` to `built_in`; an entry replaces another of the same name as a whole.
/// `path` is for messages.
///
/// # Errors
/// [`Error::Providers`] with line and column in the file.
pub fn merge_providers(
    mut built_in: BTreeMap<String, Provider>,
    users_toml: &str,
    path: &Path,
) -> Result<BTreeMap<String, Provider>, Error> {
    built_in.extend(parse(users_toml, path)?);
    Ok(built_in)
}

fn parse(text: &str, path: &Path) -> Result<BTreeMap<String, Provider>, Error> {
    toml::from_str(text).map_err(|why| Error::Providers {
        path: path.to_owned(),
        why: why.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Dialect;

    #[test]
    fn the_built_in_providers_are_complete() {
        let all = known_providers().unwrap();
        for name in [
            "deepseek-r1",
            "deepseek-v3",
            "gpt-4o",
            "o1",
            "llama-3.1-vllm",
        ] {
            assert!(all.contains_key(name), "{name}");
        }
        for (name, provider) in &all {
            assert!(provider.url.starts_with("http"), "{name}");
            assert!(!provider.url.ends_with('/'), "{name}");
            assert!(
                !provider.terms.is_empty() && provider.source.contains("https://"),
                "{name}"
            );
            let date: Vec<&str> = provider.checked.split('-').collect();
            assert!(
                matches!(date.as_slice(), [year, _, _] if year.len() == 4),
                "{name}"
            );
            if let Some(price) = provider.price {
                assert!(
                    price
                        .cached_input
                        .is_none_or(|cached| cached <= price.input),
                    "{name}"
                );
                assert!(price.input > 0.0 && price.output >= price.input, "{name}");
            }
        }
        assert!(all["o1"].reasoning_model && !all["o1"].returns_reasoning);
        assert!(all["deepseek-r1"].returns_reasoning);
        assert_eq!(all["llama-3.1-vllm"].dialect, Dialect::Vllm);
    }

    #[test]
    fn a_users_file_adds_and_replaces() {
        let mine = |table: &str| {
            format!(
                "[{table}]\nurl = \"http://127.0.0.1:1/v1\"\nmodel = \"x\"\nterms = \"t\"\nsource = \"s\"\nchecked = \"2026-01-01\"\n"
            )
        };
        let path = Path::new("mine.toml");
        let text = mine("o1") + &mine("new");
        let all = merge_providers(known_providers().unwrap(), &text, path).unwrap();
        // An entry replaces another as a whole: an old price never stays beside a new address.
        assert_eq!((all["o1"].model.as_str(), all["o1"].price), ("x", None));
        assert!(all.contains_key("new") && all.contains_key("gpt-4o"));
        let wrong = mine("new").replace("model", "modell");
        let error = merge_providers(known_providers().unwrap(), &wrong, path)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("mine.toml") && error.contains("modell"),
            "{error}"
        );
    }
}
