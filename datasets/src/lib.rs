//! What Potstill stores: records, Parquet, journal, tokens and chat templates, batches

mod batch;
mod encode;
mod error;
mod records;
mod template;
mod token_bytes;
mod tokenizer;

pub use batch::Order;
pub use encode::{Encoded, Reasoning, encode_conversation, prompt_ids, split_reasoning};
pub use error::Error;
pub use records::{Message, Role, ToolCall};
pub use template::{ChatTemplate, RenderOptions, Rendered};
pub use tokenizer::{SpecialTokens, Tokenizer};
