//! Potstill distills a large language model into a small one, and tests whether that helped.
//!
//! This crate is the command line and the facade: it reads the run file, manages the run
//! directory, shows progress and connects the stages. Data, models, teachers, training and
//! evaluation are the work of the crates that it re-exports.
//!
//! A run consists of a run file and a run directory. Each stage is a function in [`stages`] that
//! takes a [`Context`], reads the published output of earlier stages, and publishes its own:
//!
//! ```no_run
//! use potstill::{Context, RunOptions, stages};
//!
//! let context = Context::open("run.toml".as_ref(), &RunOptions::default())?;
//! stages::import::import(&context)?;
//! # Ok::<(), anyhow::Error>(())
//! ```

pub mod cli;
mod errors;
pub mod events;
mod exhausted;
pub mod init;
pub mod interrupt;
pub mod panics;
pub mod progress;
mod ranks;
pub mod render;
pub mod run_dir;
pub mod run_file;
pub mod schema;
pub mod stages;

pub use potstill_datasets as datasets;
pub use potstill_eval as eval;
pub use potstill_kernels as kernels;
pub use potstill_model as model;
pub use potstill_student as student;
pub use potstill_teacher as teacher;

pub use stages::{Context, RunOptions, StageOutcome};
