//! Errors of this crate. A message names the file, prompt or setting; a remedy follows on a line of its own that begins
//! `hint: `.

use std::path::PathBuf;

/// An error of this crate.
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
    #[error("{prompt}: cannot encode the prompt for the teacher")]
    Encode {
        /// Place of the prompt, such as `train.jsonl:17`.
        prompt: String,
        /// Error of the tokenizer or the template.
        #[source]
        source: potstill_datasets::Error,
    },
    /// The tokenizer has ordinary tokens without a row in the model's embedding.
    #[error("the tokenizer `{}` has {tokenizer_size} ids, but the embedding of `{}` has {model_size} rows, so {token:?} has none\nhint: use tokenizer and model of one checkpoint", tokenizer.display(), model.display())]
    VocabularyTooLarge {
        /// File of the tokenizer.
        tokenizer: PathBuf,
        /// Number of ids of the tokenizer, added tokens included.
        tokenizer_size: usize,
        /// The first token that has no row and is not an added token.
        token: String,
        /// Configuration file of the model.
        model: PathBuf,
        /// Number of rows of the model's embedding.
        model_size: usize,
    },
    /// The checkpoint has no chat template and none is given.
    #[error("`{}` has no chat template (`chat_template.jinja`, or in `tokenizer_config.json`)\nhint: set the teacher's `template`, such as \"plain\" for a base model", dir.display())]
    NoTemplate {
        /// Folder of the checkpoint.
        dir: PathBuf,
    },
    /// A prompt with its longest answer does not fit into the context.
    #[error(
        "{prompt}: the prompt has {tokens} tokens, and with {max_new_tokens} new ones it exceeds the teacher's context of {limit}\nhint: drop or shorten the prompt, or lower `max_new_tokens`"
    )]
    PromptTooLong {
        /// Place of the prompt, such as `train.jsonl:17`.
        prompt: String,
        /// Tokens of the rendered prompt.
        tokens: usize,
        /// Largest number of new tokens.
        max_new_tokens: usize,
        /// Context length of the model, tokens.
        limit: usize,
    },
    /// A text to score does not fit into the context.
    #[error(
        "prompt {prompt_id}, sample {sample_index}: the text has {tokens} tokens, and the teacher's context is {limit}\nhint: drop or cut the text"
    )]
    TextTooLong {
        /// Id of the prompt.
        prompt_id: String,
        /// Index of the sample among those of its prompt.
        sample_index: u32,
        /// Tokens of the text.
        tokens: usize,
        /// Context length of the model, tokens.
        limit: usize,
    },
    /// No signal can be made of a text to score.
    #[error("prompt {prompt_id}, sample {sample_index}: {why}")]
    BadText {
        /// Id of the prompt.
        prompt_id: String,
        /// Index of the sample among those of its prompt.
        sample_index: u32,
        /// Defect of the text.
        why: String,
    },
    /// The model's logits are not finite.
    #[error(
        "prompt {prompt_id}, sample {sample_index}: the teacher's logits at position {position} are not finite; half precision overflows on some models\nhint: set the teacher's `dtype` to \"f32\""
    )]
    NotFinite {
        /// Id of the prompt.
        prompt_id: String,
        /// Index of the sample among those of its prompt.
        sample_index: u32,
        /// Position of the token that the logits predict.
        position: usize,
    },
    /// A setting of the scoring is out of range.
    #[error("scoring setting `{setting}` is {value}: {range}")]
    Scoring {
        /// Name of the setting.
        setting: &'static str,
        /// Value of the setting.
        value: f64,
        /// Allowed range.
        range: &'static str,
    },
    /// A list of providers cannot be used.
    #[error("`{}`: {why}\nhint: an entry is a table such as [my-server] with url, model, terms, source and checked (YYYY-MM-DD)", path.display())]
    Providers {
        /// File of the list.
        path: PathBuf,
        /// The defect, with line and column.
        why: String,
    },
    /// No socket may be opened.
    #[error(
        "the run file sets `offline = true`, but the teacher is behind a server\nhint: set `offline` to false to send requests"
    )]
    Offline,
    /// The settings of an endpoint are not usable.
    #[error("endpoint `{endpoint}`: {why}")]
    Endpoint {
        /// Name of the endpoint.
        endpoint: String,
        /// The defect, and a hint.
        why: String,
    },
    /// A setting of a collection is out of range, or contradicts another.
    #[error("collection: {why}")]
    Collection {
        /// The defect, and a hint.
        why: String,
    },
    /// A callback of the caller, or a resource of the system, failed.
    #[error("{what}")]
    Caller {
        /// The failed action.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The list of requests cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    RequestLog {
        /// The attempted action, as a verb.
        action: &'static str,
        /// Path of the list.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
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
