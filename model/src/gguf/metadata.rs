//! The metadata of an export that describe the model, from `config.json`.

use serde_json::Value as Json;

use super::architecture::Architecture;
use super::rotary::Llama3;
use super::source::SourceConfig;
use super::write::{Metadata, Value};
use crate::Error;

/// The contents of `config.json` in the terms of GGUF.
pub(super) struct ModelMetadata {
    /// The keys of the architecture.
    pub(super) keys: Metadata,
    /// Rows of the embedding.
    pub(super) vocab_size: usize,
    pub(super) layers: usize,
    pub(super) is_tied: bool,
    /// Tensors with divisors of the rotary frequencies.
    pub(super) divisors: Vec<(String, Vec<f32>)>,
    /// Factor on q, because llama.cpp computes the scale of attention from the width of the heads.
    pub(super) query_factor: f32,
}

/// The rotary keys of both generations of `config.json`.
struct Rotary<'a> {
    base: f64,
    /// Base of the layers with a window, if they have one of their own.
    local_base: Option<f64>,
    scaling: Option<&'a Json>,
    kind: &'a str,
    /// Number of columns of a head that are rotated.
    rotated: usize,
    original: Option<usize>,
}

/// Reads the metadata of a model.
///
/// # Errors
/// Returns an error that names the key whose value llama.cpp does not have.
pub(super) fn model_metadata(
    config: &SourceConfig,
    architecture: &Architecture,
) -> Result<ModelMetadata, Error> {
    check_values(config, architecture)?;
    let rotary = rotary(config)?;
    let width = config.head_width()?;
    let heads = config.required("num_attention_heads")?;
    let gemma = matches!(architecture.name, "gemma2" | "gemma3");
    let mut out = ModelMetadata {
        keys: Vec::new(),
        vocab_size: config.required("vocab_size")?,
        layers: config.required("num_hidden_layers")?,
        is_tied: match config.get("tie_word_embeddings") {
            None => gemma,
            Some(tied) => tied == true,
        },
        divisors: Vec::new(),
        query_factor: 1.0,
    };
    let counts = [
        ("vocab_size", out.vocab_size),
        ("context_length", context_length(config)?),
        ("embedding_length", config.required("hidden_size")?),
        ("block_count", out.layers),
        ("feed_forward_length", config.required("intermediate_size")?),
        ("attention.head_count", heads),
        (
            "attention.head_count_kv",
            config.count("num_key_value_heads")?.unwrap_or(heads),
        ),
        ("attention.key_length", width),
        ("attention.value_length", width),
    ];
    for (name, count) in counts {
        out.count(architecture, name, count);
    }
    if matches!(architecture.name, "llama" | "smollm3" | "phi3") {
        out.count(architecture, "rope.dimension_count", rotary.rotated);
    }
    let default = match architecture.name {
        "phi3" | "olmo2" => 1e-5,
        _ => 1e-6,
    };
    let epsilon = config.number("rms_norm_eps")?.unwrap_or(default);
    out.number(architecture, "attention.layer_norm_rms_epsilon", epsilon);
    out.number(architecture, "rope.freq_base", rotary.base);
    scale_rotary(config, architecture, &rotary, &mut out)?;
    match architecture.name {
        "gemma2" | "gemma3" => describe_gemma(config, architecture, &rotary, &mut out)?,
        "phi3" => {
            let window = config.count("sliding_window")?.unwrap_or(0);
            out.count(architecture, "attention.sliding_window", window);
        }
        "qwen3moe" => describe_experts(config, architecture, &mut out)?,
        _ => {}
    }
    Ok(out)
}

impl ModelMetadata {
    fn put(&mut self, architecture: &Architecture, name: &str, value: Value) {
        let key = format!("{}.{name}", architecture.name);
        self.keys.push((key, value));
    }

    fn count(&mut self, architecture: &Architecture, name: &str, count: usize) {
        self.put(architecture, name, Value::Count(count as u32));
    }

    fn number(&mut self, architecture: &Architecture, name: &str, number: f64) {
        self.put(architecture, name, Value::Number(number as f32));
    }
}

/// Checks the keys of which llama.cpp has one value for an architecture.
fn check_values(config: &SourceConfig, architecture: &Architecture) -> Result<(), Error> {
    let is_gemma = architecture.norm_offset != 0.0;
    let (key, only) = match is_gemma {
        true => ("hidden_activation", "gelu_pytorch_tanh"),
        false => ("hidden_act", "silu"),
    };
    if config.text(key).is_some_and(|found| found != only) {
        return Err(config.unsupported(key));
    }
    for key in ["use_bidirectional_attention", "quantization_config"] {
        if config.get(key).is_some_and(|value| *value != false) {
            return Err(config.unsupported(key));
        }
    }
    match architecture.name {
        "smollm3" => {
            let layers = config.required("num_hidden_layers")?;
            let fixed: Vec<u64> = (1..=layers)
                .map(|layer| u64::from(layer % 4 != 0))
                .collect();
            let own = config.get("no_rope_layers").and_then(Json::as_array);
            let own: Option<Vec<u64>> =
                own.map(|own| own.iter().filter_map(Json::as_u64).collect());
            match own.is_some_and(|own| own != fixed) {
                true => Err(config.unsupported("no_rope_layers")),
                false => Ok(()),
            }
        }
        "gemma3" if config.get("attn_logit_softcapping").is_some() => {
            Err(config.unsupported("attn_logit_softcapping"))
        }
        "qwen3moe" => {
            let dense = config.get("mlp_only_layers").and_then(Json::as_array);
            if dense.is_some_and(|layers| !layers.is_empty()) {
                return Err(config.unsupported("mlp_only_layers"));
            }
            if config.count("decoder_sparse_step")?.unwrap_or(1) != 1 {
                return Err(config.unsupported("decoder_sparse_step"));
            }
            match config.flag("norm_topk_prob") {
                true => Ok(()),
                false => Err(config.unsupported("norm_topk_prob")),
            }
        }
        _ => Ok(()),
    }
}

