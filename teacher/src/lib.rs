//! Where signals come from: teachers, asked in batches.
//!
//! A teacher answers prompts and says how likely each token was. [`Local`] runs a checkpoint in this
//! process: it samples whole answers, and scores given texts with exact distributions. [`http`] asks
//! servers that speak OpenAI's protocol or one near it, and gives the same records.

mod error;
pub mod http;
#[cfg(feature = "local")]
mod local;
mod settings;

pub use error::Error;
#[cfg(feature = "local")]
pub use local::{Ask, Local, LocalSettings, Scoring, Text};
#[cfg(feature = "local")]
pub use potstill_model::{DType, Device, Sampling};
pub use settings::{CollectSettings, ScoreSettings, SignalSettings, TeacherSettings};
