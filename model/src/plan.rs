//! The description of a decoder: what each layer computes, and the names of its weights.
//!
//! A family (`families`) makes a [`DecoderPlan`] from `config.json`. The layers (`layers`) follow it. Names are parts of
//! Hugging Face names: a norm called `input_layernorm` of layer 3 is `model.layers.3.input_layernorm.weight`.

use potstill_kernels::{AttentionOptions, GateActivation};

use crate::rotary_table::RotaryTable;

/// The computation of a decoder, from embedding to logits.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DecoderPlan {
    pub(crate) layers: Vec<LayerPlan>,
    /// Rotary tables, to which the layers refer by index.
    pub(crate) rotary: Vec<RotaryTable>,
    pub(crate) norm: NormPlan,
    /// Factor on the embeddings, rounded to the type of the weights; `None` for 1.
    pub(crate) embedding_scale: Option<f64>,
    /// Constant c of the softcap c · tanh(z / c) on the logits.
    pub(crate) final_softcap: Option<f64>,
}

/// Constants of all RMS norms of a decoder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct NormPlan {
    /// Constant ε that is added to the mean square.
    pub(crate) epsilon: f64,
    /// Number that is added to the stored gain: 1 for Gemma, 0 for the others.
    pub(crate) gain_offset: f64,
}

/// The computation of one layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LayerPlan {
    pub(crate) norms: LayerNorms,
    pub(crate) attention: AttentionPlan,
    pub(crate) feed_forward: FeedForwardPlan,
}

/// Names of a layer's norms at the four places where families have one; `None` where there is none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct LayerNorms {
    /// Before attention.
    pub(crate) input: Option<&'static str>,
    /// On the output of attention, before it is added to the residual stream.
    pub(crate) attention_output: Option<&'static str>,
    /// Before the feed-forward block.
    pub(crate) feed_forward: Option<&'static str>,
    /// On the output of the feed-forward block, before it is added to the residual stream.
    pub(crate) feed_forward_output: Option<&'static str>,
}

impl LayerNorms {
    /// Before both blocks, as in most families.
    pub(crate) const BEFORE: Self = Self {
        input: Some("input_layernorm"),
        attention_output: None,
        feed_forward: Some("post_attention_layernorm"),
        feed_forward_output: None,
    };
    /// Before and after both blocks, as in Gemma 2 and 3.
    pub(crate) const BEFORE_AND_AFTER: Self = Self {
        input: Some("input_layernorm"),
        attention_output: Some("post_attention_layernorm"),
        feed_forward: Some("pre_feedforward_layernorm"),
        feed_forward_output: Some("post_feedforward_layernorm"),
    };
    /// After both blocks, as in OLMo 2.
    pub(crate) const AFTER: Self = Self {
        input: None,
        attention_output: Some("post_attention_layernorm"),
        feed_forward: None,
        feed_forward_output: Some("post_feedforward_layernorm"),
    };

    /// Number of norms.
    pub(crate) fn count(&self) -> usize {
        let norms = [
            self.input,
            self.attention_output,
            self.feed_forward,
            self.feed_forward_output,
        ];
        norms.iter().flatten().count()
    }
}

/// The attention of a layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum AttentionPlan {
    /// Grouped-query attention.
    Grouped(GroupedPlan),
    /// DeepSeek's latent attention.
    Latent(LatentPlan),
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GroupedPlan {
    /// Number of query heads, h.
    pub(crate) heads: usize,
    /// Number of key and value heads, g; divides `heads`.
    pub(crate) key_heads: usize,
    /// Width of a head, e.
    pub(crate) head_dim: usize,
    /// Factor on q·k.
    pub(crate) scale: f64,
    /// Constant of the softcap on the scores.
    pub(crate) softcap: Option<f64>,
    /// Number of positions that a row sees, its own included; `None` for all.
    pub(crate) window: Option<usize>,
    /// Index of the rotary table; `None` for a layer without positions.
    pub(crate) rotary: Option<usize>,
    /// Whether the projections of queries, keys and values have a bias.
    pub(crate) input_bias: bool,
    /// Whether the output projection has a bias.
    pub(crate) output_bias: bool,
    pub(crate) query_key_norm: QueryKeyNorm,
    /// Whether queries, keys and values are one projection, `qkv_proj`.
    pub(crate) fused: bool,
    /// Whether each query head has a sink: one more logit in the softmax, which is dropped afterwards.
    pub(crate) sinks: bool,
}

