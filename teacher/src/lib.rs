//! Where signals come from: teachers, asked in batches.
//!
//! A teacher answers prompts and says how likely each token was. [`Local`] runs a checkpoint in this
//! process: it samples whole answers, and scores given texts with exact distributions. Adapters that
//! speak to a server are modules beside `local`; they give the same records.

mod error;
mod local;

pub use error::Error;
pub use local::{Ask, Local, LocalSettings, Scoring, Text};
pub use potstill_model::{DType, Device, Sampling};
