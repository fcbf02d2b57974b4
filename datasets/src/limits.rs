//! Limits of what is read from outside: data files, templates, tokenizers, replies of servers and waits.
//!
//! Each limit bounds time and memory, and is far above what honest input needs. What passes a limit is an error that
//! names the limit. Limits that a user may want to change are settings of the run file, and only their defaults are
//! here. `docs/limits.md` is made from this file and from `model/src/limits.rs`, which has the limits of models.

/// Deepest nesting of JSON in a reply of a server, counted in open brackets.
pub const REPLY_JSON_DEPTH: usize = 128;

/// Longest row of a data file in bytes, if `max_row_bytes` of `[import]` is not set: a line of JSONL, an object of a JSON
/// array, a record of CSV, or the needed cells of a row of Parquet.
pub const ROW_BYTES: usize = 4 * 1024 * 1024;

/// Most blank bytes in a row of a data file, and most packed bytes that unpack to nothing.
pub const IMPORT_BLANK_BYTES: usize = 16 * 1024 * 1024;

/// Deepest nesting of JSON in a data file, counted in open brackets.
pub const ROW_JSON_DEPTH: usize = 127;

/// Most columns of a CSV or Parquet file.
pub const IMPORT_COLUMNS: usize = 10_000;

/// Most files of a folder or glob that is imported.
pub const IMPORT_FILES: usize = 100_000;

/// How many times larger than its packed form the content of a `.gz` or `.zst` file may be, after the first 256 MiB.
pub const UNPACKED_RATIO: u64 = 500;

/// Unpacked bytes of a `.gz` or `.zst` file before the ratio to the packed bytes counts.
pub const UNPACKED_FREE_BYTES: u64 = 256 * 1024 * 1024;

/// Largest footer of a Parquet file in bytes.
pub const PARQUET_FOOTER_BYTES: usize = 64 * 1024 * 1024;

/// Deepest nesting of columns in a Parquet file.
pub const PARQUET_DEPTH: usize = 64;

/// Most bytes of the pages of a Parquet file that are in memory at a time, unpacked: the largest dictionary and the
/// largest page of each needed column together.
pub const PARQUET_PAGE_BYTES: u64 = 512 * 1024 * 1024;

/// Most values of a list column in one row group of a Parquet file.
pub const PARQUET_LIST_VALUES: u64 = 32 * 1024 * 1024;
