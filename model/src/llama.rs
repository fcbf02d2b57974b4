//! The Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.
//!
//! Weights are in Hugging Face layout, `[out, in]`. Activations are `[n, columns]`, n = b·t rows, from the
//! embedding to the head: heads lie beside one another in a row, and a row's document is known by its
//! place.

use burn::module::{Module, Param};
use burn::tensor::module::embedding;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use potstill_kernels::{Attention, attention, linear, linear_pair, rms_norm, swiglu_linear};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::attention::Rotary;
use crate::checkpoint::stored_type;
use crate::parameters::{MapParameters, map_parameters};
use crate::{Config, Error};

/// A causal language model of the Llama family.
///
/// A burn module: `model.train()` gives the copy whose parameters are tracked by autodiff, and
/// `model.valid()` the one without. Cloning shares the tensors. See [`crate::named_parameters`] for
/// gradients by name.
#[derive(Module, Debug)]
pub struct Llama {
    pub(crate) embed: Param<Tensor<2>>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Param<Tensor<1>>,
    pub(crate) head: Option<Param<Tensor<2>>>,
    #[module(skip)]
    pub(crate) config: Config,
}

/// One decoder layer; projections are `[out, in]`.
#[derive(Module, Debug)]
pub(crate) struct Layer {
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

impl Llama {
    /// A model with random weights: matrices from a normal distribution with mean 0 and standard
    /// deviation 0.02, norms 1. The same seed gives the same weights, on any device.
    ///
    /// # Errors
    /// [`Error::FloatType`] for a type that models do not run in.
    pub fn init(config: &Config, seed: u64, dtype: DType, device: &Device) -> Result<Self, Error> {
        stored_type(dtype)?;
        let mut random = Random {
            seed,
            stream: 0,
            dtype,
        };
        Ok(map_parameters(
            Self::unset(config, dtype, device),
            &mut random,
        ))
    }

    /// A model in which every parameter has its shape and no value yet: zeros, made on first use.
    pub(crate) fn unset(config: &Config, dtype: DType, device: &Device) -> Self {
        let matrix = |rows, columns| zeros([rows, columns], dtype, device);
        let norm = || zeros([config.hidden_size], dtype, device);
        let (d, wide) = (config.hidden_size, config.intermediate_size);
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let layer = |_| Layer {
            attention_norm: norm(),
            query: matrix(queries, d),
            key: matrix(keys, d),
            value: matrix(keys, d),
            output: matrix(d, queries),
            feed_norm: norm(),
            gate: matrix(wide, d),
            up: matrix(wide, d),
            down: matrix(d, wide),
        };
        Self {
            embed: matrix(config.vocab_size, d),
            layers: (0..config.num_hidden_layers).map(layer).collect(),
            norm: norm(),
            head: (!config.tie_word_embeddings).then(|| matrix(config.vocab_size, d)),
            config: config.clone(),
        }
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The type that the model computes in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.embed.val().dtype()
    }

    /// The device that the weights are on; an autodiff device after `train()`.
    #[must_use]
    pub fn device(&self) -> Device {
        self.embed.val().device()
    }

    /// Hidden states after the final norm: token ids `[b, t]` → `[b, t, d]` in the model's type.
    ///
    /// Causal: the state at a position depends on the tokens up to it, so padding on the right changes
    /// nothing before it. Ids must be below `vocab_size`, and t within the context; the caller checks.
    #[must_use]
    pub fn hidden(&self, ids_bt: Tensor<2, Int>) -> Tensor<3> {
        let [b, t] = ids_bt.dims();
        self.hidden_from(self.embedded(ids_bt), &vec![t; b])
            .reshape([b, t, self.config.hidden_size])
    }

    /// Hidden states of rows that hold several documents behind one another: ids `[b, t]` → `[b, t, d]`.
    ///
    /// `lengths[row]` has the documents' lengths in tokens, in order; what is left of a row counts as one
    /// more. A document's states are those it has alone: its positions start at 0, and it sees nothing of
    /// the others. A document, not the row, has to be within the context; the caller checks, as for ids.
    #[must_use]
    pub fn hidden_packed(&self, ids_bt: Tensor<2, Int>, lengths: &[Vec<usize>]) -> Tensor<3> {
        let [b, t] = ids_bt.dims();
        self.hidden_from(self.embedded(ids_bt), &documents(b, t, lengths))
            .reshape([b, t, self.config.hidden_size])
    }

