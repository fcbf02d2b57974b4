//! GGUF, the file format of llama.cpp: one file that holds weights, tokenizer and metadata.
//!
//! Source: the specification and the reader of llama.cpp b11434 (`gguf-py`, `ggml/src/gguf.cpp`).

mod block;
mod blocks256;
mod blocks32;
mod codec;
mod file;
mod header;

pub use block::BlockType;
pub use codec::{dequantize, quantize};
pub use file::GgufFile;
