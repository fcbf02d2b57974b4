//! The targets of `tests/parsers/`, for libFuzzer.

#[cfg(feature = "models")]
#[path = "../../tests/parsers/models.rs"]
pub mod models;
#[path = "../../tests/parsers/replies.rs"]
pub mod replies;
#[path = "../../tests/parsers/rows.rs"]
pub mod rows;
#[cfg(feature = "models")]
#[path = "../../tests/parsers/run_file.rs"]
pub mod run_file;
#[path = "../../tests/parsers/scratch.rs"]
pub mod scratch;
#[path = "../../tests/parsers/stored.rs"]
pub mod stored;
#[path = "../../tests/parsers/text.rs"]
pub mod text;

/// Removes libFuzzer's panic hook, which ends the process at each panic. The decoder of Parquet catches its own panics; a
/// panic that leaves a target ends the process nevertheless.
pub fn let_panics_unwind() {
    drop(std::panic::take_hook());
}
