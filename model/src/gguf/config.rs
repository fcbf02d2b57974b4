//! `config.json` from the metadata of a GGUF file.

use serde_json::{Map, Value, json};

use super::architecture::Architecture;
use super::file::GgufFile;
use super::rotary::{self, LLAMA3_TENSOR};
use crate::Error;
use crate::limits::GGUF_COUNT;

/// Returns the architecture of a file.
///
/// # Errors
/// Returns an error for an absent or unknown architecture.
pub(super) fn architecture(file: &GgufFile) -> Result<&'static Architecture, Error> {
    let key = "general.architecture";
    let Some(name) = file.text(key)? else {
        return Err(file.broken(format!("the key `{key}` is absent")));
    };
    Architecture::by_name(name).ok_or_else(|| {
        let known: Vec<&str> = super::architecture::ARCHITECTURES
            .iter()
            .map(|known| known.name)
            .collect();
        file.broken(format!(
            "its architecture is {name:?}, and only {} are supported",
            known.join(", ")
        ))
    })
}

/// Returns the width of a head.
///
/// # Errors
/// Returns an error for absent or impossible sizes.
pub(super) fn head_width(
    file: &GgufFile,
    architecture: &'static Architecture,
) -> Result<usize, Error> {
    ArchitectureKeys { file, architecture }.head_width()
}

/// Makes the `config.json` of a file.
///
/// # Errors
/// Returns an error that names the key or the tensor for a file whose model cannot be described.
pub(super) fn config(file: &GgufFile) -> Result<Value, Error> {
    let architecture = architecture(file)?;
    let keys = ArchitectureKeys { file, architecture };
    let mut out = keys.common()?;
    keys.rotary(&mut out)?;
    keys.family(&mut out)?;
    keys.token_ids(&mut out)?;
    Ok(Value::Object(out))
}

/// The keys of an architecture.
struct ArchitectureKeys<'a> {
    file: &'a GgufFile,
    architecture: &'static Architecture,
}

