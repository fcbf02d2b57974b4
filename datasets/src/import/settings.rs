//! Settings of `import`: the table `[import]` of the run file.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::column_path::beside;
use crate::limits::ROW_BYTES;
use crate::range::{Amount, Count, FilePath, Optional};

/// `[import]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportSettings {
    /// File of prompts: JSONL, JSON, CSV, TSV (each also as `.gz` or `.zst`) or Parquet, according to the end of the name.
    /// A folder, or a pattern such as `data/train-*.parquet`, stands for all its files of one format, in the order of
    /// their names. A file of a data set of the Hugging Face Hub is written `hf://datasets/org/name/data/train.parquet`,
    /// with a branch, tag or commit `hf://datasets/org/name@main/…`.
    pub path: FilePath,
    /// Number of prompts to read, from the start of the file. Default: all prompts.
    #[serde(with = "Optional::<Count>", default)]
    pub limit: Option<usize>,
    /// Columns that hold the prompt.
    pub columns: Columns,
    /// System message to put before every prompt that has none.
    pub system: Option<String>,
    /// Source of the answers that the student learns from.
    #[serde(default)]
    pub answers: AnswerSource,
    /// Character between the cells of a CSV or TSV file, such as `";"`. Default: a tab for `.tsv`; for `.csv` the one of
    /// `,`, `;`, tab and `|` that the header and the first rows agree on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delimiter: Option<Delimiter>,
    /// Longest row in bytes: a line of JSONL, an object of a JSON array, a record of CSV, or the needed cells of a row of
    /// Parquet. A longer row is an error, so that no file can fill the memory.
    #[serde(with = "Amount", default = "row_bytes")]
    #[schemars(default = "row_bytes")]
    pub max_row_bytes: usize,
}

fn row_bytes() -> usize {
    ROW_BYTES
}

/// A character between the cells of a CSV file: one of ASCII that is not a quote, a line end or NUL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "char", into = "char")]
#[schemars(with = "char")]
pub struct Delimiter(u8);

impl Delimiter {
    pub(super) fn byte(self) -> u8 {
        self.0
    }
}

impl TryFrom<char> for Delimiter {
    type Error = &'static str;

    fn try_from(delimiter: char) -> Result<Delimiter, &'static str> {
        match u8::try_from(delimiter) {
            Ok(byte) if byte.is_ascii() && !matches!(byte, b'"' | b'\r' | b'\n' | 0) => {
                Ok(Delimiter(byte))
            }
            _ => Err(
                "the delimiter is not one character of ASCII\nhint: set one, such as \";\" or \"\\t\"",
            ),
        }
    }
}

impl From<Delimiter> for char {
    fn from(delimiter: Delimiter) -> char {
        delimiter.0.into()
    }
}

impl ImportSettings {
    /// Creates settings that read all prompts of a file, without a system message.
    pub fn new(path: impl Into<PathBuf>, columns: Columns) -> ImportSettings {
        ImportSettings {
            path: FilePath::from(path.into()),
            limit: None,
            columns,
            system: None,
            answers: AnswerSource::Teacher,
            delimiter: None,
            max_row_bytes: ROW_BYTES,
        }
    }
}

/// `answers` of `[import]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AnswerSource {
    /// The teacher answers the prompts.
    #[default]
    Teacher,
    /// The answers of the data are used.
    Given,
}

/// `columns` of `[import]`: exactly one of `text`, `question`, `messages` or `instruction`, and the
/// columns beside it. A dot leads into an object: `data.question` is `question` in the column `data`, unless a column has
/// the whole name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Columns {
    /// Column with the prompt as one user message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Column with a question, which becomes one user message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub question: Option<String>,
    /// Column with the reference answer to `question`: a text, a number, or a list of several answers, of which the first is
    /// the reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Column with the group that a row belongs to; it may be null or empty. The report gives the accuracy of each
    /// group. `group` may stand beside any other column.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Column with a list of chat messages in OpenAI's form (`role`, `content`) or ShareGPT's (`from`, `value`). A last
    /// message of the assistant is the answer. A column `tools` beside this one holds the tools that the model may call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<String>,
    /// Column with an instruction, which becomes one user message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instruction: Option<String>,
    /// Column with the input to `instruction`, which is put behind it and a blank line. It may be absent, null or empty
    /// in any row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// Column with the answer to `instruction`, or a list of several answers: texts, messages of the assistant, or objects
    /// with `text`, `content` or `answer`. A row in which it is null or empty has no answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
}

