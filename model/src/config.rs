//! `config.json` in the form of transformers 4 and in that of transformers 5.
//!
//! A configuration is kept as it was read, so that saving writes it back with nothing but what changed. A key or a value
//! that changes the model's results and that this crate does not implement is an error and never ignored.

use std::collections::BTreeSet;
use std::path::Path;

use burn::tensor::DType;
use serde_json::{Map, Value, json};

use crate::Error;
use crate::families;
use crate::files::read_text;
use crate::keys::Keys;
use crate::limits::MODEL_EXPERTS;
use crate::plan::{AttentionPlan, DecoderPlan, ExpertsPlan, FeedForwardPlan, LayerPlan};

/// The configuration of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Number of rows of the embedding and of the head, v.
    pub vocab_size: usize,
    /// Width of the residual stream, d.
    pub hidden_size: usize,
    /// Length of the model's context in tokens.
    pub max_position_embeddings: usize,
    /// Whether the head uses the weights of the embedding.
    pub tie_word_embeddings: bool,
    /// Token that starts a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text; may be empty.
    pub eos_token_id: Vec<u32>,
    pub(crate) plan: DecoderPlan,
    /// The keys as they were read.
    json: Map<String, Value>,
}

/// Keys with an entry for each layer.
const LAYER_LISTS: [&str; 2] = ["layer_types", "no_rope_layers"];

