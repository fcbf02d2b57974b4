//! Divergences on the coarse vocabulary, each a plain tensor function of log probabilities.
//!
//! `log_p_nk` (teacher) and `log_q_nk` (student) are [n, k+1] in nats, one column a bucket: the
//! support's tokens, and everything else in the last. Both are finite everywhere: a slot that holds
//! nothing, and a probability whose log lies below it, holds `EMPTY_NATS` (−10⁴), whose
//! exponential is 0. A dense target is the same functions on [n, v]. A function returns nats by row,
//! `[n]`; the caller sums and divides. It is differentiated with respect to `log_q_nk` alone.
//!
//! The logits' gradient follows from h = ∂D/∂log q: ∂D/∂s_i = h_i − q_i·H on the support and
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
pub use divergence::{Custom, Divergence};
pub use forward_kl::forward_kl;
pub use jsd::jsd;
pub use reverse_kl::reverse_kl;
pub use skew_kl::skew_kl;
pub use skew_reverse_kl::skew_reverse_kl;
pub use soft_cross_entropy::soft_cross_entropy;
pub use tail::Tail;
pub use total_variation::total_variation;