    /// Hidden states `[n, d]` from embeddings `[n, d]`; see [`Self::embedded`]. `documents` are the lengths
    /// of what lies behind one another, together n.
    #[must_use]
    pub fn hidden_from(&self, embedded_nd: Tensor<2>, documents: &[usize]) -> Tensor<2> {
        let positions: Vec<usize> = documents.iter().flat_map(|length| 0..*length).collect();
        let rotary = self.rotary(&positions);
        let how = self.config.attention();
        let mut x_nd = embedded_nd;
        for layer in &self.layers {
            let (q_nc, k_nc, v_nc) = layer.project(&self.config, x_nd.clone(), &rotary);
            let mixed_nc = attention(q_nc, k_nc, v_nc, documents, &how);
            x_nd = layer.finish(&self.config, x_nd, mixed_nc);
        }
        self.final_norm(x_nd)
    }

    /// Embeddings of tokens, row by row: `[b, t]` → `[b·t, d]`.
    #[must_use]
    pub fn embedded(&self, ids_bt: Tensor<2, Int>) -> Tensor<2> {
        let [b, t] = ids_bt.dims();
        embedding(self.embed.val(), ids_bt).reshape([b * t, self.config.hidden_size])
    }

    /// The head's weights `[v, d]`: the embedding when tied, else its own.
    #[must_use]
    pub fn head(&self) -> Tensor<2> {
        self.head.as_ref().unwrap_or(&self.embed).val()
    }

    /// Logits of hidden states: `[n, d]` → `[n, v]` in the model's type.
    #[must_use]
    pub fn logits(&self, hidden_nd: Tensor<2>) -> Tensor<2> {
        linear(hidden_nd, self.head())
    }

    /// `[n, d]` → `[n, d]`.
    pub(crate) fn final_norm(&self, x_nd: Tensor<2>) -> Tensor<2> {
        rms_norm(x_nd, self.norm.val(), self.config.rms_norm_eps)
    }

    /// The angles of rows at these positions.
    pub(crate) fn rotary(&self, positions: &[usize]) -> Rotary {
        Rotary::new(
            positions,
            self.config.head_dim,
            self.config.rope_theta,
            self.dtype(),
            &self.device(),
        )
    }
}

/// The documents of b rows of t tokens: their lengths, and what is left of each row.
///
/// `lengths[row]` has the lengths of a row's documents, in order; a row without an entry is one document.
#[must_use]
pub fn documents(b: usize, t: usize, lengths: &[Vec<usize>]) -> Vec<usize> {
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

impl Layer {
    /// Queries, keys and values with their positions: `[n, d]` → `[n, h·e]`, `[n, g·e]` twice.
    pub(crate) fn project(
        &self,
        config: &Config,
        x_nd: Tensor<2>,
        rotary: &Rotary,
    ) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
        let x_nd = rms_norm(x_nd, self.attention_norm.val(), config.rms_norm_eps);
        let q_nc = linear(x_nd.clone(), self.query.val());
        let [k_nc, v_nc] = linear_pair(x_nd, [&self.key, &self.value].map(Param::val));
        (rotary.turn(q_nc), rotary.turn(k_nc), v_nc)
    }

    /// The rest of the layer, from the heads' outputs `[n, h·e]` and the residual `[n, d]`.
    pub(crate) fn finish(
        &self,
        config: &Config,
        x_nd: Tensor<2>,
        mixed_nc: Tensor<2>,
    ) -> Tensor<2> {
        let x_nd = x_nd + linear(mixed_nc, self.output.val());
        let y_nd = rms_norm(x_nd.clone(), self.feed_norm.val(), config.rms_norm_eps);
        let [gate_nw, up_nw] = linear_pair(y_nd, [&self.gate, &self.up].map(Param::val));
        x_nd + swiglu_linear(gate_nw, up_nw, self.down.val())
    }
}

impl Config {
    /// How the model's heads attend.
    pub(crate) fn attention(&self) -> Attention {
        Attention {
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

/// Fills parameters in their order: each draws from a ChaCha stream of its own.
struct Random {
    seed: u64,
    stream: u64,
    dtype: DType,
}

impl MapParameters for Random {
    fn matrix(&mut self, _: &str, unset: Tensor<2>) -> Tensor<2> {
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        generator.set_stream(self.stream);
        self.stream += 1;
        let shape = unset.dims();
        let values: Vec<f64> = (0..shape[0] * shape[1])
            .map(|_| 0.02 * normal(&mut generator))
            .collect();
        let data = TensorData::new(values, shape);
        Tensor::from_data(data, (&unset.device(), self.dtype))
    }

    fn vector(&mut self, _: &str, unset: Tensor<1>) -> Tensor<1> {
        unset.ones_like()
    }
}

/// One draw from the standard normal distribution (Box and Muller 1958, the cosine branch).
fn normal(generator: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - generator.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * generator.random::<f64>()).cos()
}