impl Config {
    /// Reads `config.json` in `dir`.
    ///
    /// # Errors
    /// Returns an error for an absent or unreadable file, for malformed JSON, for an absent required key, and for a key
    /// whose value this crate does not support (an unknown `model_type`, an unknown rotary scaling, …).
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        Self::from_file(&dir.join("config.json"))
    }

    /// Reads one configuration file; see [`Config::from_dir`].
    ///
    /// # Errors
    /// Returns the errors of [`Config::from_dir`].
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = read_text(path)?;
        let json: Map<String, Value> =
            serde_json::from_str(&text).map_err(|source| Error::Json {
                path: path.to_path_buf(),
                what: "model configuration",
                source,
            })?;
        Self::read(path, json)
    }

    /// Reads a configuration from JSON in memory, of the form of `config.json`. Errors call it `config.json`.
    ///
    /// # Errors
    /// Returns the errors of [`Config::from_dir`] about keys.
    pub fn from_json(json: &Value) -> Result<Self, Error> {
        let path = Path::new("config.json");
        match json {
            Value::Object(json) => Self::read(path, json.clone()),
            _ => Err(Error::Config {
                path: path.to_path_buf(),
                key: "model_type",
                why: "absent, because the configuration is not a table".to_owned(),
            }),
        }
    }

    /// Returns the names of all families, the values of `model_type` that are supported.
    pub fn families() -> impl Iterator<Item = &'static str> {
        families::FAMILIES.iter().map(|family| family.model_type)
    }

    /// Returns the names of the keys that [`Config::from_json`] reads in this configuration, up to the first error. Other
    /// keys change nothing.
    #[must_use]
    pub fn keys_read(json: &Map<String, Value>) -> BTreeSet<String> {
        let keys = Keys::new(Path::new("config.json"), json);
        // The error, if there is one, is that of `from_json`.
        let _ = Self::of_keys(&keys);
        keys.into_asked()
    }

    fn read(path: &Path, json: Map<String, Value>) -> Result<Self, Error> {
        let mut json = text_decoder(json);
        let keys = Keys::new(path, &json);
        let config = Self::of_keys(&keys)?;
        let architecture = families::find(&keys)?.architecture;
        json.entry("architectures")
            .or_insert_with(|| json!([architecture]));
        Ok(Self { json, ..config })
    }

    /// Reads a configuration, which does not hold the keys themselves yet.
    fn of_keys(keys: &Keys) -> Result<Self, Error> {
        let family = families::find(keys)?;
        check_quantization(keys)?;
        let plan = (family.plan)(keys)?;
        check_plan(keys, &plan)?;
        let config = Self {
            vocab_size: keys.count("vocab_size", None)?,
            hidden_size: keys.count("hidden_size", None)?,
            max_position_embeddings: family.context_of(keys)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", family.tied)?,
            bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
            eos_token_id: keys.token_ids("eos_token_id")?,
            plan,
            json: Map::new(),
        };
        let special = [("bos_token_id", config.bos_token_id.as_slice())]
            .into_iter()
            .chain([("eos_token_id", config.eos_token_id.as_slice())]);
        for (key, ids) in special {
            if let Some(id) = ids.iter().find(|id| **id as usize >= config.vocab_size) {
                let why = format!("{id} is not below vocab_size, {}", config.vocab_size);
                return Err(keys.wrong(key, why));
            }
        }
        if config.checked_parameters().is_none() {
            let why = format!(
                "{} layers of this size are too large to count",
                config.num_hidden_layers()
            );
            return Err(keys.wrong("num_hidden_layers", why));
        }
        Ok(config)
    }

    /// Returns the value of `model_type`: the family.
    #[must_use]
    pub fn model_type(&self) -> &str {
        let value = self.json.get("model_type").and_then(Value::as_str);
        value.unwrap_or_default()
    }

    /// Returns the keys as they were read.
    #[must_use]
    pub fn keys(&self) -> &Map<String, Value> {
        &self.json
    }

    /// Returns the number of layers.
    #[must_use]
    pub fn num_hidden_layers(&self) -> usize {
        self.plan.layers.len()
    }

    /// Whether any layer has experts.
    #[must_use]
    pub fn has_experts(&self) -> bool {
        let has_experts = |plan: &FeedForwardPlan| matches!(plan, FeedForwardPlan::Experts(_));
        (self.plan.layers.iter()).any(|layer| has_experts(&layer.feed_forward))
    }

    /// Number of multi-token-prediction layers that the configuration names. They stay out of the model.
    #[must_use]
    pub fn prediction_layers(&self) -> usize {
        let value = self.json.get("num_nextn_predict_layers");
        value.and_then(Value::as_u64).unwrap_or(0) as usize
    }

    /// Rows and columns of a block of stored 8-bit numbers that share a scale.
    pub(crate) fn weight_block(&self) -> [usize; 2] {
        let blocks = self.json.get("quantization_config");
        let blocks = blocks.and_then(|config| config.get("weight_block_size")?.as_array());
        let size = |axis: usize| blocks.and_then(|blocks| blocks.get(axis)?.as_u64());
        [0, 1].map(|axis| size(axis).map_or(128, |size| (size as usize).max(1)))
    }

    /// Returns the number of parameters of a model of this configuration; a tied head counts once.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.checked_parameters().unwrap_or(u64::MAX)
    }

    /// Returns the number of weights that a token is multiplied by: all but the embedding, which is looked up, and the experts
    /// that are not chosen. The head counts, tied or not.
    #[must_use]
    pub fn used_weights(&self) -> u64 {
        let untied = match self.tie_word_embeddings {
            true => 0,
            false => self.vocab_size as u64 * self.hidden_size as u64,
        };
        let unused = |layer: &LayerPlan| match &layer.feed_forward {
            FeedForwardPlan::Gated(_) => 0,
            FeedForwardPlan::Experts(plan) => {
                let expert = 3 * plan.expert.width as u64 * self.hidden_size as u64;
                (plan.count - plan.chosen.min(plan.count)) as u64 * expert
            }
        };
        let unused: u64 = self.plan.layers.iter().map(unused).sum();
        self.parameters().saturating_sub(untied + unused)
    }

    fn checked_parameters(&self) -> Option<u64> {
        let d = self.hidden_size as u128;
        let matrices = if self.tie_word_embeddings { 1 } else { 2 };
        let mut sum = matrices * self.vocab_size as u128 * d + d;
        for layer in &self.plan.layers {
            sum = sum.checked_add(layer.norms.count() as u128 * d)?;
            sum = sum.checked_add(attention_parameters(&layer.attention, d)?)?;
            sum = sum.checked_add(feed_forward_parameters(&layer.feed_forward, d)?)?;
        }
        u64::try_from(sum).ok()
    }

    /// Returns the configuration with the given layers only, in this order.
    ///
    /// # Errors
    /// Returns [`Error::PrunedLayers`] for a layer that does not exist or for no layer, and [`Error::Config`] if keys
    /// that describe layers by ranges cannot describe this choice.
    pub fn with_layers(&self, layers: &[usize]) -> Result<Self, Error> {
        let chosen: Option<Vec<_>> = (layers.iter())
            .map(|&layer| self.plan.layers.get(layer).cloned())
            .collect();
        let Some(chosen) = chosen.filter(|chosen| !chosen.is_empty()) else {
            return Err(Error::PrunedLayers {
                layers: layers.to_vec(),
                count: self.num_hidden_layers(),
            });
        };
        let mut json = self.json.clone();
        json.insert("num_hidden_layers".to_owned(), json!(layers.len()));
        for key in LAYER_LISTS {
            if let Some(Value::Array(values)) = self.json.get(key) {
                let values = layers
                    .iter()
                    .filter_map(|&layer| values.get(layer).cloned());
                json.insert(key.to_owned(), values.collect());
            }
        }
        self.describe_layers(&mut json, layers, &chosen);
        let config = Self::read(Path::new("config.json"), json)?;
        match config.plan.layers == chosen {
            true => Ok(config),
            false => Err(Error::Config {
                path: Path::new("config.json").to_path_buf(),
                key: "num_hidden_layers",
                why: format!(
                    "the layers {layers:?} cannot be described by the keys of a {} configuration",
                    self.model_type()
                ),
            }),
        }
    }

    /// Returns the configuration with feed-forward blocks of `width` neurons.
    ///
    /// # Errors
    /// Returns [`Error::PrunedWidth`] for a width of 0 or not below the present one, and for a model with experts.
    pub fn with_width(&self, width: usize) -> Result<Self, Error> {
        let refused = |why| Err(Error::PrunedWidth { width, why });
        for layer in &self.plan.layers {
            match &layer.feed_forward {
                FeedForwardPlan::Experts(_) => return refused("the model has experts".to_owned()),
                FeedForwardPlan::Gated(plan) if width == 0 || width >= plan.width => {
                    return refused(format!("the model has {}", plan.width));
                }
                FeedForwardPlan::Gated(_) => {}
            }
        }
        self.with_keys([("intermediate_size", json!(width))])
    }

    /// Writes keys that describe the kinds of the chosen layers, where the family has such keys.
    fn describe_layers(
        &self,
        json: &mut Map<String, Value>,
        layers: &[usize],
        chosen: &[crate::plan::LayerPlan],
    ) {
        let is_dense =
            |index: &usize| matches!(&chosen[*index].feed_forward, FeedForwardPlan::Gated(_));
        let window = |layer: &crate::plan::LayerPlan| match &layer.attention {
            AttentionPlan::Grouped(plan) => plan.window,
            AttentionPlan::Latent(_) => None,
        };
        match self.model_type() {
            "qwen3_moe" => {
                let dense: Vec<usize> = (0..layers.len()).filter(is_dense).collect();
                json.insert("mlp_only_layers".to_owned(), json!(dense));
                json.insert("decoder_sparse_step".to_owned(), json!(1));
            }
            "deepseek_v2" | "deepseek_v3" => {
                let dense = (0..layers.len()).take_while(is_dense).count();
                json.insert("first_k_dense_replace".to_owned(), json!(dense));
            }
            "gemma2" | "gemma3_text" | "gpt_oss" | "qwen2" | "qwen3" => {
                let kind = |layer| match window(layer) {
                    Some(_) => "sliding_attention",
                    None => "full_attention",
                };
                let kinds: Vec<&str> = chosen.iter().map(kind).collect();
                json.insert("layer_types".to_owned(), json!(kinds));
            }
            "smollm3" => {
                let positions = |layer: &crate::plan::LayerPlan| match &layer.attention {
                    AttentionPlan::Grouped(plan) => u8::from(plan.rotary.is_some()),
                    AttentionPlan::Latent(_) => 1,
                };
                let positions: Vec<u8> = chosen.iter().map(positions).collect();
                json.insert("no_rope_layers".to_owned(), json!(positions));
            }
            _ => {}
        }
    }

    /// Returns the configuration as JSON: the keys as they were read, with the type of the stored weights. Weights are
    /// never stored in blocks of 8 bits, and multi-token-prediction layers are never stored, so the keys that announce
    /// them are left out.
    #[must_use]
    pub fn to_json(&self, dtype: DType) -> Value {
        let dtype = match dtype {
            DType::F64 => "float64",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        };
        let mut json = self.json.clone();
        json.remove("quantization_config");
        if self.prediction_layers() > 0 {
            json.insert("num_nextn_predict_layers".to_owned(), json!(0));
        }
        // Both versions of transformers read one of the two names.
        json.insert("torch_dtype".to_owned(), json!(dtype));
        json.remove("dtype");
        Value::Object(json)
    }

    /// Returns the configuration with other values of some keys; `null` removes a key.
    ///
    /// # Errors
    /// Returns the errors of [`Config::from_json`].
    pub fn with_keys<'a>(
        &self,
        keys: impl IntoIterator<Item = (&'a str, Value)>,
    ) -> Result<Self, Error> {
        let mut json = self.json.clone();
        for (key, value) in keys {
            match value {
                Value::Null => json.remove(key),
                value => json.insert(key.to_owned(), value),
            };
        }
        Self::read(Path::new("config.json"), json)
    }
}

