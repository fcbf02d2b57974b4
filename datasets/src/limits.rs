//! Limits of what is read from outside: data files, templates, tokenizers, replies of servers and waits.
//!
//! Each limit bounds time and memory, and is far above what honest input needs. What passes a limit is an error that
//! names the limit. Limits that a user may want to change are settings of the run file, and only their defaults are
//! here. `docs/limits.md` is made from this file and from `model/src/limits.rs`, which has the limits of models.

/// Deepest nesting of JSON in a reply of a server, counted in open brackets.
pub const REPLY_JSON_DEPTH: usize = 128;

/// Longest wait that a server may ask for, seconds (`longest_wait` of `[teacher]`).
pub const SERVER_WAIT_SECONDS: u32 = 600;

/// Longest body of a reply, decompressed, bytes.
pub const REPLY_BYTES: u64 = 128 << 20;

/// Longest text of an error reply that is read, bytes.
pub const ERROR_REPLY_BYTES: u64 = 64 << 10;
