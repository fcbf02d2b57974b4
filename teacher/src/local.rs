//! A teacher that runs in this process, from a checkpoint in Hugging Face layout.

mod checkpoint;
mod score;
mod text;
mod work;

pub use checkpoint::{Ask, Local, LocalSettings, Origin};
pub use score::Scoring;
pub use text::ScoringText;
pub use work::LocalTeacher;