/// The norms of queries and keys, `q_norm` and `k_norm`, before rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QueryKeyNorm {
    /// There is none.
    None,
    /// Each head is normed, with one gain for all heads.
    Head,
    /// All heads of a row are normed together.
    Row,
}

impl GroupedPlan {
    pub(crate) fn options(&self) -> AttentionOptions {
        AttentionOptions {
            heads: self.heads,
            key_heads: self.key_heads,
            scale: self.scale,
            softcap: self.softcap,
            window: self.window,
        }
    }

    /// Number of columns of all query heads.
    pub(crate) fn query_columns(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Number of columns of all key heads, and of all value heads.
    pub(crate) fn key_columns(&self) -> usize {
        self.key_heads * self.head_dim
    }
}

/// Latent attention (DeepSeek-V2, 2024, section 2.1): keys and values of all heads are projections of one latent vector,
/// except for a rotated part of the key that all heads share.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LatentPlan {
    pub(crate) heads: usize,
    /// Width of the part of queries and keys without positions.
    pub(crate) plain_width: usize,
    /// Width of the rotated part of queries and keys.
    pub(crate) rotary_width: usize,
    /// Width of a value head.
    pub(crate) value_width: usize,
    /// Width of the latent vector of keys and values.
    pub(crate) key_rank: usize,
    /// Width of the latent vector of queries; `None` if queries are projected at once.
    pub(crate) query_rank: Option<usize>,
    /// Factor on q·k.
    pub(crate) scale: f64,
    /// Index of the rotary table.
    pub(crate) rotary: usize,
    /// Whether the pairs that are rotated are adjacent columns in the weights.
    pub(crate) interleaved: bool,
    /// Whether the projections of the latent vectors and of the output have a bias.
    pub(crate) bias: bool,
}

impl LatentPlan {
    /// Width of a query or key head.
    pub(crate) fn key_width(&self) -> usize {
        self.plain_width + self.rotary_width
    }

    /// Options with a key head for each query head.
    pub(crate) fn options(&self) -> AttentionOptions {
        AttentionOptions {
            heads: self.heads,
            key_heads: self.heads,
            scale: self.scale,
            softcap: None,
            window: None,
        }
    }
}

/// The feed-forward block of a layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum FeedForwardPlan {
    /// One gated block.
    Gated(GatedPlan),
    /// A choice of experts for each row.
    Experts(ExpertsPlan),
}

/// A gated feed-forward block: down(activation(gate(x)) · up(x)).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct GatedPlan {
    /// Width inside the block, w.
    pub(crate) width: usize,
    pub(crate) activation: GateActivation,
    pub(crate) bias: bool,
    /// Whether gate and up are one projection, `gate_up_proj`.
    pub(crate) fused: bool,
}

/// A mixture of experts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ExpertsPlan {
    /// Number of experts, E.
    pub(crate) count: usize,
    /// Number of experts of a row.
    pub(crate) chosen: usize,
    /// Each expert.
    pub(crate) expert: GatedPlan,
    /// Width of the expert that every row uses, `shared_experts`.
    pub(crate) shared_width: Option<usize>,
    /// Whether the weights of all experts are stacked, as in gpt-oss.
    pub(crate) stacked: bool,
    pub(crate) router: RouterPlan,
}

/// The choice and the weights of the experts of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RouterPlan {
    /// Name below `mlp`.
    pub(crate) name: &'static str,
    pub(crate) scoring: Scoring,
    /// Whether the router has a bias.
    pub(crate) bias: bool,
    /// Whether `e_score_correction_bias` is added to the scores for the choice, but not for the weights.
    pub(crate) correction_bias: bool,
    /// Groups of experts of which only some are open to a row.
    pub(crate) groups: Option<GroupPlan>,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub(crate) normalised: bool,
    /// Factor on the weights.
    pub(crate) scale: f64,
}

/// The function from a router's logits to the scores of the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each logit.
    Sigmoid,
    /// Softmax over the chosen experts; the choice is by logit.
    SoftmaxOfChosen,
}

/// Groups of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GroupPlan {
    /// Number of groups of equal size.
    pub(crate) count: usize,
    /// Number of groups that are open to a row.
    pub(crate) chosen: usize,
    /// Number of a group's largest scores whose sum is the score of the group.
    pub(crate) summed: usize,
}
