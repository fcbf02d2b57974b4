//! The metadata of an export that describe the model, from its configuration.

use potstill_kernels::GateActivation;

use super::architecture::Architecture;
use super::rotary::LLAMA3_TENSOR;
use super::source::ExportSource;
use super::write::{Metadata, Value};
use crate::Error;
use crate::plan::{AttentionPlan, FeedForwardPlan, GroupedPlan, LayerPlan};
use crate::rotary_table::RotaryKeys;

/// The configuration in the terms of GGUF.
pub(super) struct ModelMetadata {
    /// The keys of the architecture.
    pub(super) keys: Metadata,
    /// Tensors with divisors of the rotary frequencies.
    pub(super) divisors: Vec<(String, Vec<f32>)>,
    /// Width of a head.
    pub(super) head_width: usize,
    /// Factor on q, because llama.cpp computes the scale of attention from the width of the heads.
    pub(super) query_factor: f32,
}

/// Reads the metadata of a model.
///
/// # Errors
/// Returns an error that names the key whose value llama.cpp does not have.
pub(super) fn model_metadata(
    source: &ExportSource,
    architecture: &Architecture,
) -> Result<ModelMetadata, Error> {
    check_values(source, architecture)?;
    let (config, plan) = (source.config(), &source.config().plan);
    let attention = first_attention(source)?;
    let mut out = ModelMetadata {
        keys: Vec::new(),
        divisors: Vec::new(),
        head_width: attention.head_dim,
        query_factor: 1.0,
    };
    let counts = [
        ("vocab_size", config.vocab_size),
        ("context_length", context_length(source, architecture)),
        ("embedding_length", config.hidden_size),
        ("block_count", plan.layers.len()),
        ("feed_forward_length", source.count("intermediate_size")?),
        ("attention.head_count", attention.heads),
        ("attention.head_count_kv", attention.key_heads),
        ("attention.key_length", attention.head_dim),
        ("attention.value_length", attention.head_dim),
    ];
    for (name, count) in counts {
        out.count(architecture, name, count);
    }
    let table = &plan.rotary[0];
    if matches!(architecture.name, "llama" | "smollm3" | "phi3") {
        out.count(architecture, "rope.dimension_count", table.width());
    }
    let epsilon = plan.norm.epsilon;
    out.number(architecture, "attention.layer_norm_rms_epsilon", epsilon);
    out.number(architecture, "rope.freq_base", table.theta);
    scale_rotary(source, architecture, &mut out)?;
    match architecture.name {
        "gemma2" | "gemma3" => describe_gemma(source, architecture, attention, &mut out)?,
        "phi3" => {
            let window = attention.window.unwrap_or(0);
            out.count(architecture, "attention.sliding_window", window);
        }
        "qwen3moe" => describe_experts(source, architecture, &mut out),
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

/// Returns the attention of a layer, if it is grouped-query attention.
fn grouped(layer: &LayerPlan) -> Option<&GroupedPlan> {
    match &layer.attention {
        AttentionPlan::Grouped(plan) => Some(plan),
        AttentionPlan::Latent(_) => None,
    }
}

/// Returns the attention of the first layer. Its sizes are those of all layers.
fn first_attention(source: &ExportSource) -> Result<&GroupedPlan, Error> {
    let first = source.config().plan.layers.first().and_then(grouped);
    first.ok_or_else(|| source.unsupported("kv_lora_rank"))
}

/// Returns the window of each layer.
fn windows(source: &ExportSource) -> impl Iterator<Item = Option<usize>> {
    let layers = source.config().plan.layers.iter();
    layers.map(|layer| grouped(layer)?.window)
}

/// Checks the keys of which llama.cpp has one value for an architecture.
fn check_values(source: &ExportSource, architecture: &Architecture) -> Result<(), Error> {
    let plan = &source.config().plan;
    let (key, only) = match architecture.norm_offset {
        0.0 => ("hidden_act", GateActivation::Silu),
        _ => ("hidden_activation", GateActivation::GeluTanh),
    };
    let activation = |layer: &LayerPlan| match &layer.feed_forward {
        FeedForwardPlan::Gated(plan) => plan.activation,
        FeedForwardPlan::Experts(plan) => plan.expert.activation,
    };
    if plan.layers.iter().any(|layer| activation(layer) != only) {
        return Err(source.unsupported(key));
    }
    if source.keys().get("quantization_config").is_some() {
        return Err(source.unsupported("quantization_config"));
    }
    if plan.rotary[0].width() != first_attention(source)?.head_dim && architecture.name != "phi3" {
        return Err(source.unsupported("partial_rotary_factor"));
    }
    let has_positions = |layer: &LayerPlan| grouped(layer).is_some_and(|a| a.rotary.is_some());
    let mut layers = plan.layers.iter().enumerate();
    match architecture.name {
        "smollm3" if layers.any(|(i, layer)| has_positions(layer) != ((i + 1) % 4 != 0)) => {
            Err(source.unsupported("no_rope_layers"))
        }
        "gemma3"
            if layers.any(|(_, layer)| grouped(layer).is_some_and(|a| a.softcap.is_some())) =>
        {
            Err(source.unsupported("attn_logit_softcapping"))
        }
        "qwen3moe" => check_experts(source),
        _ => Ok(()),
    }
}

fn check_experts(source: &ExportSource) -> Result<(), Error> {
    for layer in &source.config().plan.layers {
        match &layer.feed_forward {
            FeedForwardPlan::Gated(_) if source.config().keys().contains_key("mlp_only_layers") => {
                return Err(source.unsupported("mlp_only_layers"));
            }
            FeedForwardPlan::Gated(_) => return Err(source.unsupported("decoder_sparse_step")),
            FeedForwardPlan::Experts(plan) if !plan.router.normalised => {
                return Err(source.unsupported("norm_topk_prob"));
            }
            FeedForwardPlan::Experts(_) => {}
        }
    }
    Ok(())
}

/// The context. In families whose window llama.cpp does not have it ends with the window, so that a window makes no
/// difference within it.
fn context_length(source: &ExportSource, architecture: &Architecture) -> usize {
    let context = source.config().max_position_embeddings;
    match architecture.name {
        "gemma2" | "gemma3" => context,
        _ => windows(source).flatten().fold(context, usize::min),
    }
}

fn scale_rotary(
    source: &ExportSource,
    architecture: &Architecture,
    out: &mut ModelMetadata,
) -> Result<(), Error> {
    let config = source.config();
    let (table, context) = (&config.plan.rotary[0], config.max_position_embeddings);
    let keys = source.keys();
    if RotaryKeys::find(&keys, "sliding_attention", 1.0)?.scaling() != "default"
        && config.plan.rotary.len() > 1
        && keys.get("rope_parameters").is_some()
    {
        return Err(source.unsupported("rope_parameters"));
    }
    let rotary = RotaryKeys::find(&keys, "full_attention", 1.0)?;
    let original = rotary.original_context(context)?;
    let refused = |what: &str| {
        source.refused(format!(
            "llama.cpp has no {} models whose rotary scaling in config.json has {what}",
            config.model_type()
        ))
    };
    let factor = rotary.number("factor")?;
    let scaling = rotary.scaling();
    let put_kind = |out: &mut ModelMetadata| {
        let kind = Value::Text(scaling.to_owned());
        out.put(architecture, "rope.scaling.type", kind);
    };
    let original_key = "rope.scaling.original_context_length";
    if architecture.name == "phi3" {
        out.count(architecture, original_key, original as usize);
    }
    match (scaling, architecture.name) {
        ("default", _) => {}
        ("linear", _) => {
            put_kind(out);
            out.number(architecture, "rope.scaling.factor", factor.unwrap_or(1.0));
        }
        ("yarn", _) => {
            let factor = factor.unwrap_or(context as f64 / original);
            let expected = 0.1 * factor.max(1.0).ln() + 1.0;
            if (f64::from(table.factor) - expected).abs() > 1e-6 {
                return Err(refused("an attention factor of its own"));
            }
            if rotary.flag("truncate") == Some(false) {
                return Err(refused("`truncate` = false"));
            }
            put_kind(out);
            out.number(architecture, "rope.scaling.factor", factor);
            out.count(architecture, original_key, original as usize);
            for name in ["beta_fast", "beta_slow"] {
                if let Some(number) = rotary.number(name)? {
                    out.number(architecture, &format!("rope.scaling.yarn_{name}"), number);
                }
            }
        }
        ("llama3", "llama") => {
            let divisors = (LLAMA3_TENSOR.to_owned(), table.divisors());
            out.divisors.push(divisors);
        }
        ("longrope", "phi3") => {
            put_kind(out);
            let attention = f64::from(table.factor);
            out.number(architecture, "rope.scaling.attn_factor", attention);
            for name in ["long", "short"] {
                let divisors =
                    rotary.numbers(&format!("{name}_factor"), table.frequencies.len())?;
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
    source: &ExportSource,
    architecture: &Architecture,
    attention: &GroupedPlan,
    out: &mut ModelMetadata,
) -> Result<(), Error> {
    let (config, plan) = (source.config(), &source.config().plan);
    let is_third = architecture.name == "gemma3";
    let window = windows(source).flatten().next();
    if window.is_some() || !is_third {
        let key = "attention.sliding_window";
        out.count(architecture, key, window.unwrap_or(4096));
        let is_sliding = windows(source).map(|window| window.is_some()).collect();
        let key = "attention.sliding_window_pattern";
        out.put(architecture, key, Value::Flags(is_sliding));
    }
    let softcaps = [
        ("attn_logit_softcapping", attention.softcap),
        ("final_logit_softcapping", plan.final_softcap),
    ];
    for (key, softcap) in softcaps {
        match softcap {
            Some(softcap) => out.number(architecture, key, softcap),
            None if is_third => {}
            None => return Err(source.unsupported(key)),
        }
    }
    if is_third {
        let local = plan.rotary[1].theta;
        out.number(architecture, "rope.freq_base_swa", local);
    }
    // llama.cpp scales the largest models of both generations by the width of the model's share of a head.
    let is_largest = plan.layers.len() == if is_third { 62 } else { 46 };
    let assumed = match is_largest {
        true => config.hidden_size / attention.heads,
        false => attention.head_dim,
    };
    out.query_factor = (attention.scale * (assumed as f64).sqrt()) as f32;
    Ok(())
}

fn describe_experts(source: &ExportSource, architecture: &Architecture, out: &mut ModelMetadata) {
    let layers = source.config().plan.layers.iter();
    let mut experts = layers.filter_map(|layer| match &layer.feed_forward {
        FeedForwardPlan::Experts(plan) => Some(plan),
        FeedForwardPlan::Gated(_) => None,
    });
    if let Some(plan) = experts.next() {
        out.count(architecture, "expert_count", plan.count);
        out.count(architecture, "expert_used_count", plan.chosen);
        let key = "expert_feed_forward_length";
        out.count(architecture, key, plan.expert.width);
    }
}
