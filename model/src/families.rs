//! The model families: each is a function from the keys of `config.json` to the plan of the decoder.
//!
//! A family's file is to be read beside the file of the same name in transformers. What most families share is in
//! [`Shape`]; a family states what differs. To add one: a function here or in a new file below, and its line in
//! [`FAMILIES`].

mod deepseek;
mod gemma;
mod gpt_oss;
mod llama;
mod phi3;
mod qwen;

use potstill_kernels::GateActivation;
use serde_json::Value;

use crate::Error;
use crate::keys::Keys;
use crate::limits::MODEL_LAYERS;
use crate::plan::{
    AttentionPlan, DecoderPlan, FeedForwardPlan, GatedPlan, GroupedPlan, LayerNorms, LayerPlan,
    NormPlan, QueryKeyNorm,
};
use crate::rotary_table::{RotaryKeys, RotaryTable};

/// A family, and the defaults of its keys that differ between families.
pub(crate) struct Family {
    /// Value of `model_type`.
    pub(crate) model_type: &'static str,
    /// Value of `architectures`.
    pub(crate) architecture: &'static str,
    /// Default of `max_position_embeddings`.
    pub(crate) context: usize,
    /// Default of `tie_word_embeddings`.
    pub(crate) tied: bool,
    /// Reads the plan.
    pub(crate) plan: fn(&Keys) -> Result<DecoderPlan, Error>,
}

/// All families.
pub(crate) const FAMILIES: [Family; 13] = [
    family("llama", "LlamaForCausalLM", 2048, false, llama::llama),
    family(
        "mistral",
        "MistralForCausalLM",
        131_072,
        false,
        llama::mistral,
    ),
    family("olmo2", "Olmo2ForCausalLM", 2048, false, llama::olmo2),
    family(
        "smollm3",
        "SmolLM3ForCausalLM",
        32_768,
        true,
        llama::smollm3,
    ),
    family("qwen2", "Qwen2ForCausalLM", 32_768, false, qwen::qwen2),
    family("qwen3", "Qwen3ForCausalLM", 32_768, false, qwen::qwen3),
    family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        32_768,
        false,
        qwen::qwen3_moe,
    ),
    family("gemma2", "Gemma2ForCausalLM", 8192, true, gemma::gemma2),
    family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        131_072,
        true,
        gemma::gemma3,
    ),
    family("phi3", "Phi3ForCausalLM", 4096, false, phi3::phi3),
    family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        2048,
        false,
        deepseek::v2,
    ),
    family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        4096,
        false,
        deepseek::v3,
    ),
    family(
        "gpt_oss",
        "GptOssForCausalLM",
        131_072,
        false,
        gpt_oss::gpt_oss,
    ),
];

const fn family(
    model_type: &'static str,
    architecture: &'static str,
    context: usize,
    tied: bool,
    plan: fn(&Keys) -> Result<DecoderPlan, Error>,
) -> Family {
    Family {
        model_type,
        architecture,
        context,
        tied,
        plan,
    }
}

/// Finds the family of a configuration by its `model_type`.
pub(crate) fn find(keys: &Keys) -> Result<&'static Family, Error> {
    let names = || {
        let names = FAMILIES.iter().map(|family| family.model_type);
        names.collect::<Vec<_>>().join(", ")
    };
    match keys.get("model_type") {
        Some(Value::String(name)) => FAMILIES
            .iter()
            .find(|family| family.model_type == name)
            .ok_or_else(|| {
                let why = format!("\"{name}\" is not supported, only {}", names());
                keys.unsupported("model_type", why)
            }),
        _ => Err(keys.wrong("model_type", format!("absent, must be one of {}", names()))),
    }
}

/// The sizes that all families name alike, and the defaults of a family for the others.
struct Shape {
    hidden: usize,
    width: usize,
    layers: usize,
    heads: usize,
    key_heads: usize,
    head_dim: usize,
    norm: NormPlan,
    context: usize,
}

