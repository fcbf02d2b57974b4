//! Treatment of the vocabulary outside the support.

use burn::tensor::Tensor;
use potstill_kernels::EMPTY_NATS;
use serde::{Deserialize, Serialize};

/// Treatment of the tail in a divergence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tail {
    /// The tail is one bucket with the rest of the mass: exact on the coarse vocabulary, at most the full
    /// divergence, and the student's tail mass is trained towards the teacher's.
    #[default]
    Bucket,
    /// The tail is left out, and both sides are renormalised to sum to 1 on the support. The student's tail mass
    /// is not trained.
    Renormalize,
    /// The tail is left out, and p and q keep their values on the support. The sum over the support can be
    /// negative, and its minimum is not at q = p.
    Ignore,
    /// Weighted draws in slots of the support replace the tail: for forward KL and cross-entropies only.
    Draws,
}

impl Tail {
    /// Converts log p and log q, with the tail in the last column, to the arguments of a divergence; all are
    /// [n, k+1]. A slot that is left out is empty on both sides.
    #[must_use]
    pub fn apply(self, log_p_nk: Tensor<2>, log_q_nk: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        match self {
            Self::Bucket => (log_p_nk, log_q_nk),
            Self::Renormalize => (conditional(log_p_nk), conditional(log_q_nk)),
            Self::Ignore | Self::Draws => (without_tail(log_p_nk), without_tail(log_q_nk)),
        }
    }
}

/// Computes the log probabilities given that the token is in the support; empty slots stay empty.
fn conditional(log_nk: Tensor<2>) -> Tensor<2> {
    let k = log_nk.dims()[1] - 1;
    let empty_nk = log_nk.clone().lower_equal_elem(EMPTY_NATS);
    let support_nk = log_nk.clone().narrow(1, 0, k);
    let max_n1 = support_nk.clone().detach().max_dim(1);
    let log_mass_n1 = (support_nk - max_n1.clone()).exp().sum_dim(1).log() + max_n1;
    without_tail((log_nk - log_mass_n1).mask_fill(empty_nk, EMPTY_NATS))
}

fn without_tail(log_nk: Tensor<2>) -> Tensor<2> {
    let [n, columns] = log_nk.dims();
    let tail_n1 = Tensor::full([n, 1], EMPTY_NATS, (&log_nk.device(), log_nk.dtype()));
    Tensor::cat(vec![log_nk.narrow(1, 0, columns - 1), tail_n1], 1)
}
