//! Causal grouped-query attention over documents that lie behind one another, without the n × n scores.
//!
//! For a row i of a document that begins at row a, with window w (n for none), query head h and its key
//! head g = ⌊h / (heads / key heads)⌋:
//!
//! ```text
//! s_ij = c tanh(q_i·k_j · scale / c)          max(a, i + 1 − w) ≤ j ≤ i      (without softcap: q_i·k_j · scale)
//! p_ij = exp(s_ij) / Σ_j exp(s_ij)
//! o_i  = Σ_j p_ij v_j
//! ```
//!
//! Kept for the gradient: q, k, v, o and log Σ_j exp(s_ij) of each row and head; the scores are computed
//! again, a block of rows at a time (Dao et al. 2022; without its tiles over keys on a CPU, whose caches
//! do not need them). So memory grows with n. With D_i = Σ ∂L/∂o_i · o_i:
//!
//! ```text
//! ∂L/∂v_j = Σ_i p_ij ∂L/∂o_i
//! ∂L/∂s_ij = p_ij (∂L/∂o_i · v_j − D_i)
//! ∂L/∂q_i = scale Σ_j ∂L/∂s_ij (1 − (s_ij/c)²) k_j          ∂L/∂k_j alike
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
use burn::tensor::Tensor;
#[cfg(feature = "fusion")]
use burn::tensor::{DType, Shape};

use crate::flex::{plain_f32, plain_half, wide};

pub use reference::attention_reference;

/// How heads attend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; a divisor of `heads`. Query head i uses key head ⌊i / (heads / key_heads)⌋.
    pub key_heads: usize,
    /// What q·k is multiplied with; usually 1 / √e.
    pub scale: f64,
    /// c of the soft cap on the scores, in nats; `None` for none.
    pub softcap: Option<f64>,
    /// How many positions a row sees, itself counted; `None` for all up to its own.
    pub window: Option<usize>,
}

/// Attention within documents: `q_nc` `[n, heads · e]`, `k_nc` and `v_nc` `[n, key_heads · e]` →
/// `[n, heads · e]`; differentiable in all three.
///
/// `documents` are the lengths of the documents, in rows, one behind the other; together n. A row sees
/// the rows of its document up to itself.
///
/// # Panics
/// On shapes that do not fit, on lengths that do not add up to n, and on a window of 0.
#[must_use]
pub fn attention(
    q_nc: Tensor<2>,
    k_nc: Tensor<2>,
    v_nc: Tensor<2>,
    documents: &[usize],
    how: &Attention,
) -> Tensor<2> {
    let ([n, columns], key_shape) = (q_nc.dims(), k_nc.dims());
    let rows: usize = documents.iter().sum();
    assert_eq!(
        rows, n,
        "attention: documents of {rows} rows in all, queries of {n}"
    );
    assert!(
        how.key_heads > 0
            && how.heads.is_multiple_of(how.key_heads)
            && columns.is_multiple_of(how.heads),
        "attention: {} heads and {} key heads in {columns} columns",
        how.heads,
        how.key_heads
    );
    let key_columns = columns / how.heads * how.key_heads;
    assert!(
        key_shape == [n, key_columns] && v_nc.dims() == key_shape,
        "attention: keys {key_shape:?} and values {:?} where [{n}, {key_columns}] fits",
        v_nc.dims()
    );
    assert!(
        how.window != Some(0),
        "attention: a window of 0 sees nothing"
    );
    let documents: Vec<usize> = documents.iter().copied().filter(|&rows| rows > 0).collect();
    let own = plain_f32(&q_nc) && plain_f32(&k_nc) && plain_f32(&v_nc);
    #[cfg(feature = "cube")]
    let own = own || cube::takes([&q_nc, &k_nc, &v_nc], how);
    if own {
        let (q, k, v) = (
            q_nc.into_dispatch(),
            k_nc.into_dispatch(),
            v_nc.into_dispatch(),
        );
        let mixed = <Dispatch as AttentionOps>::attention_rows(q, k, v, documents, *how);
        Tensor::from_dispatch(mixed.0)
    } else if plain_half(&q_nc) {
        let dtype = q_nc.dtype();
        attention(wide(q_nc), wide(k_nc), wide(v_nc), &documents, how).cast(dtype)
    } else {
        attention_reference(q_nc, k_nc, v_nc, &documents, how)
    }
}

/// What lies between the passes: the output's type and shape are those of q, the sums are f32.
#[cfg(feature = "fusion")]
fn kept(q: &TensorSpec, how: &Attention) -> (TensorSpec, TensorSpec) {
    let sums = Shape::new([q.shape[0], how.heads]);
    (q.clone(), TensorSpec::new(sums, DType::F32))
}

/// Attention and its gradients; f32 on the CPU, half precisions too on a GPU.
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Fusion: cfg(feature = "fusion"), Autodiff)]
pub trait AttentionOps: Backend {
    /// The output `[n, heads · e]`, and log Σ exp(s) `[n, heads]` in f32. No document is empty.
    #[fusion(meta = |q, _k, _v, _documents, how| kept(q, how))]
    fn attention_rows(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        documents: Vec<usize>,
        how: Attention,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// ∂L/∂q, ∂L/∂k and ∂L/∂v from ∂L/∂o and what was kept.
    #[allow(clippy::too_many_arguments)]
    #[fusion(meta = |_gradient, q, k, v, _output, _log_sums, _documents, _how| {
        (q.clone(), k.clone(), v.clone())
    })]
    fn attention_gradient(
        gradient: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        output: FloatTensor<Self>,
        log_sums: FloatTensor<Self>,
        documents: Vec<usize>,
        how: Attention,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}