impl Shape {
    /// Reads the sizes. `head_dim` and `epsilon` are the family's defaults; without the first it is `hidden_size` /
    /// `num_attention_heads`.
    fn read(keys: &Keys, head_dim: Option<usize>, epsilon: f64) -> Result<Self, Error> {
        let hidden = keys.count("hidden_size", None)?;
        let heads = keys.count("num_attention_heads", None)?;
        let key_heads = keys.count("num_key_value_heads", Some(heads))?;
        let head_dim = keys.count("head_dim", head_dim.or(Some(hidden / heads)))?;
        if !heads.is_multiple_of(key_heads) {
            let why = format!("{key_heads} does not divide num_attention_heads, {heads}");
            return Err(keys.wrong("num_key_value_heads", why));
        }
        if !head_dim.is_multiple_of(2) {
            let why = format!("{head_dim} is odd, but rotary positions rotate pairs of numbers");
            return Err(keys.wrong("head_dim", why));
        }
        Ok(Self {
            hidden,
            width: keys.count("intermediate_size", None)?,
            layers: layers(keys)?,
            heads,
            key_heads,
            head_dim,
            norm: NormPlan {
                epsilon: keys.number("rms_norm_eps", epsilon)?,
                gain_offset: 0.0,
            },
            context: find(keys)?.context_of(keys)?,
        })
    }

    /// Grouped-query attention without biases and norms, over all positions, with the first rotary table.
    fn attention(&self) -> GroupedPlan {
        GroupedPlan {
            heads: self.heads,
            key_heads: self.key_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f64).powf(-0.5),
            softcap: None,
            window: None,
            rotary: Some(0),
            input_bias: false,
            output_bias: false,
            query_key_norm: QueryKeyNorm::None,
            fused: false,
            sinks: false,
        }
    }

    /// A gated feed-forward block with SiLU, without biases.
    fn gated(&self) -> GatedPlan {
        GatedPlan {
            width: self.width,
            activation: GateActivation::Silu,
            bias: false,
            fused: false,
        }
    }

    /// Reads the one rotary table of a family. `theta` is the family's default.
    fn rotary(&self, keys: &Keys, theta: f64) -> Result<RotaryTable, Error> {
        let rotary = RotaryKeys::find(keys, "full_attention", theta)?;
        rotary.table(rotary.width(self.head_dim)?, self.context)
    }

    /// A decoder with one rotary table and norms before both blocks.
    fn decoder(
        &self,
        rotary: RotaryTable,
        layer: impl Fn(usize) -> (GroupedPlan, FeedForwardPlan),
    ) -> DecoderPlan {
        let layer = |index| {
            let (attention, feed_forward) = layer(index);
            LayerPlan {
                norms: LayerNorms::BEFORE,
                attention: AttentionPlan::Grouped(attention),
                feed_forward,
            }
        };
        DecoderPlan {
            layers: (0..self.layers).map(layer).collect(),
            rotary: vec![rotary],
            norm: self.norm,
            embedding_scale: None,
            final_softcap: None,
        }
    }

    /// Reads the window of each layer: from `layer_types` if it is there, otherwise `sliding` decides by the layer's
    /// index.
    fn windows(
        &self,
        keys: &Keys,
        sliding: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>, Error> {
        let types = keys.per_layer("layer_types", self.layers)?;
        let is_sliding = |layer: usize| {
            match types.map(|types| types[layer].as_str()) {
            None => Ok(sliding(layer)),
            Some(Some("full_attention")) => Ok(false),
            Some(Some("sliding_attention")) => Ok(true),
            Some(_) => Err(keys.unsupported(
                "layer_types",
                format!(
                    "entry {layer} is not supported, only \"full_attention\" and \"sliding_attention\""
                ),
            )),
        }
        };
        let window = |layer| match is_sliding(layer)? {
            true => Ok(Some(keys.count("sliding_window", None)?)),
            false => Ok(None),
        };
        (0..self.layers).map(window).collect()
    }
}

impl Family {
    /// Reads the length of the context.
    pub(crate) fn context_of(&self, keys: &Keys) -> Result<usize, Error> {
        keys.count("max_position_embeddings", Some(self.context))
    }
}

/// Reads the number of layers. A layer is far larger than its entry in a list, so a bound on the number keeps the plan of
/// an absurd configuration small.
fn layers(keys: &Keys) -> Result<usize, Error> {
    let layers = keys.count("num_hidden_layers", None)?;
    match layers <= MODEL_LAYERS {
        true => Ok(layers),
        false => Err(keys.wrong(
            "num_hidden_layers",
            format!("{layers} is more than the {MODEL_LAYERS} layers that are supported"),
        )),
    }
}
