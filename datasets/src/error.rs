//! What can go wrong with stored data, each as a sentence that names the place and the way out.

use std::io;
use std::path::{Path, PathBuf};

use crate::import::Place;

/// An error of this crate. Errors chain: print the [`source`](std::error::Error::source)s too.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // ---- files ----
    /// The operating system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },

    // ---- Parquet ----
    /// The file is cut short, damaged, or not Parquet.
    #[error(
        "{path} is not a whole Parquet file (cut short, damaged, or not Parquet): delete it and run the stage that writes it again"
    )]
    DamagedShard {
        /// The file.
        path: PathBuf,
        /// What the reader found.
        source: parquet::errors::ParquetError,
    },
    /// The writer refused a row.
    #[error("cannot write {path} as Parquet")]
    WriteShard {
        /// The file.
        path: PathBuf,
        /// The writer's reason.
        source: parquet::errors::ParquetError,
    },
    /// The file is Parquet, but not Potstill's.
    #[error(
        "{path} has no `{key}` in its footer, so Potstill did not write it: move it out of the folder"
    )]
    ForeignShard {
        /// The file.
        path: PathBuf,
        /// The footer key that is absent.
        key: &'static str,
    },
    /// The file was written by a later version.
    #[error(
        "{path} has schema version {found}, and this Potstill knows versions up to {known}: use the newer Potstill that wrote it"
    )]
    NewerSchema {
        /// The file.
        path: PathBuf,
        /// The version in the footer.
        found: u32,
        /// The newest version known here.
        known: u32,
    },
    /// A value in the footer cannot be read.
    #[error("`{key}` in the footer of {path} cannot be read: {why}")]
    BadFooter {
        /// The file.
        path: PathBuf,
        /// The footer key.
        key: &'static str,
        /// What is wrong with its value.
        why: String,
    },
    /// A column is absent, not expected, or of another type.
    #[error("the column `{column}` of a {table} table must be {expected}, and it is {found}")]
    Column {
        /// The table that was asked for, such as `signals`.
        table: &'static str,
        /// The column's name.
        column: String,
        /// The type it must have.
        expected: String,
        /// The type it has, or that it is absent.
        found: String,
    },
    /// A value of a column has a legal type and an illegal content.
    #[error("row {row}, column `{column}`: {why}")]
    Cell {
        /// Row in the file, from 0.
        row: usize,
        /// The column's name.
        column: String,
        /// What is wrong.
        why: String,
    },
    /// More values than one batch of a Parquet list can address.
    #[error("the column `{column}` holds more than {max} values in one batch: write fewer rows at a time", max = i32::MAX)]
    TooLarge {
        /// The column's name.
        column: String,
    },
    /// The settings name columns that do not go together.
    #[error("`columns`: {why}")]
    BadColumns {
        /// What is wrong with them.
        why: String,
    },
    /// Columns did not fit together.
    #[error("cannot build {what} as Arrow data")]
    Batch {
        /// The column or table.
        what: String,
        /// Arrow's reason.
        source: arrow_schema::ArrowError,
    },
    /// The error concerns this file.
    #[error("cannot use {path}")]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        source: Box<Error>,
    },
    /// A folder of shards has a hole.
    #[error(
        "{path} is absent, though later shards are there: restore it, or delete the folder and run the stage again"
    )]
    MissingShard {
        /// The file that should be there.
        path: PathBuf,
    },
    /// A Parquet file in a folder of shards does not follow their naming.
    #[error("{path} is not named like a shard (shard-00000.parquet): move it out of the folder")]
    StrayShard {
        /// The file.
        path: PathBuf,
    },
    /// A row was asked for that no shard has.
    #[error(
        "{dir} has no row {row} in shard {shard}: the list of rows belongs to another folder, so run `curate` again"
    )]
    NoSuchRow {
        /// The folder of shards.
        dir: PathBuf,
        /// The shard, from 0.
        shard: u32,
        /// The row in the shard, from 0.
        row: u32,
    },

    // ---- records ----
    /// A signal breaks its own rules.
    #[error("the signal of prompt {prompt_id}, sample {sample_index}, is not valid: {why}")]
    BadSignal {
        /// The prompt's id.
        prompt_id: String,
        /// Which sample of the prompt.
        sample_index: u32,
        /// The rule that is broken, with the position where there is one.
        why: String,
    },

    // ---- journal ----
    /// Another process holds the journal.
    #[error("{path} is in use by another process: wait for it, or stop it")]
    JournalInUse {
        /// The journal.
        path: PathBuf,
    },
    /// The file does not begin as a journal does.
    #[error("{path} is not a Potstill journal: move it away")]
    NotAJournal {
        /// The file.
        path: PathBuf,
    },
    /// A frame in the middle is damaged, with whole frames after it.
    #[error(
        "{path} is damaged at byte {offset}: the {frames} records before it are whole, and so are some after it (from byte {next}). \
         Restore the file from a copy, or keep what is before the damage with `truncate -s {offset} {path}` and run again"
    )]
    JournalDamaged {
        /// The journal.
        path: PathBuf,
        /// Where the first damaged frame begins, in bytes.
        offset: u64,
        /// How many whole frames precede it.
        frames: usize,
        /// Where a whole frame follows, in bytes.
        next: u64,
    },
    /// A record could not be stored; earlier ones are.
    #[error(
        "cannot add to {path}: the {frames} records before are safe, this one is not kept. Free space on the disk and run again"
    )]
    JournalAppend {
        /// The journal.
        path: PathBuf,
        /// How many records are safe.
        frames: usize,
        /// The system's reason.
        source: io::Error,
    },
    /// A record has no form as bytes, or its bytes are not that record.
    #[error(
        "the record at byte {offset} of {path} cannot be coded as a {type_name}; a journal is read by the version of Potstill that wrote it"
    )]
    JournalRecord {
        /// The journal.
        path: PathBuf,
        /// Where the frame begins, in bytes.
        offset: u64,
        /// The Rust type.
        type_name: &'static str,
        /// The coder's reason.
        source: postcard::Error,
    },
    /// The bytes of a frame changed after the journal was opened, or the span is another journal's.
    #[error(
        "{path} has no whole record of {bytes} bytes at byte {offset}: was it changed while in use?"
    )]
    JournalFrame {
        /// The journal.
        path: PathBuf,
        /// Where the frame begins, in bytes.
        offset: u64,
        /// Length of the payload in bytes.
        bytes: u32,
    },

    // ---- manifest ----
    /// A manifest is not what this version writes.
    #[error(
        "{path} is not a manifest that this Potstill can read: delete it and run the stage again"
    )]
    BadManifest {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        source: serde_json::Error,
    },
    /// A file name that JSON cannot hold.
    #[error("{path} has a name that is not UTF-8: rename it")]
    FileName {
        /// The file.
        path: PathBuf,
    },

    // ---- import ----
    /// A file whose name does not say what is in it.
    #[error(
        "{path} cannot be read: the end of its name must be .jsonl, .ndjson, .json, .csv or .tsv, each with or without .gz, or .parquet; rename the file, or convert it"
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// A file that is to be imported is cut short, damaged, or not Parquet.
    #[error(
        "{path} cannot be read as Parquet: fetch it again, or write it again with snappy or zstd compression"
    )]
    UnreadableTable {
        /// The file.
        path: PathBuf,
        /// What the reader found.
        source: parquet::errors::ParquetError,
    },
    /// A text is not JSON.
    #[error("{path}:{line}:{column} is not valid JSON: {why}; {rule}")]
    BadJson {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Byte in the line, from 1.
        column: usize,
        /// The parser's reason.
        why: String,
        /// What the file must be.
        rule: &'static str,
    },
    /// A line is not text.
    #[error("{path}:{line}:{column} is not valid UTF-8: convert the file to UTF-8")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Byte in the line, from 1.
        column: usize,
    },
    /// A row lacks a column that the run file names.
    #[error(
        "{path}{place} has no column `{column}`; it has {present}. Name one of these in `columns`"
    )]
    MissingColumn {
        /// The file.
        path: PathBuf,
        /// The row, or the file's header.
        place: Place,
        /// The column that was asked for.
        column: String,
        /// The columns there are, as text.
        present: String,
    },
    /// A row can be read, but is no prompt.
    #[error("{path}{place}: {why}")]
    BadPrompt {
        /// The file.
        path: PathBuf,
        /// The row.
        place: Place,
        /// What is wrong and what to do.
        why: String,
    },
    /// There is nothing to import.
    #[error("{path} gives no prompts: {why}")]
    NoPrompts {
        /// The file.
        path: PathBuf,
        /// Why it is none.
        why: &'static str,
    },
    /// The columns of a file are not of any known kind.
    #[error(
        "{path}: no column is known to hold the prompts; its first rows have {found}. Say which to use in `[import]`, such as {example}"
    )]
    UnknownColumns {
        /// The file.
        path: PathBuf,
        /// The columns of the first rows with their types, as text.
        found: String,
        /// A line for the run file.
        example: String,
    },

    // ---- tokenizer and chat template ----
    /// A folder without `tokenizer.json`.
    #[error(
        "{folder} has no tokenizer.json; Potstill reads fast tokenizers only (transformers writes one with `AutoTokenizer.from_pretrained(…).save_pretrained(…)`)"
    )]
    TokenizerMissing {
        /// The model's folder.
        folder: PathBuf,
    },
    /// A file of the tokenizer or of the model's configuration that is not JSON.
    #[error("{path} is not valid JSON: fetch the file again")]
    TokenizerJson {
        /// The file.
        path: PathBuf,
        /// Where the JSON breaks.
        source: serde_json::Error,
    },
    /// A file of the tokenizer or of the model's configuration whose content cannot be used.
    #[error("{path}: {reason}")]
    TokenizerContent {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Text that could not be encoded, or ids that could not be decoded.
    #[error("the tokenizer cannot {action}")]
    Tokenize {
        /// "encode the text …" or "decode …".
        action: String,
        /// What the tokenizer said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A chat template that minijinja cannot compile.
    #[error("chat template {template}, line {line}: {reason}")]
    TemplateSyntax {
        /// The template's name or file.
        template: String,
        /// Line in the template, from 1; 0 where it is not known.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A chat template that failed while rendering.
    #[error("chat template {template}, line {line}: cannot render the conversation: {reason}")]
    TemplateRender {
        /// The template's name or file.
        template: String,
        /// Line in the template, from 1; 0 where it is not known.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A chat template that called `raise_exception`.
    #[error("chat template {template} refuses the conversation: {message}")]
    TemplateRaised {
        /// The template's name or file.
        template: String,
        /// The template's own message.
        message: String,
    },
    /// Tools that are not a JSON array.
    #[error("the tools of a prompt have to be a JSON array: {reason}")]
    TemplateTools {
        /// What they are.
        reason: String,
    },
    /// Reasoning, a template that does not take it, and no marks to write it with.
    #[error(
        "chat template {template} has no place for reasoning (it never reads `reasoning_content`); say how to write it with `reasoning = {{ open = \"<think>\", close = \"</think>\" }}`, or use data without reasoning"
    )]
    ReasoningUnplaced {
        /// The template's name or file.
        template: String,
    },
    /// A template that leaves the reasoning of the assistant's turn out.
    #[error(
        "chat template {template} drops the reasoning of the assistant's turn.\n  missing:  {reasoning:?}\n  rendered: {rendered:?}\nhint: use a template that keeps it, or data without reasoning"
    )]
    ReasoningDropped {
        /// The template's name or file.
        template: String,
        /// The reasoning that is missing.
        reasoning: String,
        /// What the template made of the assistant's turn.
        rendered: String,
    },
    /// A template without generation marks where the prompt is not the start of the conversation.
    #[error(
        "chat template {template}: the rendered prompt is not the start of the rendered conversation, so the assistant's tokens are not known; they part at character {position}.\n  prompt:       {prompt:?}\n  conversation: {conversation:?}\nhint: put the assistant's turn between {{% generation %}} and {{% endgeneration %}} in the template"
    )]
    PromptNotPrefix {
        /// The template's name or file.
        template: String,
        /// Where the two part, in characters.
        position: usize,
        /// The prompt's rendering around that place.
        prompt: String,
        /// The conversation's rendering around that place.
        conversation: String,
    },
    /// A template with generation marks that are not around the last assistant turn.
    #[error(
        "chat template {template} has {{% generation %}} marks, but none around the last assistant turn.\n  rendered: {rendered:?}\nhint: put the marks around every assistant turn, or remove them all"
    )]
    GenerationUnmarked {
        /// The template's name or file.
        template: String,
        /// The end of the rendered conversation.
        rendered: String,
    },
    /// An assistant turn that does not end in an EOS token, so that a student would not learn to stop.
    #[error(
        "chat template {template} does not end the assistant's turn with an end-of-sequence token, so a student would never learn to stop.\n  rendered: {rendered:?}\n  end of sequence: {eos}\nhint: add the token to the template, or to eos_token_id in generation_config.json"
    )]
    EndOfTurnMissing {
        /// The template's name or file.
        template: String,
        /// What the template made of the assistant's turn.
        rendered: String,
        /// The EOS tokens of the tokenizer.
        eos: String,
    },
    /// An assistant turn whose text spells an EOS token.
    #[error(
        "the assistant's text contains {token:?}, which ends a sequence: everything behind it would be lost; remove it from the data"
    )]
    EndOfTurnInside {
        /// The token's text.
        token: String,
    },
    /// A prompt without a single token.
    #[error(
        "the prompt is empty after rendering with chat template {template}; a model needs at least one token to go on from"
    )]
    PromptEmpty {
        /// The template's name or file.
        template: String,
    },
    /// An order over nothing.
    #[error("there are no rows to draw from")]
    NoRows,

    // ---- store ----
    /// Two units have the same name.
    #[error("two prompts have the same id\nhint: run `import` again, which merges them")]
    DuplicateUnit,
    /// A store cannot address this much.
    #[error("{what}, which is more than a store can hold\nhint: split the run in two")]
    StoreLimit {
        /// What exceeds the limit.
        what: &'static str,
    },
    /// The files of a store are not those that were opened.
    #[error(
        "the journal or a published folder changed while it was read\nhint: let no other program write to the run directory, and run again"
    )]
    StoreChanged,
    /// A unit has no entry when its shard is written.
    #[error(
        "there is no entry for sample {sample_index} of prompt {prompt_id}\nhint: run the stage again, which asks for what is missing"
    )]
    MissingUnit {
        /// The prompt's id.
        prompt_id: String,
        /// Which sample of the prompt.
        sample_index: u32,
    },
    /// An answer has no prompt.
    #[error(
        "`prompts/` has no prompt {prompt_id}, or not in the order of `completions/`\nhint: run `collect` again, which publishes the answers to the present prompts"
    )]
    PromptMissing {
        /// The prompt's id.
        prompt_id: String,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io {
            action,
            path: path.to_path_buf(),
            source,
        }
    }

    /// Names the file an error was found in.
    pub(crate) fn in_file(self, path: &Path) -> Error {
        Error::InFile {
            path: path.to_path_buf(),
            source: Box::new(self),
        }
    }
}
