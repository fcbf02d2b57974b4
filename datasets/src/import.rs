//! Import of prompts, and of answers if there are any, from JSON, CSV and Parquet files. The settings name the columns.

mod answers;
mod cell;
mod column_path;
mod delimited;
mod delimiter;
mod detect;
mod encoding;
mod file;
mod files;
mod format;
mod json;
mod json_value;
mod parquet;
mod parquet_open;
mod records;
mod row;
mod settings;
mod text;
mod thrift;

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::PathBuf;

pub use self::detect::{Detected, detect_columns};
pub use self::files::data_files;
use self::format::{check_headers, no_prompts, rows};
use self::row::RowIterator;
pub use self::settings::{AnswerSource, Columns, Delimiter, ImportSettings};
use crate::error::Error;
use crate::records::{Completion, FinishReason, Message, Prompt, Usage};

/// The prompts and answers of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// Prompts in the order of the file, each id once.
    pub prompts: Vec<Prompt>,
    /// Answers in the order of `prompts`; the answers to a prompt are numbered from 0. They have no tokens, no usage and
    /// provenance 0.
    pub answers: Vec<Completion>,
    /// Number of rows with neither a new prompt nor a new answer. The reference of a prompt is that of its first row.
    pub duplicates: usize,
}

/// Reads a whole file with [`import_rows`].
///
/// # Errors
/// Those of [`import_rows`] and of its items.
pub fn import(settings: &ImportSettings) -> Result<Imported, Error> {
    let (mut prompts, mut answers, mut duplicates) = (Vec::new(), Vec::new(), 0);
    for row in import_rows(settings)? {
        let row = row?;
        duplicates += usize::from(row.is_duplicate());
        let numbered = row.answers.into_iter();
        answers.extend(numbered.map(|answer| (row.prompt_number, answer)));
        if row.is_new_prompt {
            prompts.push(row.prompt);
        }
    }
    // The sort is stable, so the samples of a prompt stay in order.
    answers.sort_by_key(|(prompt_number, _)| *prompt_number);
    Ok(Imported {
        prompts,
        answers: answers.into_iter().map(|(_, answer)| answer).collect(),
        duplicates,
    })
}

/// Reads a file row by row. The end of its name determines the format: `.jsonl` and `.ndjson` (an object on each line; a
/// byte order mark, blank lines and CRLF are accepted), `.json` (the same, or one array of objects, or one object around
/// such an array), `.csv` and `.tsv` (with a header; numbers stay text, messages are JSON text), any of these followed by
/// `.gz` or `.zst`, or `.parquet` (one batch of rows in memory at a time, and only the needed columns). A folder and a
/// pattern stand for several files (see [`data_files`]), which must have the same header if they have one.
///
/// `system` of the settings is put before conversations without a system message. Reading stops after `limit` distinct
/// prompts; answers to them in later rows are not read. Memory holds some 60 bytes for each prompt and each answer, and
/// one row of at most `max_row_bytes`, or one batch of Parquet.
///
/// # Errors
/// [`Error::Io`]; [`Error::UnreadableParquet`]; [`Error::Invalid`] for settings or a file that cannot be used. An item is
/// [`Error::MissingColumn`], or [`Error::Invalid`] for a row that cannot be used or a file without rows.
pub fn import_rows(settings: &ImportSettings) -> Result<ImportRows<'_>, Error> {
    let columns_error = |why: String| Error::invalid(format!("`columns`: {why}"), "");
    settings.columns.check().map_err(columns_error)?;
    if settings.limit == Some(0) {
        return Err(Error::invalid(
            "the limit of prompts is 0",
            "import at least one prompt",
        ));
    }
    let files = data_files(settings.path.as_path())?;
    if files.len() > 1 {
        check_headers(&files, settings)?;
    }
    let mut import = ImportRows {
        settings,
        files: files.into(),
        current: None,
        prompts: HashMap::new(),
        answers: HashSet::new(),
    };
    import.open_next()?;
    Ok(import)
}

