//! The Decoder-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.
//!
//! Weights are in Hugging Face layout, `[out, in]`. From the embedding to the head, activations are `[n, columns]`
//! with n = b·t rows: the heads of a row are adjacent, and consecutive rows form documents.

use burn::module::{Module, Param};
use burn::tensor::module::embedding;
use burn::tensor::{DType, Device, Int, Tensor};
use potstill_kernels::{
    AttentionOptions, GateActivation, LogitTransform, attention, gated_linear, linear, linear_pair,
    rms_norm,
};

use crate::Config;
use crate::rotary::RotaryAngles;

/// A causal language model with a KV cache and weights in Hugging Face layout.
///
/// The model is a burn module: `model.train()` returns a copy whose parameters are tracked by autodiff, and
/// `model.valid()` a copy without autodiff. Clones share the tensors. See [`crate::named_parameters`] for gradients by
/// name.
#[derive(Module, Debug)]
pub struct Decoder {
    pub(crate) embed: Param<Tensor<2>>,
    pub(crate) layers: Vec<DecoderLayer>,
    pub(crate) norm: Param<Tensor<1>>,
    pub(crate) head: Option<Param<Tensor<2>>>,
    #[module(skip)]
    pub(crate) config: Config,
    /// Number of rows of the embedding that are tokens, if later rows are padding.
    #[module(skip)]
    pub(crate) tokens: Option<usize>,
}

/// One decoder layer; projections are `[out, in]`.
#[derive(Module, Debug)]
pub(crate) struct DecoderLayer {
    pub(crate) attention_norm: Param<Tensor<1>>,
    pub(crate) query: Param<Tensor<2>>,
    pub(crate) key: Param<Tensor<2>>,
    pub(crate) value: Param<Tensor<2>>,
    pub(crate) output: Param<Tensor<2>>,
    pub(crate) feed_norm: Param<Tensor<1>>,
    pub(crate) gate: Param<Tensor<2>>,
    pub(crate) up: Param<Tensor<2>>,
    pub(crate) down: Param<Tensor<2>>,
}

impl Decoder {
    /// Makes a model whose parameters have their shapes but no values yet; a parameter is filled with zeros on first
    /// use.
    pub(crate) fn unset(config: &Config, dtype: DType, device: &Device) -> Self {
        let matrix = |rows, columns| zeros([rows, columns], dtype, device);
        let norm = || zeros([config.hidden_size], dtype, device);
        let (d, width) = (config.hidden_size, config.intermediate_size);
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let layer = |_| DecoderLayer {
            attention_norm: norm(),
            query: matrix(queries, d),
            key: matrix(keys, d),
            value: matrix(keys, d),
            output: matrix(d, queries),
            feed_norm: norm(),
            gate: matrix(width, d),
            up: matrix(width, d),
            down: matrix(d, width),
        };
        Self {
            embed: matrix(config.vocab_size, d),
            layers: (0..config.num_hidden_layers).map(layer).collect(),
            norm: norm(),
            head: (!config.tie_word_embeddings).then(|| matrix(config.vocab_size, d)),
            config: config.clone(),
            tokens: None,
        }
    }

    /// Sets the number of token ids of the model's tokenizer. If the embedding has more rows, which pad it to a round
    /// number, the model's distributions are over the tokens alone.
    ///
    /// The padding's logits are not those of any token, and models of a family pad to different sizes. A checkpoint does
    /// not record the number, so whoever loads a model beside its tokenizer sets it.
    #[must_use]
    pub fn with_token_count(self, tokens: usize) -> Self {
        let tokens = (tokens < self.config.vocab_size).then_some(tokens);
        Self { tokens, ..self }
    }

    /// Returns the number of token ids that the model's distributions are over.
    #[must_use]
    pub fn token_count(&self) -> usize {
        self.tokens.unwrap_or(self.config.vocab_size)
    }

    /// Returns the transform from the raw logits, the products of hidden states and [`Self::head`], to the logits of the
    /// softmax, at temperature 1.
    #[must_use]
    pub fn logit_transform(&self) -> LogitTransform {
        LogitTransform {
            vocab: self.tokens,
            ..LogitTransform::default()
        }
    }

