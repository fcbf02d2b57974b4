//! Storage of Potstill's data and conversion of text to tokens: records, Parquet, journal, import, tokenizer, chat
//! templates, loss masks and packing.

mod align;
mod answer;
mod answered;
mod batch;
mod bos;
mod canonical;
mod chat;
mod curate;
mod distributions;
mod encode;
mod error;
mod files;
mod finding;
mod float_type;
mod import;
pub mod limits;
mod lines;
mod manifest;
mod mask;
mod model_files;
mod near_duplicates;
mod pack;
mod parquet;
mod private;
pub mod range;
mod reader;
mod reasoning;
mod records;
mod schema;
mod sealed;
mod signal;
mod spelling;
mod store;
mod table;
mod template;
mod token_bytes;
mod tokenizer;
mod variant;
mod visible;

pub use crate::align::{Span, TextsDiffer, align, ids_by_bytes};
pub use crate::answer::encode_answer;
pub use crate::answered::{PromptedAnswer, PromptedAnswers};
pub use crate::batch::Order;
pub use crate::bos::bos_problem;
pub use crate::canonical::canonical_json;
pub use crate::curate::{CurateSettings, KeptAnswers, Split, WrongAnswers};
pub use crate::distributions::{DistributionRow, DistributionRows, Distributions, SignalRow};
pub use crate::encode::{Encoded, encode_conversation, prompt_ids};
pub use crate::error::{Error, RowLocation};
pub use crate::files::{
    FileHash, hash_each, hash_file, hash_files, replace_file, replace_shared_file,
};
pub use crate::finding::Finding;
pub use crate::float_type::FloatType;
pub use crate::import::{
    AnswerSource, Columns, Delimiter, Detected, ImportRows, ImportSettings, Imported, ImportedRow,
    data_files, detect_columns, import, import_rows,
};
pub use crate::lines::{check_first_lines, read_checked_lines, to_checked_line};
pub use crate::manifest::{Manifest, manifest_path, stage_key};
pub use crate::mask::{MaskReport, MaskedToken, check_mask, check_sampled};
pub use crate::model_files::read_text;
pub use crate::near_duplicates::{NEAR_DUPLICATE_SIMILARITY, near_duplicates};
pub use crate::pack::pack;
pub use crate::parquet::{
    Footer, PROMPTS_PER_SHARD, ShardWriter, read_footer, shard_name, shards, write_shard,
};
pub use crate::private::{create_private, create_private_folder, private_file};
pub use crate::reader::{FolderRows, ShardRows, read_shard, row_count};
pub use crate::reasoning::{Reasoning, split_reasoning};
pub use crate::records::{
    Completion, Dropped, Failed, FinishReason, Message, NO_SIGNAL, NearDuplicate, OwnText, Prompt,
    Provenance, Role, SampledToken, Selected, SequenceValues, TaskSample, ToolCall, TopToken,
    Usage, Verdict,
};
pub use crate::schema::{PROVENANCE_KEY, Record, SCHEMA_KEY, SCHEMA_VERSION};
pub use crate::sealed::{read_sealed, to_sealed_json, write_sealed};
pub use crate::signal::{MASS_TOLERANCE, SequenceLength, Signal};
pub use crate::spelling::Spelling;
pub use crate::store::{
    Answer, Entry, FrameSpan, Journal, Published, Store, StoredRecord, Tables, Tally, UnitIndex,
    publish_answers, publish_signals,
};
pub use crate::table::Table;
pub use crate::template::{
    ChatTemplate, RenderOptions, Rendered, TemplateArguments, TemplateSource,
};
pub use crate::tokenizer::{EosSource, SpecialTokens, Tokenizer};
pub use crate::variant::{Arm, RunModel, UnknownModel, Variant};
pub use crate::visible::{visible, visible_json, visible_line};