/// The context. In families whose window llama.cpp does not have it ends with the window, so that a window makes no
/// difference within it.
fn context_length(config: &SourceConfig) -> Result<usize, Error> {
    let context = config.count("max_position_embeddings")?.unwrap_or(2048);
    let has_window = match config.model_type() {
        "mistral" | "phi3" => true,
        "qwen2" | "qwen3" | "qwen3_moe" | "smollm3" => config.flag("use_sliding_window"),
        _ => false,
    };
    let window = config
        .count("sliding_window")?
        .filter(|window| has_window && *window > 0);
    Ok(window.map_or(context, |window| window.min(context)))
}

fn rotary(config: &SourceConfig) -> Result<Rotary<'_>, Error> {
    let parameters = config.get("rope_parameters");
    let table = |name: &str| parameters.and_then(|all| all.get(name));
    let full = table("full_attention").or(parameters);
    let sliding = table("sliding_attention");
    let number = |table: Option<&Json>, key: &str| table.and_then(|table| table[key].as_f64());
    let default = match config.model_type() {
        "smollm3" => 2e6,
        "gemma3_text" => 1e6,
        _ => 10_000.0,
    };
    let base = match number(full, "rope_theta") {
        Some(base) => base,
        None => config.number("rope_theta")?.unwrap_or(default),
    };
    let local = match number(sliding, "rope_theta") {
        Some(base) => Some(base),
        None => config.number("rope_local_base_freq")?,
    };
    let kind = |table: &'_ Json| {
        let kind = table.get("rope_type").or(table.get("type"));
        kind.and_then(Json::as_str).unwrap_or("default").to_owned()
    };
    if sliding.is_some_and(|table| kind(table) != "default") {
        return Err(config.unsupported("rope_parameters"));
    }
    let scaling = config.get("rope_scaling").or(full);
    let kind = scaling.and_then(|table| table.get("rope_type").or(table.get("type")));
    let kind = match kind.and_then(Json::as_str).unwrap_or("default") {
        "su" => "longrope",
        // Phi-3's `yarn` means LongRoPE.
        "yarn" if config.model_type() == "phi3" => "longrope",
        kind => kind,
    };
    let part = match number(full, "partial_rotary_factor") {
        Some(part) => part,
        None => config.number("partial_rotary_factor")?.unwrap_or(1.0),
    };
    let rotated = (config.head_width()? as f64 * part) as usize;
    if part != 1.0 && config.model_type() != "phi3" {
        return Err(config.unsupported("partial_rotary_factor"));
    }
    let inside = scaling.and_then(|table| table["original_max_position_embeddings"].as_u64());
    let original = config.count("original_max_position_embeddings")?;
    Ok(Rotary {
        base,
        local_base: local,
        scaling: scaling.filter(|_| kind != "default"),
        kind,
        rotated,
        original: original.or(inside.map(|original| original as usize)),
    })
}