/// Returns the keys of the text decoder of a model that also takes images.
fn text_decoder(json: Map<String, Value>) -> Map<String, Value> {
    match (
        json.get("model_type").and_then(Value::as_str),
        json.get("text_config"),
    ) {
        (Some("gemma3"), Some(Value::Object(text))) => {
            let mut text = text.clone();
            text.insert("model_type".to_owned(), json!("gemma3_text"));
            for key in ["bos_token_id", "eos_token_id"] {
                if let (None, Some(value)) = (text.get(key), json.get(key)) {
                    text.insert(key.to_owned(), value.clone());
                }
            }
            text
        }
        _ => json,
    }
}

/// Checks that quantised weights are of the one kind that is read: blocks of e4m3 numbers with a scale each.
fn check_quantization(keys: &Keys) -> Result<(), Error> {
    let key = "quantization_config";
    let Some(value) = keys.get(key) else {
        return Ok(());
    };
    let method = value.get("quant_method").and_then(Value::as_str);
    let format = value.get("fmt").map_or(Some("e4m3"), Value::as_str);
    let blocks = value.get("weight_block_size").and_then(Value::as_array);
    if method == Some("fp8") && format == Some("e4m3") && blocks.is_some() {
        return Ok(());
    }
    let found = match method {
        Some("fp8") | None => value.to_string(),
        Some(method) => format!("quant_method \"{method}\""),
    };
    let why = format!(
        "{found} is not supported, only quant_method \"fp8\" with fmt \"e4m3\" and weight_block_size\n\
         hint: use the checkpoint without quantisation, or let a server run this one and name the server in [teacher]"
    );
    Err(keys.error(key, why))
}

