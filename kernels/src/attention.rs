//! Causal grouped-query attention within consecutive documents of a packed row, without the n × n scores.
//!
//! For a row i of a document that begins at row a, with a sliding window of w positions (n for none), query head h
//! and its key head g = ⌊h / (heads / key heads)⌋:
//!
//! ```text
//! s_ij = c tanh(q_i·k_j · scale / c)          max(a, i + 1 − w) ≤ j ≤ i      (without softcap: q_i·k_j · scale)
//! Z_i  = Σ_j exp(s_ij) + exp(sink_h)          (without sinks: only the first part)
//! p_ij = exp(s_ij) / Z_i
//! o_i  = Σ_j p_ij v_j
//! ```
//!
//! For the gradient, q, k, v, o and log Z_i of each row and head are kept, and the scores are computed again, a block
//! of rows at a time (Dao et al. 2022; the CPU form omits the tiles over keys, because a CPU's caches do not need
//! them). So memory is linear in n. With D_i = Σ ∂L/∂o_i · o_i:
//!
//! ```text
//! ∂L/∂v_j = Σ_i p_ij ∂L/∂o_i
//! ∂L/∂s_ij = p_ij (∂L/∂o_i · v_j − D_i)                 ∂L/∂sink_h = −Σ_i exp(sink_h) / Z_i · D_i
//! ∂L/∂q_i = scale Σ_j ∂L/∂s_ij (1 − (s_ij/c)²) k_j          ∂L/∂k_j = scale Σ_i ∂L/∂s_ij (1 − (s_ij/c)²) q_i
//! ```

mod autodiff;
#[cfg(feature = "cube")]
mod cube;
mod flex;
mod reference;

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
#[cfg(feature = "fusion")]
use burn::tensor::Shape;
use burn::tensor::{DType, Tensor};
#[cfg(feature = "cuda-sources")]
pub(crate) use cube::cuda_kernels;

use crate::flex::{is_cpu_float, to_f32};

pub use reference::attention_reference;

/// The sink of a head that has none: exp(sink − max) is 0 for every row. (WGSL has no arithmetic with −∞.)
pub(crate) const NO_SINK: f32 = -3.0e38;

/// Options of [`attention`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionOptions {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; a divisor of `heads`. Query head i uses key head ⌊i / (heads / key_heads)⌋.
    pub key_heads: usize,
    /// Factor on q·k; usually 1 / √e.
    pub scale: f64,
    /// Constant c of the softcap on the scores, in nats; `None` for no softcap.
    pub softcap: Option<f64>,
    /// Number of positions that a row sees, its own included; `None` for all positions up to its own.
    pub window: Option<usize>,
}

/// Computes attention within documents: `q_nc` `[n, heads · e]`, `k_nc` `[n, key_heads · e]`, `v_nc`
/// `[n, key_heads · w]` → `[n, heads · w]`; differentiable in all of them and in the sinks.
///
/// `documents` holds the lengths of the consecutive documents in rows; their sum is n. A row sees the rows of its
/// document up to itself. `sinks_h` `[heads]` holds one more logit of each head's softmax, in nats, without a value:
/// it takes a part of the weight of every row.
///
/// # Panics
/// Panics on shapes that do not fit, on lengths that do not sum to n, and on a window of 0.
#[must_use]
pub fn attention(
    q_nc: Tensor<2>,
    k_nc: Tensor<2>,
    v_nc: Tensor<2>,
    sinks_h: Option<Tensor<1>>,
    documents: &[usize],
    options: &AttentionOptions,
) -> Tensor<2> {
    let ([n, columns], key_shape, value_shape) = (q_nc.dims(), k_nc.dims(), v_nc.dims());
    let rows: usize = documents.iter().sum();
    assert_eq!(
        rows, n,
        "attention: the documents have {rows} rows, and the queries have {n}"
    );
    assert!(
        options.key_heads > 0
            && options.heads.is_multiple_of(options.key_heads)
            && columns.is_multiple_of(options.heads),
        "attention: {} heads and {} key heads do not fit {columns} columns",
        options.heads,
        options.key_heads
    );
    let key_columns = columns / options.heads * options.key_heads;
    assert!(
        key_shape == [n, key_columns]
            && value_shape[0] == n
            && value_shape[1].is_multiple_of(options.key_heads),
        "attention: keys {key_shape:?} and values {value_shape:?} should be [{n}, {key_columns}] and {n} rows of {} heads",
        options.key_heads
    );
    if let Some(sinks_h) = &sinks_h {
        assert_eq!(
            sinks_h.dims(),
            [options.heads],
            "attention: sinks and heads"
        );
    }
    assert!(
        options.window != Some(0),
        "attention: the window is 0, and must be at least 1"
    );
    let documents: Vec<usize> = documents.iter().copied().filter(|&rows| rows > 0).collect();
    let is_one_type = q_nc.dtype() == k_nc.dtype() && q_nc.dtype() == v_nc.dtype();
    let has_kernel = is_one_type && is_cpu_float(&q_nc);
    #[cfg(feature = "cube")]
    let has_kernel = has_kernel || cube::supports([&q_nc, &k_nc, &v_nc], options);
    if has_kernel {
        let sinks_h = match sinks_h {
            Some(sinks_h) => to_f32(sinks_h),
            None => Tensor::full([options.heads], NO_SINK, (&q_nc.device(), DType::F32)),
        };
        let (q, k, v) = (
            q_nc.into_dispatch(),
            k_nc.into_dispatch(),
            v_nc.into_dispatch(),
        );
        let sinks = sinks_h.into_dispatch();
        let (output, _) =
            <Dispatch as AttentionOps>::attention_forward(q, k, v, sinks, documents, *options);
        Tensor::from_dispatch(output)
    } else {
        attention_reference(q_nc, k_nc, v_nc, sinks_h, &documents, options)
    }
}

/// Shapes and types of the output, which has q's type, and of log Z in f32.
#[cfg(feature = "fusion")]
fn output_specs(
    q: &TensorSpec,
    v: &TensorSpec,
    options: &AttentionOptions,
) -> (TensorSpec, TensorSpec) {
    let n = q.shape[0];
    let columns = v.shape[1] / options.key_heads * options.heads;
    (
        TensorSpec::new(Shape::new([n, columns]), q.dtype),
        TensorSpec::new(Shape::new([n, options.heads]), DType::F32),
    )
}

/// The backend form of attention and its gradients: f32 and half precisions; a CPU computes in f32.
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Fusion: cfg(feature = "fusion"), Autodiff)]
pub trait AttentionOps: Backend {
    /// Returns the output `[n, heads · w]` and log Z `[n, heads]` in f32. The sinks `[heads]` are in f32; a sink of
    /// −3·10³⁸ has no effect. No document may be empty.
    #[fusion(meta = |q, _k, v, _sinks, _documents, options| output_specs(q, v, options))]
    fn attention_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        documents: Vec<usize>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Returns ∂L/∂q, ∂L/∂k, ∂L/∂v and ∂L/∂sinks from ∂L/∂o and the inputs and results of
    /// [`Self::attention_forward`].
    #[allow(clippy::too_many_arguments)]
    #[fusion(meta = |_gradient, q, k, v, sinks, _output, _log_sums, _documents, _options| {
        (q.clone(), k.clone(), v.clone(), sinks.clone())
    })]
    fn attention_gradient(
        gradient: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sinks: FloatTensor<Self>,
        output: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        documents: Vec<usize>,
        options: AttentionOptions,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    );
}
