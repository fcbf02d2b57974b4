//! Divergences on the coarse vocabulary, each a plain tensor function of log probabilities.
//!
//! `log_q_nk` is [n, k+1] as row statistics give it: log q on the support, the tail's last, 0 in
//! empty slots. A function returns nats by row, `[n]`; the caller sums and divides.

mod cross_entropy;
mod forward_kl;

pub use cross_entropy::cross_entropy;
pub use forward_kl::forward_kl;
