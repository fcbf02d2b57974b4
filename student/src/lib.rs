//! What learns: targets, divergences, the training step, checkpoints; and per-token values for
//! evaluation.
//!
//! A researcher's own loss is a plain tensor function over the coarse vocabulary, like those in
//! [`loss`]; [`window_gradient`] is the training step without the optimizer, [`train()`] is the
//! whole loop.
//!
//! Dimension suffixes of tensor names: `b` batch, `t` position, `n` rows (loss positions), `v`
//! vocabulary, `k` support, `d` model width.

mod block;
pub mod check;
mod checkpoint;
mod control;
pub mod dense;
mod error;
mod evaluate;
mod gradient;
mod head_loss;
pub mod loss;
mod objective;
mod optimizer;
mod schedule;
mod settings;
pub mod spans;
mod start;
mod target;
mod tensorboard;
mod train;

pub use block::Block;
pub use error::Error;
pub use evaluate::evaluate;
pub use gradient::{
    Gradients, HiddenGradient, How, Terms, WindowGradient, block_gradient, hidden_gradient,
    window_gradient,
};
pub use head_loss::{Form, HeadGradient, HeadLoss, head_loss};
pub use objective::{AdaptiveKl, AlphaDivergence, Jsd, Objective, Skew, Weighted};
pub use optimizer::{AdamW, clip_global_norm};
pub use potstill_datasets::Arm;
pub use schedule::learning_rate;
pub use settings::{Control, Overlong, Settings};
pub use start::{RandomShape, StudentSettings};
pub use target::{Target, TargetRow};
pub use train::{Dropped, StepMetrics, Trained, train};
