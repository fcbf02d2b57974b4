//! A teacher behind a server.

mod answering;
mod inspection;
mod scoring;
mod setup;

pub use self::setup::HttpTeacher;
