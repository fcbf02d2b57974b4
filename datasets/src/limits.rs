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

/// Most bytes of a chat template.
pub const TEMPLATE_BYTES: usize = 1024 * 1024;

/// Deepest nesting of brackets, `not`, `-` and conditions within an expression of a chat template.
pub const TEMPLATE_NESTING: usize = 40;

/// Deepest nesting of blocks (`if`, `for`, `macro` and others) in a chat template.
pub const TEMPLATE_BLOCKS: usize = 32;

/// Most operators, filters, attributes or `elif` tags in a row in a chat template.
pub const TEMPLATE_CHAIN: usize = 200;

/// Most macros of a chat template.
pub const TEMPLATE_MACROS: usize = 256;

/// Most instructions of a chat template for one conversation.
pub const TEMPLATE_INSTRUCTIONS: u64 = 10_000_000;

/// Most bytes of texts and values that a chat template may make or search for one conversation, besides 64 bytes for each
/// byte of the conversation.
pub const TEMPLATE_WORK: u64 = 64 * 1024 * 1024;

/// Deepest nesting of lists and dicts that a chat template makes.
pub const TEMPLATE_VALUE_DEPTH: usize = 64;

/// Deepest recursion of macros and loops of a chat template; a macro counts as four.
pub const TEMPLATE_RECURSION: usize = 200;

/// Largest width or precision in a format of a chat template, such as `'%10s'|format(x)`.
pub const TEMPLATE_FORMAT_WIDTH: u64 = 1000;

/// Most bytes of `tokenizer.json` and of each other text file of a model's folder.
pub const TOKENIZER_FILE_BYTES: u64 = 256 * 1024 * 1024;

/// Largest id in `tokenizer.json`, plus one.
pub const TOKENIZER_IDS: u64 = 16 * 1024 * 1024;

/// Most steps of the normaliser, of the pre-tokenizer, of the post-processor and of the decoder in `tokenizer.json`.
pub const TOKENIZER_STEPS: usize = 64;

/// Largest growth of a text in the normaliser, in the pre-tokenizer or in the decoder of `tokenizer.json`.
pub const TOKENIZER_GROWTH: u64 = 64;

/// Most bytes of an added token, or of a text that a step in `tokenizer.json` inserts.
pub const TOKENIZER_CONTENT_BYTES: usize = 4096;

/// Most bytes of a regular expression in `tokenizer.json`.
pub const TOKENIZER_PATTERN_BYTES: usize = 16 * 1024;

/// Most bytes of a text after its tokenizer's normaliser and pre-tokenizer, by their largest growth.
pub const TOKENIZER_TEXT_BYTES: u64 = 64 * 1024 * 1024;

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

/// Largest ratio of unpacked to packed bytes of a `.gz` or `.zst` file, after the first 256 MiB.
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

/// Most bytes of a run file.
pub const RUN_FILE_BYTES: u64 = 16 * 1024 * 1024;
