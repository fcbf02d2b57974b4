//! Training of the student: targets, divergences, the training step, checkpoints; and evaluation on held-out
//! text.
//!
//! A loss is a plain tensor function over the coarse vocabulary, like those in [`loss`]; a program can bring
//! its own ([`loss::CustomDivergence`]). [`batch_gradient`] is the training step without the optimizer,
//! [`train()`] is the whole training loop.
//!
//! Dimension suffixes of tensor names: `b` batch, `t` position, `n` rows (loss positions), `v`
//! vocabulary, `k` support, `d` model width.

mod adapter;
mod advice;
mod backbone;
mod batch;
pub mod check;
mod checkpoint;
mod collective;
mod control;
pub mod dense;
mod error;
mod evaluate;
mod gradient;
mod gradients;
mod guard;
mod head_loss;
mod layers;
mod loader;
pub mod loss;
mod memory;
mod metrics;
mod micro_batch;
mod not_finite;
mod objective;
mod operations;
mod optimizer;
mod optimizer_settings;
mod own_text;
mod precision;
mod replica;
mod schedule;
mod settings;
pub mod spans;
mod start;
mod start_kl;
mod target;
mod tensor_bytes;
mod tensorboard;
mod train;
mod trainable;
mod trainer;
mod unigram;

pub use adapter::{AdapterBase, AdapterSettings, AdapterTargets, AllLinear};
pub use advice::{MemoryAdvice, memory_advice};
pub use batch::Batch;
pub use checkpoint::{DevFigures, checkpoint_model, dev_figures, with_mean};
pub use collective::{Alone, Collective, MpiProcesses, MpiRank};
pub use error::{Error, SequenceId};
pub use evaluate::{SignalKind, evaluate};
pub use gradient::{
    BatchGradient, GradientOptions, HiddenGradient, LossSums, batch_gradient, gradient_of,
    hidden_gradient, micro_batch_gradient,
};
pub use gradients::Gradients;
pub use guard::GuardSettings;
pub use head_loss::{Form, HeadGradient, HeadLossOptions, head_loss};
pub use layers::Layers;
pub use loader::{OverlongRows, ReadRow};
pub use memory::{MemorySurroundings, TrainedNumbers, TrainingMemory};
pub use metrics::StepMetrics;
pub use micro_batch::MicroBatch;
pub use objective::{AdaptiveKl, AlphaDivergence, Jsd, Objective, Skew, WeightedDivergence};
pub use operations::{ModelOperations, peak_flops};
pub use optimizer::{Optimizer, clip_global_norm};
pub use optimizer_settings::{DecayedRole, MomentType, OptimizerKind};
pub use own_text::own_text_kl;
pub use potstill_datasets::Arm;
pub use precision::Precision;
pub use schedule::{Schedule, ScheduleShape};
pub use settings::{Control, Overlong, SequenceOrder, TrainSettings};
pub use start::{RandomShape, RandomShapeError, StudentSettings};
pub use start_kl::{StartKl, start_kl};
pub use target::{Target, TargetRow};
pub use train::{TrainingInputs, TrainingResult, train};
pub use trainable::{Trainable, track};
pub use trainer::TrainingPlan;
pub use unigram::Unigram;
