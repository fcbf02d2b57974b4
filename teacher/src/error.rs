//! What can go wrong with a teacher: each message names the file, prompt or setting, and the way out.

use std::path::PathBuf;

/// Everything this crate reports.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint's model could not be loaded, or could not run.
    #[cfg(feature = "local")]
    #[error(transparent)]
    Model(#[from] potstill_model::Error),
    /// The checkpoint's tokenizer or template, or a text, is not usable.
    #[error(transparent)]
    Text(#[from] potstill_datasets::Error),
    /// A prompt cannot be rendered or encoded.
    #[error("{prompt}: the prompt cannot be encoded for the teacher")]
    Encode {
        /// Where the prompt comes from, such as `train.jsonl:17`.
        prompt: String,
        /// What the tokenizer or the template says.
        #[source]
        source: potstill_datasets::Error,
    },
    /// The tokenizer knows ids that the model has no embedding for.
    #[error("the tokenizer `{}` has {tokenizer_size} ids, and the embedding of `{}` has {model_size} rows: tokenizer and model are not of one checkpoint", tokenizer.display(), model.display())]
    VocabularyTooLarge {
        /// The tokenizer's file.
        tokenizer: PathBuf,
        /// Ids of the tokenizer, added tokens counted.
        tokenizer_size: usize,
        /// The model's configuration.
        model: PathBuf,
        /// Rows of the model's embedding.
        model_size: usize,
    },
    /// The checkpoint has no chat template and none is given.
    #[error("`{}` has no chat template (`chat_template.jinja`, or in `tokenizer_config.json`): set the teacher's template, such as \"plain\" for a base model", dir.display())]
    NoTemplate {
        /// The checkpoint.
        dir: PathBuf,
    },
    /// A prompt does not fit into the context with its answer.
    #[error(
        "{prompt}: the prompt has {tokens} tokens, and with {max_new_tokens} new ones it exceeds the teacher's context of {limit}: drop or shorten it, or lower `max_new_tokens`"
    )]
    PromptTooLong {
        /// Where the prompt comes from, such as `train.jsonl:17`.
        prompt: String,
        /// Tokens of the rendered prompt.
        tokens: usize,
        /// Tokens asked for.
        max_new_tokens: usize,
        /// Positions of the model.
        limit: usize,
    },
    /// A text to score does not fit into the context.
    #[error(
        "prompt {prompt_id}, sample {sample_index}: the text has {tokens} tokens, and the teacher's context is {limit}: drop or cut it"
    )]
    TextTooLong {
        /// The prompt's id.
        prompt_id: String,
        /// Which sample of the prompt.
        sample_index: u32,
        /// Tokens of the text.
        tokens: usize,
        /// Positions of the model.
        limit: usize,
    },
    /// A text to score is not what a signal can be made of.
    #[error("prompt {prompt_id}, sample {sample_index}: {why}")]
    BadText {
        /// The prompt's id.
        prompt_id: String,
        /// Which sample of the prompt.
        sample_index: u32,
        /// What is wrong with it.
        why: String,
    },
    /// The model's logits are not numbers.
    #[error(
        "prompt {prompt_id}, sample {sample_index}: the teacher's logits at position {position} are not finite; half precision overflows on some models: set the teacher's dtype to f32"
    )]
    NotFinite {
        /// The prompt's id.
        prompt_id: String,
        /// Which sample of the prompt.
        sample_index: u32,
        /// The position that should be predicted.
        position: usize,
    },
    /// A setting of the scoring is out of range.
    #[error("scoring setting `{setting}` is {value}: {range}")]
    Scoring {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: f64,
        /// What it may be.
        range: &'static str,
    },
    /// A list of providers cannot be used.
    #[error("`{}`: {why}\nan entry is a table such as [my-server] with url, model, terms, source and checked (YYYY-MM-DD)", path.display())]
    Providers {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        why: String,
    },
    /// No socket may be opened.
    #[error(
        "the run file says `offline = true`, and the teacher is behind a server: set it to false to ask it"
    )]
    Offline,
    /// An endpoint cannot be asked as it is described.
    #[error("endpoint `{endpoint}`: {why}")]
    Endpoint {
        /// Its name.
        endpoint: String,
        /// What is wrong, and the way out.
        why: String,
    },
    /// A setting of the collection is out of range, or does not go with another.
    #[error("collection: {why}")]
    Collection {
        /// What is wrong, and the way out.
        why: String,
    },
    /// What the caller does with calls and answers failed.
    #[error("{what}")]
    Caller {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The list of requests cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    RequestLog {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A line of the list of requests is of another kind, so the spending is not known.
    #[error(
        "{}:{line} is not a line of the request log, so the spending so far is not known\nhint: restore the file, or move it away to begin at 0",
        path.display()
    )]
    RequestLogLine {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong with the line.
        source: serde_json::Error,
    },
}

impl Error {
    /// An error of the function that gives the next request.
    pub(crate) fn next_request(source: CallbackError) -> Error {
        Error::Caller {
            what: "cannot read the next prompt",
            source,
        }
    }

    /// An error of the function that takes completed entries.
    pub(crate) fn completed_entries(source: CallbackError) -> Error {
        Error::Caller {
            what: "cannot keep answers that were completed",
            source,
        }
    }
}

/// An error of a function that the caller gave.
pub type CallbackError = Box<dyn std::error::Error + Send + Sync>;