    /// Returns the configuration of the model.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Returns the type that the model computes in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.embed.val().dtype()
    }

    /// Returns the device of the weights; an autodiff device after `train()`.
    #[must_use]
    pub fn device(&self) -> Device {
        self.embed.val().device()
    }

    /// Computes hidden states after the final norm: token ids `[b, t]` → `[b, t, d]` in the model's type.
    ///
    /// The state at a position depends on the tokens up to that position only, so padding on the right does not change
    /// the states before it. The caller ensures that ids are below `vocab_size` and that t is within the context.
    #[must_use]
    pub fn hidden(&self, ids_bt: Tensor<2, Int>) -> Tensor<3> {
        let [b, t] = ids_bt.dims();
        self.hidden_from(self.embedded(ids_bt), &vec![t; b])
            .reshape([b, t, self.config.hidden_size])
    }

    /// Computes hidden states of packed rows, which hold several consecutive documents: ids `[b, t]` → `[b, t, d]`.
    ///
    /// `lengths[row]` holds the lengths of the row's documents in tokens, in order; the rest of the row counts as one more
    /// document. A document has the states that it has on its own: its positions start at 0, and it does not see other
    /// documents. The caller ensures that ids are below `vocab_size` and that each document is within the context.
    #[must_use]
    pub fn hidden_packed(&self, ids_bt: Tensor<2, Int>, lengths: &[Vec<usize>]) -> Tensor<3> {
        let [b, t] = ids_bt.dims();
        self.hidden_from(self.embedded(ids_bt), &document_lengths(b, t, lengths))
            .reshape([b, t, self.config.hidden_size])
    }

    /// Computes hidden states `[n, d]` from embeddings `[n, d]`; see [`Self::embedded`]. `documents` holds the lengths of
    /// consecutive documents, whose sum is n.
    #[must_use]
    pub fn hidden_from(&self, embedded_nd: Tensor<2>, documents: &[usize]) -> Tensor<2> {
        let positions: Vec<usize> = documents.iter().flat_map(|length| 0..*length).collect();
        let rotary = self.rotary(&positions);
        let options = self.config.attention();
        let mut x_nd = embedded_nd;
        for layer in &self.layers {
            let (q_nc, k_nc, v_nc) = layer.project(&self.config, x_nd.clone(), &rotary);
            let heads_nc = attention(q_nc, k_nc, v_nc, None, documents, &options);
            x_nd = layer.finish(&self.config, x_nd, heads_nc);
        }
        self.final_norm(x_nd)
    }

    /// Returns the embeddings of tokens, row by row: `[b, t]` → `[b·t, d]`.
    #[must_use]
    pub fn embedded(&self, ids_bt: Tensor<2, Int>) -> Tensor<2> {
        let [b, t] = ids_bt.dims();
        embedding(self.embed.val(), ids_bt).reshape([b * t, self.config.hidden_size])
    }

    /// Returns the weights of the head `[v, d]`: the embedding if they are tied, and its own weights otherwise.
    #[must_use]
    pub fn head(&self) -> Tensor<2> {
        self.head.as_ref().unwrap_or(&self.embed).val()
    }

    /// Computes the raw logits of hidden states, to which [`Self::logit_transform`] is not yet applied: `[n, d]` → `[n, v]`
    /// in the model's type.
    #[must_use]
    pub fn raw_logits(&self, hidden_nd: Tensor<2>) -> Tensor<2> {
        linear(hidden_nd, self.head())
    }

    /// Computes the logits of the softmax over the tokens: `[n, d]` → `[n, tokens]` in the model's type; see
    /// [`Self::token_count`].
    #[must_use]
    pub fn logits(&self, hidden_nd: Tensor<2>) -> Tensor<2> {
        self.logit_transform().apply(self.raw_logits(hidden_nd))
    }

    /// Applies the final norm: `[n, d]` → `[n, d]`.
    pub(crate) fn final_norm(&self, x_nd: Tensor<2>) -> Tensor<2> {
        rms_norm(x_nd, self.norm.val(), self.config.rms_norm_eps, 0.0)
    }

    /// Computes the rotary angles of rows at these positions.
    pub(crate) fn rotary(&self, positions: &[usize]) -> RotaryAngles {
        RotaryAngles::new(
            positions,
            self.config.head_dim,
            self.config.rope_theta,
            self.dtype(),
            &self.device(),
        )
    }
}

/// Returns the lengths of all documents of b rows of t tokens; the rest of each row counts as a document.
///
/// `lengths[row]` holds the lengths of a row's documents, in order; a row without an entry is one document.
#[must_use]
pub fn document_lengths(b: usize, t: usize, lengths: &[Vec<usize>]) -> Vec<usize> {
    let mut documents = Vec::new();
    for row in 0..b {
        let mut left = t;
        for length in lengths.get(row).into_iter().flatten() {
            documents.push(left.min(*length));
            left -= left.min(*length);
        }
        documents.push(left);
    }
    documents
}

impl DecoderLayer {
    /// Computes queries, keys and values with rotary positions: `[n, d]` → `[n, h·e]` and two tensors `[n, g·e]`.
    pub(crate) fn project(
        &self,
        config: &Config,
        x_nd: Tensor<2>,
        rotary: &RotaryAngles,
    ) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
        let x_nd = rms_norm(x_nd, self.attention_norm.val(), config.rms_norm_eps, 0.0);
        let q_nc = linear(x_nd.clone(), self.query.val());
        let [k_nc, v_nc] = linear_pair(x_nd, [&self.key, &self.value].map(Param::val));
        (rotary.rotate(q_nc), rotary.rotate(k_nc), v_nc)
    }

    /// Computes the rest of the layer from the heads' outputs `[n, h·e]` and the residual stream `[n, d]`.
    pub(crate) fn finish(
        &self,
        config: &Config,
        x_nd: Tensor<2>,
        heads_nc: Tensor<2>,
    ) -> Tensor<2> {
        let x_nd = x_nd + linear(heads_nc, self.output.val());
        let y_nd = rms_norm(x_nd.clone(), self.feed_norm.val(), config.rms_norm_eps, 0.0);
        let [gate_nw, up_nw] = linear_pair(y_nd, [&self.gate, &self.up].map(Param::val));
        x_nd + gated_linear(gate_nw, up_nw, self.down.val(), GateActivation::Silu)
    }
}

impl Config {
    /// Returns the options of the model's attention.
    pub(crate) fn attention(&self) -> AttentionOptions {
        AttentionOptions {
            heads: self.num_attention_heads,
            key_heads: self.num_key_value_heads,
            scale: 1.0 / (self.head_dim as f64).sqrt(),
            softcap: None,
            window: None,
        }
    }
}

fn zeros<const D: usize>(shape: [usize; D], dtype: DType, device: &Device) -> Param<Tensor<D>> {
    Param::uninitialized(
        burn::module::ParamId::new(),
        move |device, require_grad| {
            Tensor::zeros(shape, (device, dtype)).set_require_grad(require_grad)
        },
        device.clone(),
        true,
        shape.into(),
    )
}
