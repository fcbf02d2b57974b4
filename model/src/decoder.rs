//! The decoder: embedding, layers, final norm and head, as the plan of its configuration says.
//!
//! Weights are in Hugging Face layout, `[out, in]`. From the embedding to the head, activations are `[n, columns]`
//! with n = b·t rows: the heads of a row are adjacent, and consecutive rows form documents.

use burn::module::{Module, Param};
use burn::tensor::module::embedding;
use burn::tensor::{DType, Device, Int, Tensor, bf16, f16};
use potstill_kernels::{LogitTransform, linear};

use crate::Config;
use crate::attend::{Attend, Documents};
use crate::layers::{DecoderLayer, Linear, MapLayers, Norm, Shapes};
use crate::parameters::{Role, map_parameter};
use crate::rotary::{RotaryAngles, RowPosition};

/// A causal language model.
///
/// The model is a burn module: `model.train()` returns a copy whose parameters are tracked by autodiff, and
/// `model.valid()` a copy without autodiff. Clones share the tensors. See [`crate::named_parameters`] for gradients by
/// name.
#[derive(Module, Debug)]
pub struct Decoder {
    pub(crate) embed: Param<Tensor<2>>,
    pub(crate) layers: Vec<DecoderLayer>,
    pub(crate) norm: Norm,
    pub(crate) head: Option<Linear>,
    #[module(skip)]
    pub(crate) config: Config,
    /// Number of rows of the embedding that are tokens, if later rows are padding.
    #[module(skip)]
    pub(crate) tokens: Option<usize>,
}

impl Decoder {
    /// Makes a model whose parameters have their shapes but no values yet; a parameter is filled with zeros on first
    /// use.
    pub(crate) fn unset(config: &Config, dtype: DType, device: &Device) -> Self {
        let shapes = Shapes {
            dtype,
            device: device.clone(),
        };
        let (v, d) = (config.vocab_size, config.hidden_size);
        let plan = &config.plan;
        let layers = (plan.layers.iter()).map(|layer| DecoderLayer::unset(plan, layer, d, &shapes));
        Self {
            embed: shapes.zeros([v, d]),
            layers: layers.collect(),
            norm: Norm::unset(d, plan.norm, &shapes),
            head: (!config.tie_word_embeddings).then(|| Linear::unset([v, d], false, &shapes)),
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
            softcap: self.config.plan.final_softcap,
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
    ///
    /// The residual stream has the type of the embeddings, which may be f32 in a model of half precision. The hidden states
    /// have the model's type.
    #[must_use]
    pub fn hidden_from(&self, embedded_nd: Tensor<2>, documents: &[usize]) -> Tensor<2> {
        let rows = RowPosition::of_documents(documents);
        let x_nd = self.forward(embedded_nd, &rows, &mut Documents(documents));
        self.normed(x_nd)
    }

    /// Computes the final norm of the residual stream after the last layer: `[n, d]` → `[n, d]` in the model's type.
    pub(crate) fn normed(&self, x_nd: Tensor<2>) -> Tensor<2> {
        self.norm.forward_as(x_nd, self.dtype())
    }

    /// Computes the residual stream after the last layer: embeddings `[n, d]` → `[n, d]`.
    pub(crate) fn forward(
        &self,
        embedded_nd: Tensor<2>,
        rows: &[RowPosition],
        attend: &mut impl Attend,
    ) -> Tensor<2> {
        let rotary = self.rotary_angles(rows);
        let mut x_nd = self.scaled_embeddings(embedded_nd);
        for (index, layer) in self.layers.iter().enumerate() {
            x_nd = layer.forward(index, x_nd, self.dtype(), &rotary, attend);
        }
        x_nd
    }

    /// Computes the angles of each rotary table at these rows.
    pub(crate) fn rotary_angles(&self, rows: &[RowPosition]) -> Vec<RotaryAngles> {
        let tables = self.config.plan.rotary.iter();
        let (dtype, device) = (self.dtype(), self.device());
        tables
            .map(|table| RotaryAngles::new(table, rows, dtype, &device))
            .collect()
    }

    /// Multiplies embeddings by the factor of the family, if it has one.
    pub(crate) fn scaled_embeddings(&self, embedded_nd: Tensor<2>) -> Tensor<2> {
        match self.embedding_scale() {
            Some(scale) => embedded_nd * scale,
            None => embedded_nd,
        }
    }

    /// Factor on the embeddings, rounded to the type of the weights, as in transformers.
    fn embedding_scale(&self) -> Option<f64> {
        let scale = self.config.plan.embedding_scale?;
        Some(match self.dtype() {
            DType::BF16 => bf16::from_f64(scale).to_f64(),
            DType::F16 => f16::from_f64(scale).to_f64(),
            DType::F32 => f64::from(scale as f32),
            _ => scale,
        })
    }

    /// Returns the rows of the embedding of tokens, row by row: `[b, t]` → `[b·t, d]`.
    #[must_use]
    pub fn embedded(&self, ids_bt: Tensor<2, Int>) -> Tensor<2> {
        let [b, t] = ids_bt.dims();
        embedding(self.embed.val(), ids_bt).reshape([b * t, self.config.hidden_size])
    }

    /// Returns the weights of the head `[v, d]`: the embedding if they are tied, and its own weights otherwise.
    #[must_use]
    pub fn head(&self) -> Tensor<2> {
        match &self.head {
            Some(head) => head.weight.dense(self.dtype(), &self.device()),
            None => self.embed.val(),
        }
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

    pub(crate) fn map_layers(self, mapper: &mut impl MapLayers) -> Self {
        let name = "model.embed_tokens.weight".to_owned();
        let embed = map_parameter(mapper, name, Role::Embedding, self.embed);
        let layers = self.layers.into_iter().enumerate();
        let layers = layers
            .map(|(index, layer)| layer.map_parameters(&format!("model.layers.{index}"), mapper));
        Self {
            embed,
            layers: layers.collect(),
            norm: self.norm.map_parameters("model.norm", mapper),
            head: (self.head).map(|head| head.map_with_role("lm_head", Role::Head, mapper)),
            config: self.config,
            tokens: self.tokens,
        }
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
