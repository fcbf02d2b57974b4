//! GGUF, the file format of llama.cpp: one file that holds weights, tokenizer and metadata.
//!
//! Source: the specification and the reader of llama.cpp b11434 (`gguf-py`, `ggml/src/gguf.cpp`).

mod architecture;
mod block;
mod blocks256;
mod blocks32;
mod codec;
mod config;
mod file;
mod header;
mod lay_out;
mod pre_tokenizer;
mod rotary;
mod tokenizer;
mod weights;

pub use block::BlockType;
pub use codec::{dequantize, quantize};
pub use file::GgufFile;
pub use lay_out::lay_out_gguf;
pub use weights::GgufWeights;
