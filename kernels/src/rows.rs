//! Row statistics of a block of logits over supports, and the gradient through them.
//!
//! All losses with a sparse teacher depend on the student's distribution over a coarse vocabulary: a bucket for
//! each token of the support S, and one bucket, the tail, for all other tokens. With s = softcap(scale · z) / τ and
//! q = softmax(s), `row_stats` computes from a row of logits z
//!
//! ```text
//! log q_i  = s_i − lse(s)                 for i in S
//! log q_tail = lse(s_j, j ∉ S) − lse(s)   over the tail's logits alone, never log(1 − Σ)
//! lse(s)
//! Σ_j log q_j                             over the vocabulary, if requested
//! ```
//!
//! and `row_gradient` computes from h = ∂L/∂(log q), e = ∂L/∂lse and u = ∂L/∂(Σ log q)
//!
//! ```text
//! ∂L/∂s_i = h_i − q_i (H − e) + u              for i in S, H = Σ h over S and the tail + v u
//! ∂L/∂s_j = exp(s_j − lse_tail) h_tail − q_j (H − e) + u   for j outside S
//! ∂L/∂z   = ∂L/∂s · scale/τ · (1 − (softcapped/c)²)
//! ```
//!
//! The forward pass reads the logits once with a running maximum and sum. The backward pass reads them once and
//! writes the gradient over them. Nothing else of size v is allocated.

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
#[cfg(feature = "cuda-sources")]
pub(crate) use cube::cuda_kernels;

/// Value of `log q_tail` for an empty tail: ln 2⁻⁶⁰, in nats. It is also the floor of a teacher's tail mass, so that
/// an empty tail adds nothing to a divergence. No gradient passes through it.
pub const TAIL_FLOOR_NATS: f64 = -60.0 * std::f64::consts::LN_2;

/// Value of log q in an empty slot, and lower bound of log q elsewhere, in nats: its exponential is 0 in every float
/// type. No gradient passes through it.
pub const EMPTY_NATS: f64 = -1.0e4;

/// Marker in the first slot of a support for a masked row. None of the row's logits is read, its statistics are
/// [`EMPTY_NATS`] and 0, and its gradient is 0.
pub const MASKED: i32 = -2;

/// Whether [`row_stats`] also computes Σ log q over the vocabulary, which label smoothing needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogQSum {
    /// The sum is left out.
    #[default]
    Omitted,
    /// The sum is computed, at the cost of one addition per logit.
    Included,
}

/// The transform from a model's raw logits to the logits of the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitTransform {
    /// Factor on the raw logits (Cohere's `logit_scale`, Granite's `1/logits_scaling`), above 0; 1 for most models.
    pub scale: f64,
    /// Gemma's final softcap c: s = c · tanh(z / c).
    pub softcap: Option<f64>,
    /// Temperature that the logits are divided by last; 1 for a teacher's stored distribution.
    pub temperature: f64,
    /// Number of columns that are tokens. Later columns are padding of the embedding and have probability 0.
    pub vocab: Option<usize>,
}

impl Default for LogitTransform {
    fn default() -> Self {
        Self {
            scale: 1.0,
            softcap: None,
            temperature: 1.0,
            vocab: None,
        }
    }
}

/// The constants of a [`LogitTransform`] in the form that the loops and kernels use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TransformConstants {
    scale: f64,
    /// The softcap c, or 0 for none.
    softcap: f64,
    inv_temperature: f64,
    pub(crate) vocab: usize,
}

/// Log-probabilities of the student over the coarse vocabulary of each row, with the log-sum-exp of its logits.
#[derive(Debug, Clone)]
pub struct RowStats {
    /// `[n, k+2]` or `[n, k+3]`, nats: log q of each support token and of the tail, log-sum-exp, and Σ log q if it was
    /// requested.
    all: Tensor<2>,
    k: usize,
}

impl RowStats {
    pub(crate) fn new(all: Tensor<2>, k: usize) -> Self {
        Self { all, k }
    }

    /// Returns log q `[n, k+1]` in nats: of each support token, then of the tail ([`TAIL_FLOOR_NATS`] for an empty
    /// tail). Empty slots hold [`EMPTY_NATS`] and pass no gradient.
    #[must_use]
    pub fn log_q_nk(&self) -> Tensor<2> {
        self.all.clone().narrow(1, 0, self.k + 1)
    }

    /// Returns the log-sum-exp `[n, 1]` of each row's softmax logits, in nats.
    #[must_use]
    pub fn log_z_n1(&self) -> Tensor<2> {
        self.all.clone().narrow(1, self.k + 1, 1)
    }

    /// Returns Σ log q `[n, 1]` over the vocabulary in nats, if it was requested; −∞ if any logit is −∞.
    #[must_use]
    pub fn sum_log_q_n1(&self) -> Option<Tensor<2>> {
        let summed = self.all.dims()[1] == self.k + 3;
        summed.then(|| self.all.clone().narrow(1, self.k + 2, 1))
    }

    /// Returns all statistics in one tensor `[n, k+2]` or `[n, k+3]`, in the order in which [`row_gradient`] takes
    /// their gradient: log q of the support and of the tail, log-sum-exp, Σ log q.
    #[must_use]
    pub fn all(&self) -> Tensor<2> {
        self.all.clone()
    }

    /// Replaces the tensor of all statistics, for example by a leaf of an autodiff graph, to differentiate with
    /// respect to the statistics only.
    #[must_use]
    pub fn with_all(&self, all: Tensor<2>) -> Self {
        Self { all, k: self.k }
    }
}

