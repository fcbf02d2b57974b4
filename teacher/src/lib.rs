//! Teachers: sources of answers and signals.
//!
//! A teacher answers prompts and says how likely each token is. A [`Teacher`] is one of three kinds: a checkpoint that
//! runs in this process ([`Local`]), a model behind a server ([`HttpTeacher`], with the client in [`http`]), or the
//! answers that the data has. All kinds follow one protocol ([`Exchange`]): a stage gives requests, and each is completed
//! once, as a record or as a failure.

mod encoder;
mod error;
mod given;
pub mod http;
mod http_teacher;
pub mod hub;
#[cfg(feature = "local")]
mod local;
mod protocol;
mod reply_json;
mod settings;
mod teacher;

pub use encoder::TextEncoder;
pub use error::Error;
pub use given::GivenTeacher;
pub use http_teacher::HttpTeacher;
#[cfg(feature = "local")]
pub use local::{Ask, Local, LocalSettings, LocalTeacher, Origin, Scoring, ScoringText};
#[cfg(feature = "local")]
pub use potstill_model::{DType, Device, Sampling};
pub use protocol::{AnswerRequest, CompletedEntries, Exchange, ScoreRequest, ScoringOptions};
pub use settings::{CollectSettings, ScoreSettings, SignalSettings, TeacherSettings};
pub use teacher::Teacher;
