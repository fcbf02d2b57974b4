use std::borrow::Cow;

use potstill_datasets::range::{Count, FilePath, Optional};
use potstill_datasets::{TemplateArguments, TemplateSource};
use potstill_model::Config;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::layers::Layers;

/// The model that training starts from: the table `[student]` of the run file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StudentSettings {
    /// Checkpoint that the student starts from: a folder, a GGUF file, or a repository of the Hugging Face Hub
    /// (`org/name`). Default: the teacher's.
    pub path: Option<FilePath>,
    /// Branch, tag or commit of the repository that `path` names. A run keeps the commit that it used first. Default:
    /// `main`.
    pub revision: Option<String>,
    /// Chat template for a run without a teacher: `"plain"` or a `.jinja` file. Default: the checkpoint's own chat
    /// template.
    pub template: Option<TemplateSource>,
    /// Arguments of the student's chat template, where the student learns from text and where it answers in the
    /// evaluation. Default: the teacher's.
    pub template_arguments: Option<TemplateArguments>,
    /// Layer pruning: layers of the checkpoint to keep. A list, such as `[0, 2, 5]`; or `{ every = 2 }`; or the ends of
    /// the checkpoint, such as `{ first = 8, last = 7 }`.
    pub layers: Option<Layers>,
    /// Width pruning: number of neurons to keep in each feed-forward layer of the checkpoint, those with the largest
    /// weights.
    #[serde(with = "Optional::<Count>")]
    pub intermediate_size: Option<usize>,
    /// Random weights of this shape in place of the checkpoint's. Keys are those of `config.json`, such as `head_dim`;
    /// absent ones are as in the checkpoint if it is of the same family. Vocabulary and special tokens are those of the
    /// checkpoint's tokenizer.
    pub random: Option<RandomShape>,
}

/// Largest learning rate of a student with random weights, if the run file sets none.
const RANDOM_RATE: f64 = 1.5e-3;
/// The same of a pruned checkpoint.
const PRUNED_RATE: f64 = 5e-4;
/// The same of a whole checkpoint.
const WHOLE_RATE: f64 = 1e-4;

impl StudentSettings {
    /// The learning rate of a run file that sets none: the further the student's start is from a trained model, the
    /// larger it is.
    #[must_use]
    pub fn default_learning_rate(&self) -> f64 {
        match (&self.random, self.is_pruned()) {
            (Some(_), _) => RANDOM_RATE,
            (None, true) => PRUNED_RATE,
            (None, false) => WHOLE_RATE,
        }
    }

    /// Whether the student has fewer layers or narrower ones than its checkpoint.
    #[must_use]
    pub fn is_pruned(&self) -> bool {
        self.layers.is_some() || self.intermediate_size.is_some()
    }
}

/// `random` of `[student]`: keys of `config.json`, with `family` for `model_type`, and short names for some.
///
/// Keys are checked when the configuration is made ([`RandomShape::config`]), because the family may be the checkpoint's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RandomShape {
    keys: Map<String, Value>,
}

/// Short names of keys of `config.json`.
const SHORT_NAMES: [(&str, &str); 4] = [
    ("family", "model_type"),
    ("layers", "num_hidden_layers"),
    ("heads", "num_attention_heads"),
    ("key_value_heads", "num_key_value_heads"),
];

/// Keys that a random student does not take from a checkpoint of its family: the shape, lists with an entry for each
/// layer, and the form of the stored weights.
const KEYS_OF_SHAPE: [&str; 12] = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "no_rope_layers",
    "mlp_only_layers",
    "max_window_layers",
    "num_nextn_predict_layers",
    "quantization_config",
];

/// Keys that a random student of another family than the checkpoint's takes from it: the tokenizer's, and the context.
const KEYS_OF_TEXT: [&str; 4] = [
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
];

/// A key of `random` that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RandomShapeError {
    /// The key as it is written in the run file; empty if the table itself is wrong.
    pub key: String,
    /// The problem, and in some cases a line `hint: what to do`.
    pub why: String,
}