impl ArchitectureKeys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name)
    }

    fn optional(&self, name: &str) -> Result<Option<usize>, Error> {
        self.file.count(&self.key(name))
    }

    /// Reads a count that must be there, and above 0.
    fn count(&self, name: &str) -> Result<usize, Error> {
        let key = self.key(name);
        match self.file.count(&key)? {
            Some(count) if (1..=GGUF_COUNT).contains(&count) => Ok(count),
            Some(count) => Err(self.file.broken(format!(
                "the key `{key}` is {count}, but must be from 1 to {GGUF_COUNT}"
            ))),
            None => Err(self.file.broken(format!("the key `{key}` is absent"))),
        }
    }

    fn number(&self, name: &str) -> Result<Option<f64>, Error> {
        self.file.number(&self.key(name))
    }

    fn head_width(&self) -> Result<usize, Error> {
        let own = self.optional("attention.key_length")?;
        let heads = self.count("attention.head_count")?;
        let width = match own {
            Some(width) => width,
            None => self.count("embedding_length")? / heads,
        };
        if width == 0 || width > GGUF_COUNT || width % 2 != 0 {
            let what = format!("its heads have the width {width}, which must be even and above 0");
            return Err(self.file.broken(what));
        }
        match self.optional("attention.value_length")? {
            Some(value) if value != width => Err(self.file.broken(format!(
                "the key `{}` is {value}, and values of another width than keys ({width}) are not supported here",
                self.key("attention.value_length")
            ))),
            _ => Ok(width),
        }
    }

    fn common(&self) -> Result<Map<String, Value>, Error> {
        let Some(embedding) = self.file.tensor("token_embd.weight") else {
            return Err(self
                .file
                .broken("the tensor `token_embd.weight` is absent".to_owned()));
        };
        let is_tied = self.file.tensor("output.weight").is_none();
        let heads = self.count("attention.head_count")?;
        let epsilon = self.number("attention.layer_norm_rms_epsilon")?;
        let Some(epsilon) = epsilon.filter(|epsilon| *epsilon > 0.0) else {
            let key = self.key("attention.layer_norm_rms_epsilon");
            return Err(self
                .file
                .broken(format!("the key `{key}` is absent or not above 0")));
        };
        let mut out = Map::new();
        let mut set = |key: &str, value: Value| out.insert(key.to_owned(), value);
        set("architectures", json!([self.architecture.class]));
        set("model_type", json!(self.architecture.model_types[0]));
        set("vocab_size", json!(embedding.shape[0]));
        set("hidden_size", json!(self.count("embedding_length")?));
        set(
            "intermediate_size",
            json!(self.count("feed_forward_length")?),
        );
        set("num_hidden_layers", json!(self.count("block_count")?));
        set("num_attention_heads", json!(heads));
        let key_heads = self.optional("attention.head_count_kv")?.unwrap_or(heads);
        set("num_key_value_heads", json!(key_heads));
        set("head_dim", json!(self.head_width()?));
        set(
            "max_position_embeddings",
            json!(self.count("context_length")?),
        );
        set("rms_norm_eps", json!(epsilon));
        set("tie_word_embeddings", json!(is_tied));
        set("torch_dtype", json!("float32"));
        Ok(out)
    }

    fn rotary(&self, out: &mut Map<String, Value>) -> Result<(), Error> {
        let base = self.number("rope.freq_base")?.unwrap_or(10_000.0);
        out.insert("rope_theta".to_owned(), json!(base));
        let width = self.head_width()?;
        let rotated = self.optional("rope.dimension_count")?.unwrap_or(width);
        if rotated != width {
            if self.architecture.name != "phi3" || rotated == 0 || rotated > width {
                let key = self.key("rope.dimension_count");
                let what =
                    format!("the key `{key}` is {rotated}, but heads have the width {width}");
                return Err(self.file.broken(what));
            }
            let part = rotated as f64 / width as f64;
            out.insert("partial_rotary_factor".to_owned(), json!(part));
        }
        let scaling = match self.file.tensor(LLAMA3_TENSOR) {
            Some(_) => Some(rotary::llama3_scaling(self.file, base, rotated)?),
            None => self.scaling()?,
        };
        if let Some(scaling) = scaling {
            out.insert("rope_scaling".to_owned(), scaling);
        }
        Ok(())
    }

    /// The scaling that keys and the tensors of LongRoPE describe.
    fn scaling(&self) -> Result<Option<Value>, Error> {
        let key = self.key("rope.scaling.type");
        let factor = match self.number("rope.scaling.factor")? {
            None => self.number("rope.scale_linear")?,
            factor => factor,
        };
        let original = self.optional("rope.scaling.original_context_length")?;
        let kind = match self.file.text(&key)? {
            Some(kind) => kind,
            None if self.file.tensor("rope_factors_long.weight").is_some() => "longrope",
            None if factor.is_some_and(|factor| factor != 1.0) => "linear",
            None => "none",
        };
        let mut scaling = match kind {
            "none" => return Ok(None),
            "linear" | "yarn" => {
                let Some(factor) = factor else {
                    let what = format!(
                        "the key `{key}` is {kind:?}, but there is no `rope.scaling.factor`"
                    );
                    return Err(self.file.broken(what));
                };
                json!({ "rope_type": kind, "factor": factor })
            }
            "longrope" => json!({
                "rope_type": kind,
                "long_factor": rotary::factors(self.file, "rope_factors_long.weight")?,
                "short_factor": rotary::factors(self.file, "rope_factors_short.weight")?,
            }),
            other => {
                let what = format!(
                    "the key `{key}` is {other:?}, and only \"linear\", \"yarn\" and \"longrope\" are supported"
                );
                return Err(self.file.broken(what));
            }
        };
        if let Some(original) = original {
            scaling["original_max_position_embeddings"] = json!(original);
        }
        for (key, own) in [
            ("attention_factor", "rope.scaling.attn_factor"),
            ("attention_factor", "rope.scaling.yarn_attn_factor"),
            ("beta_fast", "rope.scaling.yarn_beta_fast"),
            ("beta_slow", "rope.scaling.yarn_beta_slow"),
        ] {
            if let Some(number) = self.number(own)? {
                scaling[key] = json!(number);
            }
        }
        Ok(Some(scaling))
    }

    /// Adds the keys that only some families have.
    fn family(&self, out: &mut Map<String, Value>) -> Result<(), Error> {
        if self.architecture.name != "qwen3moe" && self.optional("expert_count")?.unwrap_or(0) > 0 {
            let what = format!(
                "the key `{}` announces experts, which are supported in qwen3moe only",
                self.key("expert_count")
            );
            return Err(self.file.broken(what));
        }
        let activation = match self.architecture.norm_offset {
            0.0 => ("hidden_act", "silu"),
            _ => ("hidden_activation", "gelu_pytorch_tanh"),
        };
        let mut set = |key: &str, value: Value| out.insert(key.to_owned(), value);
        set(activation.0, json!(activation.1));
        match self.architecture.name {
            "llama" | "smollm3" | "qwen3" | "qwen3moe" | "olmo2" => {
                let has = |name: &str| self.file.tensor(&format!("blk.0.{name}.bias")).is_some();
                set("attention_bias", json!(has("attn_q")));
                set("mlp_bias", json!(has("ffn_gate")));
            }
            "gemma2" | "gemma3" => {
                for (key, value) in self.gemma()? {
                    set(&key, value);
                }
            }
            _ => {}
        }
        match self.architecture.name {
            "qwen3moe" => {
                set("num_experts", json!(self.count("expert_count")?));
                set(
                    "num_experts_per_tok",
                    json!(self.count("expert_used_count")?),
                );
                set(
                    "moe_intermediate_size",
                    json!(self.count("expert_feed_forward_length")?),
                );
                set("norm_topk_prob", json!(true));
                set("decoder_sparse_step", json!(1));
                set("mlp_only_layers", json!([]));
            }
            "smollm3" => {
                let layers = self.count("block_count")?;
                let rotated = (1..=layers).map(|layer| u8::from(layer % 4 != 0));
                set("no_rope_layers", json!(rotated.collect::<Vec<_>>()));
            }
            "phi3" => {
                let window = self.optional("attention.sliding_window")?;
                set("sliding_window", json!(window.filter(|window| *window > 0)));
                if let Some(original) = self.optional("rope.scaling.original_context_length")? {
                    set("original_max_position_embeddings", json!(original));
                }
            }
            "qwen2" | "qwen3" => {
                set("use_sliding_window", json!(false));
            }
            "olmo2" if self.optional("attention.sliding_window")?.unwrap_or(0) > 0 => {
                let key = self.key("attention.sliding_window");
                let what = format!("the key `{key}` announces OLMo 3, which is not supported");
                return Err(self.file.broken(what));
            }
            _ => {}
        }
        Ok(())
    }

    /// The window, the soft caps and the scale of Gemma 2 and 3. llama.cpp has the defaults of absent keys.
    fn gemma(&self) -> Result<Map<String, Value>, Error> {
        let is_third = self.architecture.name == "gemma3";
        let layers = self.count("block_count")?;
        let window = self.optional("attention.sliding_window")?;
        let window = window.or((!is_third).then_some(4096));
        let window = window.filter(|window| *window > 0);
        let is_sliding = self.sliding_layers(layers, if is_third { 6 } else { 2 })?;
        let types: Vec<&str> = is_sliding
            .iter()
            .map(|is_sliding| match *is_sliding && window.is_some() {
                true => "sliding_attention",
                false => "full_attention",
            })
            .collect();
        // The largest models of both generations scale by the width of the model's share of a head.
        let is_largest = layers == if is_third { 62 } else { 46 };
        let scalar = match is_largest {
            true => self.count("embedding_length")? / self.count("attention.head_count")?,
            false => self.head_width()?,
        };
        let mut out = Map::new();
        let mut set = |key: &str, value: Value| out.insert(key.to_owned(), value);
        set("layer_types", json!(types));
        set("sliding_window", json!(window));
        set("query_pre_attn_scalar", json!(scalar));
        set("attention_bias", json!(false));
        let softcap = |key: &str, default: Option<f64>| {
            let cap = self.number(key)?.or(default).filter(|cap| *cap > 0.0);
            Ok::<_, Error>(json!(cap))
        };
        let default = |cap: f64| (!is_third).then_some(cap);
        set(
            "final_logit_softcapping",
            softcap("final_logit_softcapping", default(30.0))?,
        );
        if is_third {
            let base = self.number("rope.freq_base_swa")?.unwrap_or(10_000.0);
            set("rope_local_base_freq", json!(base));
        } else {
            set(
                "attn_logit_softcapping",
                softcap("attn_logit_softcapping", default(50.0))?,
            );
        }
        Ok(out)
    }

    /// For each layer, whether it has a window: every layer but each `period`-th, unless the file has a pattern.
    fn sliding_layers(&self, layers: usize, period: usize) -> Result<Vec<bool>, Error> {
        let key = self.key("attention.sliding_window_pattern");
        let period = match self.file.count(&key) {
            Ok(own) => own.unwrap_or(period).max(1),
            Err(_) => {
                let pattern = self.file.numbers(&key)?.unwrap_or_default();
                if pattern.len() != layers {
                    let what = format!(
                        "the key `{key}` has {} values, but there are {layers} layers",
                        pattern.len()
                    );
                    return Err(self.file.broken(what));
                }
                return Ok(pattern
                    .iter()
                    .map(|is_sliding| *is_sliding != 0.0)
                    .collect());
            }
        };
        Ok((1..=layers).map(|layer| layer % period != 0).collect())
    }

    fn token_ids(&self, out: &mut Map<String, Value>) -> Result<(), Error> {
        let id = |name: &str| self.file.count(&format!("tokenizer.ggml.{name}"));
        out.insert("bos_token_id".to_owned(), json!(id("bos_token_id")?));
        let mut ends = Vec::new();
        for name in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            ends.extend(id(name)?.filter(|id| !ends.contains(id)));
        }
        let ends = match ends.as_slice() {
            [] => Value::Null,
            [end] => json!(end),
            ends => json!(ends),
        };
        out.insert("eos_token_id".to_owned(), ends);
        out.insert("pad_token_id".to_owned(), json!(id("padding_token_id")?));
        Ok(())
    }
}
