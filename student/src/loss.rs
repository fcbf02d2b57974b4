//! Divergences on the coarse vocabulary, each a plain tensor function of log probabilities.
//!
//! `log_p_nk` (teacher) and `log_q_nk` (student) are [n, k+1] in nats, with one column for each bucket: the
//! support's tokens, and the tail in the last column. Both are finite everywhere: an empty slot, and a
//! probability with a smaller logarithm, have `EMPTY_NATS` (−10⁴), whose exponential is 0. Dense
//! distributions are the same functions on [n, v]. A function returns nats for each row, `[n]`; the caller
//! sums and divides. Functions are differentiated with respect to `log_q_nk` only.
//!
//! The gradient of the logits follows from h = ∂D/∂log q: ∂D/∂s_i = h_i − q_i·H on the support and
//! exp(s_j − lse_tail)·h_tail − q_j·H outside, with H = Σ h.

mod adaptive_kl;
mod alpha_divergence;
mod contrastive;
mod cross_entropy;
mod divergence;
mod forward_kl;
mod jsd;
mod mixture;
mod reverse_kl;
mod skew_kl;
mod skew_reverse_kl;
mod soft_cross_entropy;
mod tail;
mod total_variation;

pub use adaptive_kl::adaptive_kl;
pub use alpha_divergence::alpha_divergence;
pub use contrastive::contrastive;
pub use cross_entropy::{cross_entropy, smoothed_cross_entropy};
pub use divergence::{CustomDivergence, Divergence};
pub use forward_kl::forward_kl;
pub use jsd::jsd;
pub use reverse_kl::reverse_kl;
pub use skew_kl::skew_kl;
pub use skew_reverse_kl::skew_reverse_kl;
pub use soft_cross_entropy::soft_cross_entropy;
pub use tail::Tail;
pub use total_variation::total_variation;
