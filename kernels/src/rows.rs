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
//! Σ_j log q_j                             over the vocabulary, where it is asked for
//! ```
//!
//! and, given h = ∂L/∂(log q), e = ∂L/∂lse and u = ∂L/∂(Σ log q), gives back
//!
//! ```text
//! ∂L/∂s_i = h_i − q_i (H − e) + u              for i in S, H = Σ h over S and the tail + v u
//! ∂L/∂s_j = exp(s_j − lse_tail) h_tail − q_j (H − e) + u   for j outside S
//! ∂L/∂z   = ∂L/∂s · scale/τ · (1 − (softcapped/c)²)
//! ```
//!
//! The forward pass reads the logits once, keeping a running maximum and sum; the backward pass reads
//! them once and writes the gradient over them. Nothing else of size v is kept.

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

/// What stands for log q in an empty slot, and where q is less than its exponential, such as 0: its
/// exponential is 0 in every float type. Its gradient is zero.
pub const EMPTY_NATS: f64 = -1.0e4;

/// In the first slot of a support: the row is masked. None of its logits is read, its statistics are
/// [`EMPTY_NATS`] and 0, and its gradient is 0.
pub const MASKED: i32 = -2;

/// Whether [`row_stats`] adds up log q over the vocabulary, as label smoothing needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sum {
    /// It does not.
    #[default]
    Without,
    /// It does: one addition more a logit.
    WithLogQ,
}

/// From logits as the model's head gives them to the logits of the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Head {
    /// Factor on the raw logits (Cohere's `logit_scale`, Granite's `1/logits_scaling`), above 0; 1 for most.
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
    /// [n, k+2] or [n, k+3], nats: log q of each support token and of the tail, log-sum-exp, and Σ log q
    /// where it was asked for.
    all: Tensor<2>,
    k: usize,
}

impl RowStats {
    pub(crate) fn new(all: Tensor<2>, k: usize) -> Self {
        Self { all, k }
    }

    /// [n, k+1], nats: log q of each support token, the log of the tail's mass last
    /// ([`TAIL_FLOOR_NATS`] where nothing is left). Empty slots hold [`EMPTY_NATS`] and pass no
    /// gradient.
    #[must_use]
    pub fn log_q_nk(&self) -> Tensor<2> {
        self.all.clone().narrow(1, 0, self.k + 1)
    }

    /// [n, 1], nats: log-sum-exp of the row's softmax logits.
    #[must_use]
    pub fn log_z_n1(&self) -> Tensor<2> {
        self.all.clone().narrow(1, self.k + 1, 1)
    }

    /// [n, 1], nats: Σ log q over the vocabulary, if it was asked for; −∞ if any logit is.
    #[must_use]
    pub fn sum_log_q_n1(&self) -> Option<Tensor<2>> {
        let summed = self.all.dims()[1] == self.k + 3;
        summed.then(|| self.all.clone().narrow(1, self.k + 2, 1))
    }

    /// All of them, as [`row_gradient`] takes them: log q, its tail, log-sum-exp, Σ log q.
    #[must_use]
    pub fn all(&self) -> Tensor<2> {
        self.all.clone()
    }

    /// As they are, but from `all`: to differentiate with respect to the statistics alone.
    #[must_use]
    pub fn with(&self, all: Tensor<2>) -> Self {
        Self { all, k: self.k }
    }
}

/// Row statistics of `logits_nv` over `support_nk`; differentiable with respect to the logits.
///
/// # Shapes
/// - `logits_nv`: [n, v], f64, f32, f16 or bf16.
/// - `support_nk`: [n, k] token ids, unique within a row, in any order. −1 marks an empty slot, and so
///   does an id past the vocabulary; [`MASKED`] in the first slot masks the row.
/// - result: [n, k+2] or [n, k+3], in f64 for f64 logits and else in f32.
///
/// A row of −∞ alone has no distribution: its log q are [`EMPTY_NATS`], and so is its log-sum-exp; it
/// passes no gradient.
///
/// # Panics
/// As burn's own operations do, on shapes that do not fit.
#[must_use]
pub fn row_stats(
    logits_nv: Tensor<2>,
    support_nk: Tensor<2, Int>,
    head: &Head,
    sum: Sum,
) -> RowStats {
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
        sum,
    );
    RowStats::new(Tensor::from_dispatch(stats), k)
}

/// ∂L/∂logits, [n, v], from ∂L/∂statistics, shaped as [`RowStats::all`]; not differentiable itself.
///
/// Written over the logits where nobody else holds them, so that nothing of their size is allocated.
///
/// # Panics
/// As burn's own operations do, on shapes that do not fit.
#[must_use]
pub fn row_gradient(
    logits_nv: Tensor<2>,
    support_nk: Tensor<2, Int>,
    stats: &RowStats,
    gradient: Tensor<2>,
    head: &Head,
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
        *head,
    ))
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

/// Columns of the statistics beside those of the support.
pub(crate) fn columns(sum: Sum) -> usize {
    match sum {
        Sum::Without => 2,
        Sum::WithLogQ => 3,
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
fn stats_shape(logits: &Shape, support: &Shape, sum: Sum) -> Shape {
    Shape::new([logits[0], support[1] + columns(sum)])
}

/// The op as a backend provides it.
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Fusion: cfg(feature = "fusion"), Autodiff)]
pub trait RowOps: Backend {
    /// Logits [n, v] and support [n, k] to [n, k+2] or [n, k+3]: log q on S, log q of the tail,
    /// log-sum-exp, Σ log q.
    #[fusion(dtype = stats_dtype(logits), shape = stats_shape(logits, support, *sum))]
    fn row_stats(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        head: Head,
        sum: Sum,
    ) -> FloatTensor<Self>;

    /// The gradient [n, v] with respect to the logits, from the statistics and the gradient with
    /// respect to them; over the logits where nobody else holds them.
    #[fusion(dtype = logits, shape = logits)]
    fn row_gradient(
        logits: FloatTensor<Self>,
        support: IntTensor<Self>,
        stats: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        head: Head,
    ) -> FloatTensor<Self>;
}