/// Checks what no single key tells.
fn check_plan(keys: &Keys, plan: &DecoderPlan) -> Result<(), Error> {
    let mut all = 0;
    for layer in &plan.layers {
        if let FeedForwardPlan::Experts(experts) = &layer.feed_forward {
            let groups = experts.router.groups;
            let open = groups.map_or(experts.count, |g| experts.count / g.count * g.chosen);
            if experts.chosen > open {
                let why = format!("{} of {open} experts cannot be chosen", experts.chosen);
                return Err(keys.wrong("num_experts_per_tok", why));
            }
            all += experts.count;
            if all > MODEL_EXPERTS {
                let key = ["num_experts", "num_local_experts", "n_routed_experts"]
                    .into_iter()
                    .find(|key| keys.get(key).is_some());
                let why = format!("more than {MODEL_EXPERTS} experts in all layers");
                return Err(keys.wrong(key.unwrap_or("num_hidden_layers"), why));
            }
        }
    }
    Ok(())
}

fn attention_parameters(plan: &AttentionPlan, d: u128) -> Option<u128> {
    let product = |a: usize, b: u128| (a as u128).checked_mul(b);
    match plan {
        AttentionPlan::Grouped(plan) => {
            let (queries, keys) = (plan.query_columns(), plan.key_columns());
            let biases = usize::from(plan.input_bias) * (queries + 2 * keys)
                + usize::from(plan.output_bias) * d as usize;
            let norms = match plan.query_key_norm {
                crate::plan::QueryKeyNorm::None => 0,
                crate::plan::QueryKeyNorm::Head => 2 * plan.head_dim,
                crate::plan::QueryKeyNorm::Row => queries + keys,
            };
            let sinks = if plan.sinks { plan.heads } else { 0 };
            product(2 * queries + 2 * keys, d)?.checked_add((biases + norms + sinks) as u128)
        }
        AttentionPlan::Latent(plan) => {
            let queries = plan.heads * plan.key_width();
            let query = match plan.query_rank {
                Some(rank) => product(rank, d)? + product(rank, queries as u128)? + rank as u128,
                None => product(queries, d)?,
            };
            let latent = product(plan.key_rank + plan.rotary_width, d)? + plan.key_rank as u128;
            let up = product(
                plan.heads * (plan.plain_width + plan.value_width),
                plan.key_rank as u128,
            )?;
            let output = product(plan.heads * plan.value_width, d)?;
            let biases = match plan.bias {
                true => {
                    plan.query_rank.unwrap_or(0) + plan.key_rank + plan.rotary_width + d as usize
                }
                false => 0,
            };
            query
                .checked_add(latent)?
                .checked_add(up)?
                .checked_add(output)?
                .checked_add(biases as u128)
        }
    }
}

fn feed_forward_parameters(plan: &FeedForwardPlan, d: u128) -> Option<u128> {
    let gated = |width: usize, bias: bool| {
        let biases = u128::from(bias) * (2 * width as u128 + d);
        (3 * width as u128).checked_mul(d)?.checked_add(biases)
    };
    match plan {
        FeedForwardPlan::Gated(plan) => gated(plan.width, plan.bias),
        FeedForwardPlan::Experts(plan) => {
            let ExpertsPlan { count, expert, .. } = plan;
            let experts = gated(expert.width, expert.bias)?.checked_mul(*count as u128)?;
            let shared = match plan.shared_width {
                Some(width) => gated(width, false)?,
                None => 0,
            };
            let per_expert = u128::from(plan.router.bias) + u128::from(plan.router.correction_bias);
            let router = (d + per_expert).checked_mul(*count as u128)?;
            experts.checked_add(shared)?.checked_add(router)
        }
    }
}

#[cfg(test)]
mod tests;
