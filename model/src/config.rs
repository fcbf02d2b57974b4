//! `config.json` in the form of transformers 4 and in that of transformers 5.
//!
//! The two forms differ in the key of the rotary base (`rope_theta`, or `rope_parameters.rope_theta`) and in that of the
//! stored type (`torch_dtype`, or `dtype`). A key that changes the model's results and that this crate does not
//! implement is an error and never ignored.

use std::path::Path;

use burn::tensor::DType;
use serde_json::{Map, Value, json};

use crate::Error;

/// The shape of a Decoder-family decoder and the constants of its forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Number of rows of the embedding and of the head, v.
    pub vocab_size: usize,
    /// Width of the residual stream, d.
    pub hidden_size: usize,
    /// Width inside the feed-forward block, w.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Number of query heads, h.
    pub num_attention_heads: usize,
    /// Number of key and value heads, g; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head, e; even.
    pub head_dim: usize,
    /// Constant ε that norms add to the mean square before the root.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Length of the model's context in tokens.
    pub max_position_embeddings: usize,
    /// Whether the head uses the weights of the embedding.
    pub tie_word_embeddings: bool,
    /// Token that starts a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text; may be empty.
    pub eos_token_id: Vec<u32>,
}

impl Config {
    /// Reads `config.json` in `dir`.
    ///
    /// # Errors
    /// Returns an error for an absent or unreadable file, for malformed JSON, for an absent required key, and for a key
    /// whose value this crate does not support (another `model_type`, biases, rotary scaling, …).
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        Self::from_file(&dir.join("config.json"))
    }

    /// Reads one configuration file; see [`Config::from_dir`].
    ///
    /// # Errors
    /// Returns the errors of [`Config::from_dir`].
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let keys: Map<String, Value> =
            serde_json::from_str(&text).map_err(|source| Error::Json {
                path: path.to_path_buf(),
                what: "model configuration",
                source,
            })?;
        ConfigReader { path, keys: &keys }.config()
    }

    /// Returns the number of parameters of a model of this shape; a tied head counts once.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        let d = self.hidden_size;
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let layer = 2 * d + 2 * d * queries + 2 * d * keys + 3 * d * self.intermediate_size;
        let matrices = if self.tie_word_embeddings { 1 } else { 2 };
        (matrices * self.vocab_size * d + self.num_hidden_layers * layer + d) as u64
    }

    /// Returns the configuration as JSON in a form that transformers 4 and 5 load; `dtype` is the type of the stored
    /// weights.
    #[must_use]
    pub fn to_json(&self, dtype: DType) -> Value {
        let dtype = match dtype {
            DType::F64 => "float64",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        };
        let eos = match self.eos_token_id.as_slice() {
            [] => Value::Null,
            [id] => json!(id),
            ids => json!(ids),
        };
        json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": null,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }
}

/// Reads the keys of a configuration file. Its errors name the file and the key.
struct ConfigReader<'a> {
    path: &'a Path,
    keys: &'a Map<String, Value>,
}

