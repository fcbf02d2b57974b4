//! The error type of this crate. It holds plain data only and knows no other module's types.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::finding::Finding;

/// An error of this crate. The text says what is wrong; the remedy, if there is one, is on a last line that begins with
/// `hint: `. Errors chain, so print the [`source`](std::error::Error::source)s too.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation.
    #[error("cannot {action} {path}")]
    Io {
        /// The operation as a verb.
        action: &'static str,
        /// Path of the file or folder.
        path: PathBuf,
        /// Reason of the operating system.
        source: io::Error,
    },
    /// A file, a folder, a setting or a text cannot be used. No caller distinguishes these cases.
    #[error("{problem}{}", hint_line(hint))]
    Invalid {
        /// The problem, with the path or position.
        problem: String,
        /// The remedy; empty if there is none.
        hint: String,
    },
    /// The error concerns this file.
    #[error("cannot use {path}")]
    InFile {
        /// Path of the file.
        path: PathBuf,
        /// The problem with the file.
        source: Box<Error>,
    },

    // ---- Parquet ----
    /// A shard is cut short, damaged, or not Parquet.
    #[error(
        "{path} is not a complete Parquet file (cut short, damaged, or not Parquet)\nhint: delete it and run the stage that writes it again"
    )]
    DamagedShard {
        /// Path of the file.
        path: PathBuf,
        /// Reason of the Parquet reader.
        source: parquet::errors::ParquetError,
    },
    /// The Parquet writer failed.
    #[error("cannot write {path} as Parquet")]
    WriteShard {
        /// Path of the file.
        path: PathBuf,
        /// Reason of the Parquet writer.
        source: parquet::errors::ParquetError,
    },
    /// Arrow refused to build a column or a batch.
    #[error("cannot build {what} as Arrow data")]
    Arrow {
        /// Name of the column or table.
        what: String,
        /// Arrow's reason.
        source: arrow_schema::ArrowError,
    },
    /// A value has the type of its column and an illegal content.
    #[error("row {row}, column `{column}`: {why}")]
    Cell {
        /// Row in the file, from 0.
        row: usize,
        /// Name of the column.
        column: String,
        /// The problem with the value.
        why: String,
    },
    /// A list of rows names a row that no shard has.
    #[error(
        "{dir} has no row {row} in shard {shard}, so the list of rows belongs to another folder\nhint: run `curate` again"
    )]
    NoSuchRow {
        /// Path of the folder of shards.
        dir: PathBuf,
        /// Number of the shard, from 0.
        shard: u32,
        /// Row within the shard, from 0.
        row: u32,
    },
    /// A signal breaks a rule that every stored signal keeps.
    #[error("the signal of prompt {prompt_id}, sample {sample_index}, is not valid: {why}")]
    BadSignal {
        /// Id of the prompt.
        prompt_id: String,
        /// Number of the sample among those of its prompt, from 0.
        sample_index: u32,
        /// The broken rule, with the position if there is one.
        why: String,
    },

    // ---- journal and store ----
    /// Another process holds the journal.
    #[error("{path} is in use by another process\nhint: wait for the process, or stop it")]
    JournalInUse {
        /// Path of the journal.
        path: PathBuf,
    },
    /// The store was opened to count its entries only.
    #[error("this store was opened to count its entries, not to read or add any")]
    StoreCounted,
    /// The file does not begin like a journal.
    #[error("{path} is not a Potstill journal\nhint: move it to another folder")]
    NotAJournal {
        /// Path of the file.
        path: PathBuf,
    },
    /// A damaged frame is followed by whole ones.
    #[error(
        "{path} is damaged at byte {offset}: the {frames} records before it are whole, and some after it are too (from byte {next})\nhint: restore the file from a copy, or keep the records before the damage with `truncate -s {offset} {path}` and run again"
    )]
    JournalDamaged {
        /// Path of the journal.
        path: PathBuf,
        /// Byte at which the first damaged frame begins.
        offset: u64,
        /// Number of whole frames before it.
        frames: usize,
        /// Byte at which a later whole frame begins.
        next: u64,
    },
    /// The last frame is as long as it was written, and damaged.
    #[error(
        "{path} is damaged at byte {offset}: its last record is complete and does not have its checksum; the {frames} records before it are whole\nhint: restore the file from a copy, or cut the last record off with `truncate -s {offset} {path}` and run again, which asks for its answers again"
    )]
    JournalEndDamaged {
        /// Path of the journal.
        path: PathBuf,
        /// Byte at which the damaged frame begins.
        offset: u64,
        /// Number of whole frames before it.
        frames: usize,
    },
    /// A record could not be written; earlier records are safe.
    #[error("cannot add a record to {path}; the {frames} earlier records are safe")]
    JournalAppend {
        /// Path of the journal.
        path: PathBuf,
        /// Number of earlier records.
        frames: usize,
        /// Reason of the operating system.
        source: io::Error,
    },
    /// A record cannot be serialised, or the bytes of a frame are not the expected record.
    #[error(
        "the record at byte {offset} of {path} cannot be converted to or from a {type_name}\nhint: read the journal with the version of Potstill that wrote it"
    )]
    JournalRecord {
        /// Path of the journal.
        path: PathBuf,
        /// Byte at which the frame begins.
        offset: u64,
        /// Name of the Rust type.
        type_name: &'static str,
        /// Reason of the serialiser.
        source: postcard::Error,
    },
    /// A frame changed after the journal was opened, or its span belongs to another journal.
    #[error(
        "{path} has no whole record of {bytes} bytes at byte {offset}\nhint: let no other program change the journal, and run again"
    )]
    JournalFrame {
        /// Path of the journal.
        path: PathBuf,
        /// Byte at which the frame begins.
        offset: u64,
        /// Length of the payload in bytes.
        bytes: u32,
    },
    /// Two units have the same prompt id and sample.
    #[error("two prompts have the same id\nhint: run `import` again, which merges them")]
    DuplicateUnit,
    /// A store has more units or bytes than it can address.
    #[error("{what}, which is more than a store can hold\nhint: split the run in two")]
    StoreLimit {
        /// The exceeded limit as a clause.
        what: &'static str,
    },
    /// The files of a store are not those that were opened.
    #[error(
        "the journal or a published folder changed while it was read\nhint: let no other program write to the run directory, and run again"
    )]
    StoreChanged,
    /// A unit has no entry when its shard is written.
    #[error(
        "there is no entry for sample {sample_index} of prompt {prompt_id}\nhint: run the stage again, which asks for the missing answers"
    )]
    MissingUnit {
        /// Id of the prompt.
        prompt_id: String,
        /// Number of the sample among those of its prompt, from 0.
        sample_index: u32,
    },
    /// An answer has no prompt.
    #[error(
        "`prompts/` has no prompt {prompt_id}, or not in the order of `completions/`\nhint: run `collect` again, which publishes the answers to the present prompts"
    )]
    PromptMissing {
        /// Id of the prompt.
        prompt_id: String,
    },

    // ---- import ----
    /// An imported file is cut short, damaged, or not Parquet.
    #[error(
        "{path} cannot be read as Parquet\nhint: fetch it again, or write it again with snappy or zstd compression"
    )]
    UnreadableParquet {
        /// Path of the file.
        path: PathBuf,
        /// Reason of the Parquet reader.
        source: parquet::errors::ParquetError,
    },
    /// A file or a row of it lacks a column that the settings name.
    #[error(
        "{path}{location} has no column `{column}`; it has {present}\nhint: name one of these in `columns` of [import]"
    )]
    MissingColumn {
        /// Path of the file.
        path: PathBuf,
        /// The row, or the file as a whole.
        location: RowLocation,
        /// Name of the absent column.
        column: String,
        /// The columns that exist, as text.
        present: String,
    },

    // ---- tokenizer and chat template ----
    /// A folder has no `tokenizer.json`.
    #[error(
        "{folder} has no tokenizer.json, and Potstill reads fast tokenizers only\nhint: write one with transformers: `AutoTokenizer.from_pretrained(…).save_pretrained(…)`"
    )]
    TokenizerMissing {
        /// Path of the model's folder.
        folder: PathBuf,
    },
    /// The tokenizer failed to encode or decode a text.
    #[error("the tokenizer cannot {action}")]
    Tokenize {
        /// The operation as a verb with its object.
        action: String,
        /// Reason of the tokenizer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A chat template failed while rendering.
    #[error("chat template {template}, line {line}: cannot render the conversation: {reason}")]
    TemplateRender {
        /// Name or file of the template.
        template: String,
        /// Line in the template, from 1; 0 if it is not known.
        line: usize,
        /// The problem.
        reason: String,
    },
    /// A chat template called `raise_exception`.
    #[error("chat template {template} refuses the conversation: {message}")]
    TemplateRaised {
        /// Name or file of the template.
        template: String,
        /// The template's message.
        message: String,
    },
    /// A prompt with its answer cannot be trained on.
    #[error("chat template {template}: {finding}")]
    Untrainable {
        /// Name or file of the template.
        template: String,
        /// The problem.
        finding: Box<Finding>,
    },
    /// There are no rows to put in an order.
    #[error("there are no rows to draw from")]
    NoRows,
}

/// Position in an imported file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowLocation {
    /// Line of a text file, from 1; the first line of a row that has several.
    Line(usize),
    /// Row of a Parquet file, from 1.
    Row(usize),
    /// The file as a whole.
    File,
}

impl fmt::Display for RowLocation {
    /// Writes the text that follows the file's name: `:17`, `, row 17`, or nothing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RowLocation::Line(line) => write!(f, ":{line}"),
            RowLocation::Row(row) => write!(f, ", row {row}"),
            RowLocation::File => Ok(()),
        }
    }
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io {
            action,
            path: path.to_path_buf(),
            source,
        }
    }

    /// Creates an [`Error::Invalid`]. An empty `hint` is left out of the message.
    pub(crate) fn invalid(problem: impl Into<String>, hint: impl Into<String>) -> Error {
        Error::Invalid {
            problem: problem.into(),
            hint: hint.into(),
        }
    }

    /// Names the file that the error was found in.
    pub(crate) fn in_file(self, path: &Path) -> Error {
        Error::InFile {
            path: path.to_path_buf(),
            source: Box::new(self),
        }
    }
}

fn hint_line(hint: &str) -> String {
    match hint.is_empty() {
        true => String::new(),
        false => format!("\nhint: {hint}"),
    }
}