/// A row of an imported file.
#[derive(Debug, Clone, PartialEq)]
pub struct ImportedRow {
    /// The row's prompt.
    pub prompt: Prompt,
    /// Number of the prompt, from 0, in the order of the prompts' first rows.
    pub prompt_number: usize,
    /// Whether no earlier row had this prompt.
    pub is_new_prompt: bool,
    /// The row's answers, but those that were given to the prompt before. Their sample index counts the answers to the
    /// prompt.
    pub answers: Vec<Completion>,
}

impl ImportedRow {
    /// Returns whether the row has neither a new prompt nor a new answer.
    pub fn is_duplicate(&self) -> bool {
        !self.is_new_prompt && self.answers.is_empty()
    }
}

/// The rows of a file, from [`import_rows`].
pub struct ImportRows<'a> {
    settings: &'a ImportSettings,
    /// The files that are not open yet.
    files: VecDeque<PathBuf>,
    /// The open file and its remaining rows; `None` after the end or an error.
    current: Option<(PathBuf, RowIterator)>,
    /// Number of each prompt and the number of its answers, by the hash of the prompt.
    prompts: HashMap<u128, (usize, u32)>,
    /// Hashes of prompt and answer.
    answers: HashSet<u128>,
}

impl ImportRows<'_> {
    /// Opens the next file, if there is one.
    fn open_next(&mut self) -> Result<(), Error> {
        self.current = None;
        if let Some(path) = self.files.pop_front() {
            let rows = rows(&path, self.settings, false)?;
            self.current = Some((path, rows));
        }
        Ok(())
    }

    fn next_row(&mut self) -> Result<Option<ImportedRow>, Error> {
        while let Some((path, rows)) = &mut self.current {
            match rows.next() {
                Some(row) => {
                    let read = row?.read(path, self.settings)?;
                    return Ok(Some(self.numbered(read)));
                }
                None => self.open_next()?,
            }
        }
        Ok(None)
    }

    /// Numbers a row's prompt and its new answers.
    fn numbered(&mut self, (prompt, answers): (Prompt, Vec<Message>)) -> ImportedRow {
        let key = hash(&prompt.id);
        let next = self.prompts.len();
        let mut is_new_prompt = false;
        let (prompt_number, samples) = self.prompts.entry(key).or_insert_with(|| {
            is_new_prompt = true;
            (next, 0)
        });
        let mut added = Vec::new();
        for answer in answers {
            // An answer is identified by the id that a prompt with this message would have.
            let turn = Prompt::new(vec![answer.clone()], None, None, String::new());
            let pair = key.wrapping_mul(PAIR_FACTOR) ^ hash(&turn.id);
            if self.answers.insert(pair) {
                added.push(completion(prompt.id.clone(), *samples, answer));
                *samples += 1;
            }
        }
        ImportedRow {
            prompt_number: *prompt_number,
            is_new_prompt,
            answers: added,
            prompt,
        }
    }
}

impl Iterator for ImportRows<'_> {
    type Item = Result<ImportedRow, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.current.as_ref()?;
        let read = match self.next_row() {
            Ok(None) if self.prompts.is_empty() => {
                Some(Err(no_prompts(self.settings.path.as_path())))
            }
            other => other.transpose(),
        };
        let is_full = self.settings.limit == Some(self.prompts.len());
        if is_full || !matches!(read, Some(Ok(_))) {
            self.current = None;
        }
        read
    }
}

/// An odd number that mixes the hash of a prompt before it is combined with the hash of an answer.
const PAIR_FACTOR: u128 = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835;

/// Converts a prompt's id to a number.
fn hash(id: &str) -> u128 {
    u128::from_str_radix(id, 16).unwrap_or_default()
}

fn completion(prompt_id: String, sample_index: u32, answer: Message) -> Completion {
    let finish_reason = match answer.tool_calls.is_empty() {
        true => FinishReason::Stop,
        false => FinishReason::ToolCalls,
    };
    Completion {
        prompt_id,
        sample_index,
        reasoning: answer.reasoning,
        answer: answer.content,
        tool_calls: answer.tool_calls,
        finish_reason,
        usage: Usage {
            prompt_tokens: 0,
            completion_tokens: 0,
        },
        tokens: Vec::new(),
        provenance: 0,
    }
}

#[cfg(test)]
mod tests;