impl RandomShape {
    /// Makes the configuration of a model with the keys of this table. `checkpoint` is the configuration beside the
    /// tokenizer, which has `tokens` token ids. Other keys are as in `checkpoint` if that is of the same family, and have the
    /// family's defaults otherwise.
    ///
    /// # Errors
    /// The first key that the family does not know, or whose value it does not support.
    pub fn config(&self, checkpoint: &Config, tokens: usize) -> Result<Config, RandomShapeError> {
        let own = self.keys_of_file();
        let family = match own.get("model_type") {
            None => checkpoint.model_type(),
            Some(Value::String(family)) => family,
            Some(other) => {
                let why = format!("{other} is not the name of a family");
                return Err(self.error("model_type", why));
            }
        };
        let same = family == checkpoint.model_type();
        let is_taken = |key: &str| match same {
            true => !KEYS_OF_SHAPE.contains(&key),
            false => KEYS_OF_TEXT.contains(&key),
        };
        let taken = checkpoint.keys().iter().filter(|(key, _)| is_taken(key));
        let mut keys: Map<String, Value> = taken
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        // Where a key is absent, transformers has the token ids of the family's published models.
        for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
            keys.entry(key).or_insert(Value::Null);
        }
        keys.insert("model_type".to_owned(), json!(family));
        keys.insert("vocab_size".to_owned(), json!(tokens));
        keys.extend(own.clone());
        if let Some(width) = self.width_of_heads(&own)?
            && Config::keys_read(&keys).contains("head_dim")
        {
            keys.insert("head_dim".to_owned(), json!(width));
        }
        let read = Config::keys_read(&keys);
        if let Some(heads) = keys.get("num_attention_heads").cloned()
            && !read.contains("num_key_value_heads")
        {
            // In latent attention each head has keys of its own, which transformers reads from this key.
            keys.insert("num_key_value_heads".to_owned(), heads);
        }
        let config = Config::from_json(&Value::Object(keys)).map_err(|error| match error {
            potstill_model::Error::Config { key, why, .. } => {
                // The hint is for readers of a file.
                let why = why.split("\nhint: ").next().unwrap_or_default();
                let hint = "see a config.json of this family for its keys and values";
                self.error(key, format!("{why}\nhint: {hint}"))
            }
            other => self.error("", other.to_string()),
        })?;
        if let Some(key) = own.keys().find(|key| !read.contains(*key)) {
            let family = config.model_type();
            let why = format!(
                "this key changes nothing in a model of the family {family}\nhint: see a config.json of this family for its keys"
            );
            return Err(self.error(key, why));
        }
        if config.vocab_size < tokens {
            let rows = config.vocab_size;
            let why = format!(
                "{rows} rows are too few for the {tokens} token ids of the tokenizer\nhint: leave `vocab_size` out"
            );
            return Err(self.error("vocab_size", why));
        }
        Ok(config)
    }

    /// Returns the keys by their names in `config.json`.
    fn keys_of_file(&self) -> Map<String, Value> {
        let name = |key: &String| {
            let long = SHORT_NAMES.iter().find(|(short, _)| short == key);
            long.map_or_else(|| key.clone(), |(_, long)| (*long).to_owned())
        };
        let keys = self.keys.iter();
        keys.map(|(key, value)| (name(key), value.clone()))
            .collect()
    }

    /// Returns the width of a head if the table gives the number of heads and not their width.
    fn width_of_heads(&self, own: &Map<String, Value>) -> Result<Option<u64>, RandomShapeError> {
        let count = |key: &str| own.get(key).and_then(Value::as_u64).filter(|n| *n > 0);
        match (count("hidden_size"), count("num_attention_heads")) {
            (Some(width), Some(heads)) if !own.contains_key("head_dim") => {
                if width % heads != 0 || width / heads % 2 != 0 {
                    let why = format!(
                        "`hidden_size` {width} is not {heads} heads times an even number\nhint: change one of the two, or set `head_dim`"
                    );
                    return Err(self.error("num_attention_heads", why));
                }
                Ok(Some(width / heads))
            }
            _ => Ok(None),
        }
    }

    /// Makes an error about a key of `config.json`, with the name by which the table has it.
    fn error(&self, key: &str, why: String) -> RandomShapeError {
        let short = SHORT_NAMES.iter().find(|(_, long)| *long == key);
        let short = short.map(|(short, _)| *short);
        let written = short.filter(|short| self.keys.contains_key(*short));
        RandomShapeError {
            key: written.unwrap_or(key).to_owned(),
            why,
        }
    }
}

impl JsonSchema for RandomShape {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "RandomShape".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let families: Vec<&str> = Config::families().collect();
        let count = |text: &str| {
            let mut schema = Count::json_schema(generator);
            schema.insert("description".to_owned(), json!(text));
            schema
        };
        let [hidden_size, intermediate_size, layers, heads, key_value_heads] = [
            "Width of the model.",
            "Width of the feed-forward layers.",
            "Number of decoder layers (`num_hidden_layers`).",
            "Number of query heads (`num_attention_heads`).",
            "Number of key and value heads (`num_key_value_heads`). Default: the number of query heads.",
        ]
        .map(count);
        json_schema!({
            "type": "object",
            "properties": {
                "family": {
                    "type": "string",
                    "enum": families,
                    "description": "Family of the model (`model_type`). Default: the checkpoint's."
                },
                "hidden_size": hidden_size,
                "intermediate_size": intermediate_size,
                "layers": layers,
                "heads": heads,
                "key_value_heads": key_value_heads,
            },
            "required": ["hidden_size", "intermediate_size"],
            "additionalProperties": true,
        })
    }
}