fn scale_rotary(
    config: &SourceConfig,
    architecture: &Architecture,
    rotary: &Rotary<'_>,
    out: &mut ModelMetadata,
) -> Result<(), Error> {
    let context = config.count("max_position_embeddings")?.unwrap_or(2048);
    let original = rotary.original.unwrap_or(context);
    if architecture.name == "phi3" {
        out.count(
            architecture,
            "rope.scaling.original_context_length",
            original,
        );
    }
    let Some(scaling) = rotary.scaling else {
        return Ok(());
    };
    let refused = |what: &str| {
        let model_type = config.model_type();
        config.refused(format!(
            "llama.cpp has no {model_type} models whose rotary scaling in config.json has {what}"
        ))
    };
    let number = |key: &str| scaling[key].as_f64();
    let required = |key: &str| {
        number(key).ok_or_else(|| {
            config.refused(format!("the rotary scaling in config.json has no `{key}`"))
        })
    };
    let put_kind = |out: &mut ModelMetadata| {
        out.put(
            architecture,
            "rope.scaling.type",
            Value::Text(rotary.kind.to_owned()),
        );
    };
    match (rotary.kind, architecture.name) {
        ("linear", _) => {
            put_kind(out);
            out.number(architecture, "rope.scaling.factor", required("factor")?);
        }
        ("yarn", _) => {
            let factor = number("factor").unwrap_or(context as f64 / original as f64);
            let expected = 0.1 * factor.max(1.0).ln() + 1.0;
            let own = number("attention_factor").unwrap_or(expected);
            if (own - expected).abs() > 1e-6 || number("mscale").is_some() {
                return Err(refused("an attention factor of its own"));
            }
            if scaling["truncate"] == false {
                return Err(refused("`truncate` = false"));
            }
            put_kind(out);
            out.number(architecture, "rope.scaling.factor", factor);
            out.count(
                architecture,
                "rope.scaling.original_context_length",
                original,
            );
            for (key, name) in [
                ("beta_fast", "yarn_beta_fast"),
                ("beta_slow", "yarn_beta_slow"),
            ] {
                if let Some(number) = number(key) {
                    out.number(architecture, &format!("rope.scaling.{name}"), number);
                }
            }
        }
        ("llama3", "llama") => {
            let divisors = Llama3 {
                factor: required("factor")?,
                low_freq_factor: required("low_freq_factor")?,
                high_freq_factor: required("high_freq_factor")?,
                original: original as f64,
            };
            let divisors = divisors.divisors(rotary.base, rotary.rotated);
            out.divisors
                .push((super::rotary::LLAMA3_TENSOR.to_owned(), divisors));
        }
        ("longrope", "phi3") => {
            put_kind(out);
            let factor = context as f64 / original as f64;
            let factor = number("factor").unwrap_or(factor).max(1.0);
            let default = (1.0 + factor.ln() / (original as f64).ln()).sqrt();
            let attention = number("attention_factor").unwrap_or(default);
            out.number(architecture, "rope.scaling.attn_factor", attention);
            for (key, name) in [("long_factor", "long"), ("short_factor", "short")] {
                let divisors: Vec<f32> = scaling[key]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(|divisor| divisor.as_f64().map(|divisor| divisor as f32))
                    .collect();
                if divisors.len() != rotary.rotated / 2 {
                    return Err(refused(&format!("{} numbers in `{key}`", divisors.len())));
                }
                out.divisors
                    .push((format!("rope_factors_{name}.weight"), divisors));
            }
        }
        (kind, _) => return Err(refused(&format!("the type {kind:?}"))),
    }
    Ok(())
}

/// The window, the soft caps and the scale of Gemma 2 and 3.
fn describe_gemma(
    config: &SourceConfig,
    architecture: &Architecture,
    rotary: &Rotary<'_>,
    out: &mut ModelMetadata,
) -> Result<(), Error> {
    let is_third = architecture.name == "gemma3";
    let period = match config.count("sliding_window_pattern")? {
        Some(period) => period,
        None => config.count("_sliding_window_pattern")?.unwrap_or(6),
    };
    let period = if is_third { period.max(1) } else { 2 };
    let is_sliding: Vec<bool> = match config.get("layer_types").and_then(Json::as_array) {
        Some(types) => types
            .iter()
            .map(|kind| kind == "sliding_attention")
            .collect(),
        None => (1..=out.layers).map(|layer| layer % period != 0).collect(),
    };
    if is_sliding.len() != out.layers {
        return Err(config.wrong("layer_types", "a list with a value for each layer"));
    }
    let window = config.count("sliding_window")?;
    let window = window.unwrap_or(4096);
    if is_sliding.contains(&true) || !is_third {
        out.count(architecture, "attention.sliding_window", window);
        out.put(
            architecture,
            "attention.sliding_window_pattern",
            Value::Flags(is_sliding),
        );
    }
    if is_third {
        let local = rotary.local_base.unwrap_or(10_000.0);
        out.number(architecture, "rope.freq_base_swa", local);
    } else {
        let Some(softcap) = config.number("attn_logit_softcapping")? else {
            return Err(config.unsupported("attn_logit_softcapping"));
        };
        out.number(architecture, "attn_logit_softcapping", softcap);
    }
    if let Some(softcap) = config.number("final_logit_softcapping")? {
        out.number(architecture, "final_logit_softcapping", softcap);
    } else if !is_third {
        return Err(config.unsupported("final_logit_softcapping"));
    }
    let is_largest = out.layers == if is_third { 62 } else { 46 };
    let width = config.head_width()?;
    let assumed = match is_largest {
        true => config.required("hidden_size")? / config.required("num_attention_heads")?,
        false => width,
    };
    let scalar = config.number("query_pre_attn_scalar")?.unwrap_or(256.0);
    out.query_factor = (assumed as f64 / scalar).sqrt() as f32;
    Ok(())
}

fn describe_experts(
    config: &SourceConfig,
    architecture: &Architecture,
    out: &mut ModelMetadata,
) -> Result<(), Error> {
    let experts = match config.count("num_experts")? {
        Some(experts) => experts,
        None => config.required("num_local_experts")?,
    };
    out.count(architecture, "expert_count", experts);
    let used = config.required("num_experts_per_tok")?;
    out.count(architecture, "expert_used_count", used);
    let width = config.required("moe_intermediate_size")?;
    out.count(architecture, "expert_feed_forward_length", width);
    Ok(())
}