/// Name of the column of tools beside a column of messages.
pub(super) const TOOLS: &str = "tools";

impl Columns {
    /// Names one column of text.
    #[must_use]
    pub fn text(column: &str) -> Columns {
        Columns {
            text: Some(column.to_owned()),
            ..Columns::default()
        }
    }

    /// Names one column of chat messages.
    #[must_use]
    pub fn messages(column: &str) -> Columns {
        Columns {
            messages: Some(column.to_owned()),
            ..Columns::default()
        }
    }

    /// Checks that exactly one kind of prompt is named, and only with the columns that go with that kind.
    ///
    /// # Errors
    /// A text that says what is wrong, and the hint on a line of its own.
    pub fn check(&self) -> Result<(), String> {
        let kinds = [
            &self.text,
            &self.question,
            &self.messages,
            &self.instruction,
        ];
        match kinds.iter().filter(|column| column.is_some()).count() {
            1 => {}
            0 => {
                return Err("no column holds the prompt\nhint: name exactly one of `text`, `question`, `messages` or `instruction`".to_owned());
            }
            _ => {
                return Err("more than one column holds the prompt\nhint: keep exactly one of `text`, `question` (with `answer`, if there is one), `messages` or `instruction` (with `input` and `output`)".to_owned());
            }
        }
        if self.answer.is_some() && self.question.is_none() {
            return Err(
                "`answer` goes with `question` only\nhint: leave `answer` out, or name the prompt's column in `question`"
                    .to_owned(),
            );
        }
        if (self.input.is_some() || self.output.is_some()) && self.instruction.is_none() {
            return Err("`input` and `output` go with `instruction` only\nhint: leave them out, or name the prompt's column in `instruction`".to_owned());
        }
        Ok(())
    }

    /// Returns the columns that every row must have.
    pub(super) fn required(&self) -> impl Iterator<Item = &str> {
        let columns = [
            &self.text,
            &self.question,
            &self.answer,
            &self.group,
            &self.messages,
            &self.instruction,
            &self.output,
        ];
        columns.into_iter().flatten().map(String::as_str)
    }

    /// Returns the columns that a row may have.
    pub(super) fn optional(&self) -> impl Iterator<Item = String> {
        let tools = self.messages.as_ref().map(|column| beside(column, TOOLS));
        self.input.clone().into_iter().chain(tools)
    }
}

#[cfg(test)]
mod tests {
    use super::Columns;

    #[test]
    fn columns_that_do_not_go_together_are_refused() {
        let some = |name: &str| Some(name.to_owned());
        let nothing = Columns::default();
        assert!(nothing.check().unwrap_err().starts_with("no column holds"));
        let both = Columns {
            question: some("q"),
            ..Columns::text("t")
        };
        assert!(both.check().unwrap_err().starts_with("more than one"));
        let answer = Columns {
            answer: some("a"),
            ..Columns::text("t")
        };
        assert!(
            answer
                .check()
                .unwrap_err()
                .starts_with("`answer` goes with")
        );
        let output = Columns {
            output: some("o"),
            ..Columns::messages("m")
        };
        assert!(output.check().unwrap_err().starts_with("`input` and"));
        let group = Columns {
            group: some("g"),
            ..Columns::messages("m")
        };
        assert_eq!(group.check(), Ok(()));
        assert_eq!(group.required().collect::<Vec<_>>(), ["g", "m"]);
        assert_eq!(group.optional().collect::<Vec<_>>(), ["tools"]);
    }
}