impl ConfigReader<'_> {
    fn config(&self) -> Result<Config, Error> {
        self.check_unsupported_keys()?;
        let hidden_size = self.count("hidden_size", None)?;
        let heads = self.count("num_attention_heads", None)?;
        let config = Config {
            vocab_size: self.count("vocab_size", None)?,
            hidden_size,
            intermediate_size: self.count("intermediate_size", None)?,
            num_hidden_layers: self.count("num_hidden_layers", None)?,
            num_attention_heads: heads,
            num_key_value_heads: self.count("num_key_value_heads", Some(heads))?,
            head_dim: self.count("head_dim", Some(hidden_size / heads))?,
            rms_norm_eps: self.number("rms_norm_eps", self.get("rms_norm_eps"), 1e-6)?,
            rope_theta: self.rope_theta()?,
            max_position_embeddings: self.count("max_position_embeddings", Some(2048))?,
            tie_word_embeddings: self.flag("tie_word_embeddings")?,
            bos_token_id: self.token_ids("bos_token_id")?.first().copied(),
            eos_token_id: self.token_ids("eos_token_id")?,
        };
        if !heads.is_multiple_of(config.num_key_value_heads) {
            return Err(self.wrong(
                "num_key_value_heads",
                format!(
                    "{} does not divide num_attention_heads, {heads}",
                    config.num_key_value_heads
                ),
            ));
        }
        if !config.head_dim.is_multiple_of(2) {
            return Err(self.wrong(
                "head_dim",
                format!(
                    "{} is odd, but rotary positions rotate pairs of numbers",
                    config.head_dim
                ),
            ));
        }
        Ok(config)
    }

    /// Checks the keys that change the model's results and of which one value is supported.
    fn check_unsupported_keys(&self) -> Result<(), Error> {
        let supported: [(&'static str, &str); 2] =
            [("model_type", "llama"), ("hidden_act", "silu")];
        for (key, value) in supported {
            match self.get(key) {
                Some(Value::String(found)) if found == value => {}
                None if key != "model_type" => {}
                Some(found) => {
                    let why = format!("{found} is not supported, only \"{value}\" (Llama family)");
                    return Err(self.wrong(key, why));
                }
                None => return Err(self.wrong(key, format!("absent, must be \"{value}\""))),
            }
        }
        for key in ["attention_bias", "mlp_bias"] {
            if self.flag(key)? {
                return Err(self.wrong(key, "biases are not supported, only false".to_owned()));
            }
        }
        for key in ["rope_scaling", "rope_parameters"] {
            self.check_unscaled_rope(key)?;
        }
        Ok(())
    }

    fn check_unscaled_rope(&self, key: &'static str) -> Result<(), Error> {
        let Some(value) = self.get(key) else {
            return Ok(());
        };
        let Value::Object(rope) = value else {
            return Err(self.wrong(key, format!("{value} is not a table")));
        };
        // Earlier versions of transformers named this key `type`, later ones `rope_type`.
        for name in ["rope_type", "type"] {
            if let Some(kind) = rope.get(name)
                && kind != "default"
            {
                let why = format!("{name} {kind} is not supported, only \"default\"");
                return Err(self.wrong(key, why));
            }
        }
        match rope.get("partial_rotary_factor").and_then(Value::as_f64) {
            Some(part) if part != 1.0 => Err(self.wrong(
                key,
                format!("partial_rotary_factor {part} is not supported, only 1"),
            )),
            _ => Ok(()),
        }
    }

    fn rope_theta(&self) -> Result<f64, Error> {
        let inside = self
            .get("rope_parameters")
            .and_then(|rope| rope.get("rope_theta"));
        self.number("rope_theta", inside.or(self.get("rope_theta")), 10_000.0)
    }

    /// Returns the value of a key; `null` counts as absent, as in transformers.
    fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn count(&self, key: &'static str, default: Option<usize>) -> Result<usize, Error> {
        let Some(value) = self.get(key) else {
            return default.filter(|count| *count > 0).ok_or_else(|| {
                self.wrong(key, "absent, must be a whole number above 0".to_owned())
            });
        };
        value
            .as_u64()
            .and_then(|count| usize::try_from(count).ok())
            .filter(|count| *count > 0)
            .ok_or_else(|| self.wrong(key, format!("{value} must be a whole number above 0")))
    }

    fn number(&self, key: &'static str, value: Option<&Value>, default: f64) -> Result<f64, Error> {
        match value {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|number| *number > 0.0)
                .ok_or_else(|| self.wrong(key, format!("{value} must be a number above 0"))),
        }
    }

    fn flag(&self, key: &'static str) -> Result<bool, Error> {
        match self.get(key) {
            None => Ok(false),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.wrong(key, format!("{value} must be true or false"))),
        }
    }

    /// Reads one id or a list of ids; an absent key gives an empty list.
    fn token_ids(&self, key: &'static str) -> Result<Vec<u32>, Error> {
        let values = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        values
            .iter()
            .map(|value| {
                value
                    .as_u64()
                    .and_then(|id| u32::try_from(id).ok())
                    .ok_or_else(|| self.wrong(key, format!("{value} must be a token id")))
            })
            .collect()
    }

    fn wrong(&self, key: &'static str, why: String) -> Error {
        Error::Config {
            path: self.path.to_path_buf(),
            key,
            why,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Map<String, Value> {
        let value = json!({
            "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "eos_token_id": [2, 3],
        });
        value.as_object().unwrap().clone()
    }

    fn read(keys: &Map<String, Value>) -> Result<Config, Error> {
        let path = Path::new("m/config.json");
        ConfigReader { path, keys }.config()
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = read(&base()).unwrap();
        assert_eq!(config.head_dim, 4);
        assert_eq!(config.max_position_embeddings, 2048);
        assert!(!config.tie_word_embeddings);
        assert_eq!(config.eos_token_id, [2, 3]);
        assert_eq!(config.bos_token_id, None);
    }

    #[test]
    fn both_forms_of_the_rotary_base_are_read() {
        let mut keys = base();
        keys.remove("rope_theta");
        keys.insert(
            "rope_parameters".to_owned(),
            json!({"rope_theta": 7.5, "rope_type": "default"}),
        );
        assert_eq!(read(&keys).unwrap().rope_theta, 7.5);
        assert_eq!(read(&base()).unwrap().rope_theta, 5000.0);
    }

    #[test]
    fn a_written_configuration_is_read_back_unchanged() {
        let mut config = read(&base()).unwrap();
        for eos in [vec![], vec![2], vec![2, 3]] {
            config.eos_token_id = eos;
            let json = config.to_json(DType::BF16);
            assert_eq!(json["torch_dtype"], "bfloat16");
            assert_eq!(read(json.as_object().unwrap()).unwrap(), config);
        }
    }

    #[test]
    fn errors_name_the_file_and_the_key() {
        let cases = [
            (
                "model_type",
                json!("qwen2"),
                "`m/config.json`, key `model_type`: \"qwen2\" is not supported, only \"llama\" (Llama family)",
            ),
            (
                "hidden_act",
                json!("gelu"),
                "`m/config.json`, key `hidden_act`: \"gelu\" is not supported, only \"silu\" (Llama family)",
            ),
            (
                "attention_bias",
                json!(true),
                "`m/config.json`, key `attention_bias`: biases are not supported, only false",
            ),
            (
                "mlp_bias",
                json!(true),
                "`m/config.json`, key `mlp_bias`: biases are not supported, only false",
            ),
            (
                "rope_scaling",
                json!({"type": "linear", "factor": 2.0}),
                "`m/config.json`, key `rope_scaling`: type \"linear\" is not supported, only \"default\"",
            ),
            (
                "rope_parameters",
                json!({"rope_type": "llama3"}),
                "`m/config.json`, key `rope_parameters`: rope_type \"llama3\" is not supported, only \"default\"",
            ),
            (
                "rope_parameters",
                json!({"partial_rotary_factor": 0.5}),
                "`m/config.json`, key `rope_parameters`: partial_rotary_factor 0.5 is not supported, only 1",
            ),
            (
                "hidden_size",
                json!(-4),
                "`m/config.json`, key `hidden_size`: -4 must be a whole number above 0",
            ),
            (
                "vocab_size",
                json!(null),
                "`m/config.json`, key `vocab_size`: absent, must be a whole number above 0",
            ),
            (
                "num_key_value_heads",
                json!(3),
                "`m/config.json`, key `num_key_value_heads`: 3 does not divide num_attention_heads, 4",
            ),
            (
                "head_dim",
                json!(5),
                "`m/config.json`, key `head_dim`: 5 is odd, but rotary positions rotate pairs of numbers",
            ),
            (
                "rope_theta",
                json!("big"),
                "`m/config.json`, key `rope_theta`: \"big\" must be a number above 0",
            ),
            (
                "tie_word_embeddings",
                json!(1),
                "`m/config.json`, key `tie_word_embeddings`: 1 must be true or false",
            ),
            (
                "eos_token_id",
                json!([2, -1]),
                "`m/config.json`, key `eos_token_id`: -1 must be a token id",
            ),
        ];
        for (key, value, message) in cases {
            let mut keys = base();
            keys.insert(key.to_owned(), value);
            assert_eq!(read(&keys).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn the_error_of_an_absent_file_names_it() {
        let error = Config::from_dir(Path::new("no/such/folder")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot read `no/such/folder/config.json`"
        );
    }
}
