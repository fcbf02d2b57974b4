//! GGUF, the file format of llama.cpp: one file that holds weights, tokenizer and metadata.
//!
//! Source: the specification and the reader of llama.cpp b11434 (`gguf-py`, `ggml/src/gguf.cpp`).

mod architecture;
mod config;
mod export;
mod file;
mod header;
mod lay_out;
mod metadata;
mod mix;
mod pre_tokenizer;
mod rotary;
mod source;
mod tokenizer;
mod tokens;
mod weights;
mod write;

pub use export::{GgufLabels, export_gguf};
pub(crate) use lay_out::GGUF_FILE;
pub use lay_out::lay_out_gguf;
pub use mix::GgufType;
pub(crate) use weights::GgufWeights;
