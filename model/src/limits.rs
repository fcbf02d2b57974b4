//! Limits of what is read from a model's folder: configuration, weights and GGUF files.
//!
//! Each limit is far above what released models need, and keeps an absurd file from taking memory or time before its
//! weights are looked at. `docs/limits.md` is made from this file and from `datasets/src/limits.rs`.

/// Most bytes of `config.json` and of each other text file of a model's folder.
pub const MODEL_TEXT_BYTES: u64 = 100_000_000;

/// Most bytes of the header of a safetensors file.
pub const SAFETENSORS_HEADER_BYTES: u64 = 100_000_000;

/// Largest count in `config.json`: of rows, columns, heads and others.
pub const CONFIG_COUNT: u64 = 268_435_456;

/// Most layers of a model.
pub const MODEL_LAYERS: usize = 10_000;

/// Most experts of all layers of a model together.
pub const MODEL_EXPERTS: usize = 200_000;

/// Most columns of a head that rotary positions rotate.
pub const ROTARY_COLUMNS: usize = 65_536;

/// Largest count in the metadata of a GGUF file: of layers, heads, and numbers in a row.
pub const GGUF_COUNT: usize = 16_777_216;

/// Largest alignment in bytes of the tensors of a GGUF file.
pub const GGUF_ALIGNMENT: u64 = 1_048_576;

/// Longest token in bytes of a GGUF file for which ways to merge it are looked for.
pub const GGUF_TOKEN_BYTES: usize = 4096;
