//! Treatment of the vocabulary outside the support.

use burn::tensor::Tensor;
use potstill_kernels::EMPTY_NATS;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Treatment, in divergences, of the tokens outside the support.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Tail {
    /// One bucket with the rest of the mass: exact on the coarse vocabulary, at most the divergence over all tokens. It
    /// pulls the student's tail mass to the teacher's.
    #[default]
    Bucket,
    /// The tail is ignored, and both sides are rescaled to sum to 1 on the support. The student's tail mass is free.
    Renormalize,
    /// The tail is ignored, and sums run over the support only. Such a sum can be negative, and its minimum is not at
    /// the teacher's distribution.
    Ignore,
    /// Tail draws (`tail_draws` of the signals) stand for the tail: unbiased. Only with `forward_kl` and
    /// `cross_entropy`.
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
