//! Limits of what is read from outside: data files, templates, tokenizers, replies of servers and waits.
//!
//! Each limit bounds time and memory, and is far above what honest input needs. What passes a limit is an error that
//! names the limit. Limits that a user may want to change are settings of the run file, and only their defaults are
//! here. `docs/limits.md` is made from this file and from `model/src/limits.rs`, which has the limits of models.

/// Deepest nesting of JSON in a reply of a server, counted in open brackets.
pub const REPLY_JSON_DEPTH: usize = 128;

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
pub const MODEL_TEXT_BYTES: u64 = 256 * 1024 * 1024;

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