/// Computes the statistics of each row of `logits_nv` over its support; differentiable in the logits.
///
/// # Shapes
/// - `logits_nv`: `[n, v]`, f64, f32, f16 or bf16.
/// - `support_nk`: `[n, k]` token ids, unique within a row, in any order. −1 and ids beyond the vocabulary mark an
///   empty slot; [`MASKED`] in the first slot masks the row.
/// - result: `[n, k+2]` or `[n, k+3]`, f64 for f64 logits and f32 for all others.
///
/// A row whose logits are all −∞ has no distribution: its log q and its log-sum-exp are [`EMPTY_NATS`], and it passes
/// no gradient.
///
/// # Panics
/// Panics on shapes that do not fit, as burn's own operations do.
#[must_use]
pub fn row_stats(
    logits_nv: Tensor<2>,
    support_nk: Tensor<2, Int>,
    transform: &LogitTransform,
    sum: LogQSum,
) -> RowStats {
    let [n, _] = logits_nv.dims();
    let [rows, k] = support_nk.dims();
    assert_eq!(
        n, rows,
        "row_stats: the logits have {n} rows, and the support has {rows}"
    );
    let stats = <Dispatch as RowOps>::row_stats(
        logits_nv.into_dispatch(),
        support_nk.cast(DType::I32).into_dispatch(),
        *transform,
        sum,
    );
    RowStats::new(Tensor::from_dispatch(stats), k)
}

/// Computes ∂L/∂logits `[n, v]` from the gradient with respect to [`RowStats::all`]. Not differentiable.
///
/// The gradient is written over the logits if their storage is not shared, so that nothing of their size is
/// allocated.
///
/// # Panics
/// Panics on shapes that do not fit, as burn's own operations do.
#[must_use]
pub fn row_gradient(
    logits_nv: Tensor<2>,
    support_nk: Tensor<2, Int>,
    stats: &RowStats,
    gradient: Tensor<2>,
    transform: &LogitTransform,
) -> Tensor<2> {
    let ([n, _], [rows, k]) = (logits_nv.dims(), support_nk.dims());
    assert!(
        n == rows && stats.all.dims() == gradient.dims() && stats.k == k,
        "row_gradient: logits of {n} rows, support [{rows}, {k}], statistics {:?}, gradient {:?}",
        stats.all.dims(),
        gradient.dims()
    );
    Tensor::from_dispatch(<Dispatch as RowOps>::row_gradient(
        logits_nv.into_dispatch(),
        support_nk.cast(DType::I32).into_dispatch(),
        stats.all().into_dispatch(),
        gradient.into_dispatch(),
        *transform,
    ))
}

impl LogitTransform {
    /// Computes the softmax logits of all tokens from raw logits: `[n, v]` → `[n, vocab]`, in tensor operations.
    #[must_use]
    pub fn apply(&self, logits_nv: Tensor<2>) -> Tensor<2> {
        let [_, v] = logits_nv.dims();
        let s_nv = match self.vocab {
            Some(vocab) if vocab < v => logits_nv.narrow(1, 0, vocab),
            _ => logits_nv,
        };
        let is_plain = self.softcap.is_none() && self.scale == 1.0 && self.temperature == 1.0;
        if is_plain {
            return s_nv;
        }
        let s_nv = s_nv * self.scale;
        let s_nv = match self.softcap {
            Some(c) => (s_nv / c).tanh() * c,
            None => s_nv,
        };
        s_nv / self.temperature
    }

    /// The constants for rows of `v` columns.
    pub(crate) fn constants(&self, v: usize) -> TransformConstants {
        TransformConstants {
            scale: self.scale,
            softcap: self.softcap.unwrap_or(0.0),
            inv_temperature: 1.0 / self.temperature,
            vocab: self.vocab.map_or(v, |vocab| vocab.min(v)),
        }
    }
}

impl TransformConstants {
    /// Whether the softmax logits equal the raw logits.
    pub(crate) fn is_identity(&self) -> bool {
        self.scale == 1.0 && self.softcap == 0.0 && self.inv_temperature == 1.0
    }
}

/// Number of statistics besides those of the support tokens.
pub(crate) fn extra_columns(sum: LogQSum) -> usize {
    match sum {
        LogQSum::Omitted => 2,
        LogQSum::Included => 3,
    }
}

/// Type of the statistics: at least f32, because a log-probability needs more than the 8 bits of bf16.
fn stats_dtype(logits: DType) -> DType {
    match logits {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

#[cfg(feature = "fusion")]
fn stats_shape(logits: &Shape, support: &Shape, sum: LogQSum) -> Shape {
    Shape::new([logits[0], support[1] + extra_columns(sum)])
}

/// The backend form of [`row_stats`] and [`row_gradient`].
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Fusion: cfg(feature = "fusion"), Autodiff)]
pub trait RowOps: Backend {
    /// Logits `[n, v]` and support `[n, k]` → `[n, k+2]` or `[n, k+3]`: log q of the support and of the tail,
    /// log-sum-exp, Σ log q.
    #[fusion(dtype = stats_dtype(logits), shape = stats_shape(logits, support, *sum))]
    fn row_stats(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        transform: LogitTransform,
        sum: LogQSum,
    ) -> FloatTensor<Self>;

    /// Returns the gradient `[n, v]` with respect to the logits, from the statistics and the gradient with respect to
    /// the statistics. It is written over the logits if their storage is not shared.
    #[fusion(dtype = logits, shape = logits)]
    fn row_gradient(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        stats: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        transform: LogitTransform,
    ) -> FloatTensor<Self>;
}
