//! The Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.
//!
//! Weights are in Hugging Face layout, `[out, in]`; a layer computes x·Wᵀ, which costs no copy: the
//! matrix product reads the transposed view. Activations are `[n, d]` with n = b·t rows wherever
//! positions do not matter.

use burn::module::{Module, Param};
use burn::tensor::activation::silu;
use burn::tensor::module::embedding;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::attention::{Rotary, attend, causal, document_bias, statistics_dtype};
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
        let [_, t] = ids_bt.dims();
        self.hidden_at(ids_bt, &[(0..t).collect()])
    }

    /// Hidden states of rows that hold several documents behind one another: ids `[b, t]` → `[b, t, d]`.
    ///
    /// `lengths[row]` has the documents' lengths in tokens, in order; what is left of a row counts as one
    /// more. A document's states are those it has alone: its positions start at 0, and it sees nothing of
    /// the others. A document, not the row, has to be within the context; the caller checks, as for ids.
    /// All scores `[b, h, t, t]` of a layer exist at once, and with autodiff those of every layer.
    #[must_use]
    pub fn hidden_packed(&self, ids_bt: Tensor<2, Int>, lengths: &[Vec<usize>]) -> Tensor<3> {
        let [b, t] = ids_bt.dims();
        let row = |row: usize| -> Vec<usize> {
            let lengths = lengths.get(row).map(Vec::as_slice).unwrap_or_default();
            let documents = lengths.iter().flat_map(|length| 0..*length);
            documents.chain(0..t).take(t).collect()
        };
        let mut positions: Vec<Vec<usize>> = (0..b.max(1)).map(row).collect();
        // Rows that are alike share one table.
        if positions.iter().all(|row| Some(row) == positions.first()) {
            positions.truncate(1);
        }
        self.hidden_at(ids_bt, &positions)
    }

    /// `positions` has one row for each of the batch, or one for all. A 0 begins a document.
    fn hidden_at(&self, ids_bt: Tensor<2, Int>, positions: &[Vec<usize>]) -> Tensor<3> {
        let [b, t] = ids_bt.dims();
        let rotary = self.rotary(positions);
        let one_document = positions.iter().flatten().copied().eq(0..t);
        // One bias serves all layers; burn's own attention, which has no gradient, needs none.
        let bias = (!one_document || self.embed.val().is_autodiff())
            .then(|| document_bias(positions, self.dtype(), &self.device()));
        let mut x_nd = self.embed(ids_bt);
        for layer in &self.layers {
            let (q_bhte, k_bgte, v_bgte) = layer.project(&self.config, x_nd.clone(), b, &rotary);
            let mixed_bhte = match &bias {
                None => causal(q_bhte, k_bgte, v_bgte),
                Some(bias) => attend(q_bhte, k_bgte, v_bgte, bias.clone()),
            };
            x_nd = layer.finish(&self.config, x_nd, mixed_bhte);
        }
        self.final_norm(x_nd)
            .reshape([b, t, self.config.hidden_size])
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

    /// `[b, t]` → `[n, d]`.
    pub(crate) fn embed(&self, ids_bt: Tensor<2, Int>) -> Tensor<2> {
        let [b, t] = ids_bt.dims();
        embedding(self.embed.val(), ids_bt).reshape([b * t, self.config.hidden_size])
    }

    /// `[n, d]` → `[n, d]`.
    pub(crate) fn final_norm(&self, x_nd: Tensor<2>) -> Tensor<2> {
        rms_norm(x_nd, self.norm.val(), self.config.rms_norm_eps)
    }

    pub(crate) fn rotary(&self, positions: &[Vec<usize>]) -> Rotary {
        Rotary::new(
            positions,
            self.config.head_dim,
            self.config.rope_theta,
            self.dtype(),
            &self.device(),
        )
    }
}

impl Layer {
    /// Queries, keys and values with their positions: `[n, d]` → `[b, h, t, e]`, `[b, g, t, e]` twice.
    pub(crate) fn project(
        &self,
        config: &Config,
        x_nd: Tensor<2>,
        b: usize,
        rotary: &Rotary,
    ) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        let t = x_nd.dims()[0] / b.max(1);
        let x_nd = rms_norm(x_nd, self.attention_norm.val(), config.rms_norm_eps);
        let (h, g, e) = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        );
        let heads = |weight: &Param<Tensor<2>>, heads| {
            linear(x_nd.clone(), weight.val()).reshape([b, t, heads, e])
        };
        (
            rotary.turn(heads(&self.query, h)).swap_dims(1, 2),
            rotary.turn(heads(&self.key, g)).swap_dims(1, 2),
            heads(&self.value, g).swap_dims(1, 2),
        )
    }

    /// The rest of the layer, from the heads' outputs `[b, h, t, e]` and the residual `[n, d]`.
    pub(crate) fn finish(
        &self,
        config: &Config,
        x_nd: Tensor<2>,
        mixed_bhte: Tensor<4>,
    ) -> Tensor<2> {
        let [b, h, t, e] = mixed_bhte.dims();
        let mixed = mixed_bhte.swap_dims(1, 2).reshape([b * t, h * e]);
        let x_nd = x_nd + linear(mixed, self.output.val());
        let y_nd = rms_norm(x_nd.clone(), self.feed_norm.val(), config.rms_norm_eps);
        let gate = silu(linear(y_nd.clone(), self.gate.val()));
        x_nd + linear(gate * linear(y_nd, self.up.val()), self.down.val())
    }
}

/// Up to this many rows, W·xᵀ is the faster product on CPU: the other order packs all of W each time.
const FEW_ROWS: usize = 64;

/// x·Wᵀ: `[n, in]`, `[out, in]` → `[n, out]`.
fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    if x.dims()[0] <= FEW_ROWS && !x.is_autodiff() {
        weight.matmul(x.transpose()).transpose()
    } else {
        x.matmul(weight.transpose())
    }
}

/// x / √(mean(x²) + ε), times a gain: `[n, d]`, `[d]` → `[n, d]`. Half precisions take it in f32.
fn rms_norm(x_nd: Tensor<2>, gain_d: Tensor<1>, epsilon: f64) -> Tensor<2> {
    let dtype = x_nd.dtype();
    let wide_nd = match statistics_dtype(dtype) {
        same if same == dtype => x_nd,
        wide => x_nd.cast(wide),
    };
    let mean_square_n1 = wide_nd.clone().square().mean_dim(1);
    let normed_nd = wide_nd / (mean_square_n1 + epsilon).sqrt();
    let normed_nd = if normed_nd.dtype() == dtype {
        normed_nd
    } else {
        normed_nd.cast(dtype)
    };
    normed_nd * gain_d.unsqueeze()
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
