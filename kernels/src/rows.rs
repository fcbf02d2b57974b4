//! Row statistics of a block of logits, and the gradient through them.
//!
//! All sparse-teacher losses see the student's distribution through one coarsening of the
//! vocabulary: a bucket for each token of the support S, and one for everything else. With
//! s = softcap(scale · z) / τ and q = softmax(s), this op turns a row of logits z into
//!
//! ```text
//! log q_i  = s_i − lse(s)                 for i in S
//! log q_tail = lse(s_j, j ∉ S) − lse(s)   over the tail's logits alone, never log(1 − Σ)
//! lse(s)
//! ```
//!
//! and, given h = ∂L/∂(log q) and e = ∂L/∂lse, gives back
//!
//! ```text
//! ∂L/∂s_i = h_i − q_i (H − e)                    for i in S, H = Σ h over S and the tail
//! ∂L/∂s_j = exp(s_j − lse_tail) h_tail − q_j (H − e)   for j outside S
//! ∂L/∂z   = ∂L/∂s · scale/τ · (1 − (softcapped/c)²)
//! ```
//!
//! The forward pass reads the logits once, the backward pass reads them once and writes once;
//! nothing else of size v is kept.

mod autodiff;
#[cfg(feature = "cube")]
mod cube;
pub(crate) mod flex;
pub(crate) mod reference;

use burn::backend::{
    Backend, Dispatch, backend_extension,
    tensor::{FloatTensor, IntTensor},
};
#[cfg(feature = "fusion")]
use burn::tensor::Shape;
use burn::tensor::{DType, Int, Tensor};

/// What stands for `log q_tail` where nothing is left outside the support (ln 2⁻⁶⁰, in nats). It is
/// also the floor of a teacher's tail mass, so that an empty tail adds nothing to a divergence.
/// Its gradient is zero.
pub const TAIL_FLOOR_NATS: f64 = -60.0 * std::f64::consts::LN_2;

/// From logits as the model's head gives them to the logits of the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Head {
    /// Factor on the raw logits (Cohere's `logit_scale`, Granite's `1/logits_scaling`); 1 for most.
    pub scale: f64,
    /// Gemma's final softcap c: s = c · tanh(z / c).
    pub softcap: Option<f64>,
    /// Divides the logits last. 1 for a teacher's stored distribution.
    pub temperature: f64,
    /// Columns from here on are padding of the embedding and have probability zero.
    pub vocab: Option<usize>,
}

impl Default for Head {
    fn default() -> Self {
        Self {
            scale: 1.0,
            softcap: None,
            temperature: 1.0,
            vocab: None,
        }
    }
}

/// The head's parameters as a kernel takes them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadNumbers {
    scale: f64,
    /// 0 for none.
    softcap: f64,
    inv_temperature: f64,
    pub(crate) vocab: usize,
}

/// The student's log probabilities over a support and its complement.
#[derive(Debug, Clone)]
pub struct RowStats {
    /// [n, k+1], nats: log q of each support token, the log of the tail's mass last. Empty slots
    /// hold 0 and pass no gradient.
    pub log_q_nk: Tensor<2>,
    /// [n, 1], nats: log-sum-exp of the row's softmax logits.
    pub log_z_n1: Tensor<2>,
}

/// Row statistics of `logits_nv` over `support_nk`; differentiable with respect to the logits.
///
/// # Shapes
/// - `logits_nv`: [n, v], f64, f32, f16 or bf16.
/// - `support_nk`: [n, k] token ids, unique within a row, in any order; −1 marks an empty slot.
/// - result: [n, k+1] and [n, 1], in f64 for f64 logits and else in f32.
///
/// # Panics
/// As burn's own operations do, on shapes that do not fit.
pub fn row_stats(logits_nv: Tensor<2>, support_nk: Tensor<2, Int>, head: &Head) -> RowStats {
    let [n, _] = logits_nv.dims();
    let [rows, k] = support_nk.dims();
    assert_eq!(
        n, rows,
        "row_stats: logits have {n} rows, the support {rows}"
    );
    let stats = <Dispatch as RowOps>::row_stats(
        logits_nv.into_dispatch(),
        support_nk.cast(DType::I32).into_dispatch(),
        *head,
    );
    let stats = Tensor::<2>::from_dispatch(stats);
    RowStats {
        log_q_nk: stats.clone().narrow(1, 0, k + 1),
        log_z_n1: stats.narrow(1, k + 1, 1),
    }
}

impl Head {
    pub(crate) fn numbers(&self, v: usize) -> HeadNumbers {
        HeadNumbers {
            scale: self.scale,
            softcap: self.softcap.unwrap_or(0.0),
            inv_temperature: 1.0 / self.temperature,
            vocab: self.vocab.map_or(v, |vocab| vocab.min(v)),
        }
    }
}

impl HeadNumbers {
    /// Whether the softmax's logits are the raw ones as they are.
    pub(crate) fn is_plain(&self) -> bool {
        self.scale == 1.0 && self.softcap == 0.0 && self.inv_temperature == 1.0
    }
}

/// Statistics are kept in f32 at least: bf16 has 8 bits, a log probability needs more.
fn stats_dtype(logits: DType) -> DType {
    match logits {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

#[cfg(feature = "fusion")]
fn stats_shape(logits: &Shape, support: &Shape) -> Shape {
    Shape::new([logits[0], support[1] + 2])
}

/// The op as a backend provides it.
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Fusion: cfg(feature = "fusion"), Autodiff)]
pub trait RowOps: Backend {
    /// Logits [n, v] and support [n, k] to [n, k+2]: log q on S, log q of the tail, log-sum-exp.
    #[fusion(dtype = stats_dtype(logits), shape = stats_shape(logits, support))]
    fn row_stats(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        head: Head,
    ) -> FloatTensor<Self>;

    /// The gradient [n, v] with respect to the logits, from the statistics [n, k+2] and the
    /// gradient [n, k+2] with respect to them.
    #[fusion(dtype = logits, shape = logits)]
    fn row_gradient(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        stats: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        head: Head,
    ) -> FloatTensor<Self>;
}
