//! What can go wrong here: each message names the file and tensor, prompt or key, and the way out.

use std::path::PathBuf;

/// Everything this crate reports.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device that this build does not know, or that does not compute.
    #[error("no device `{name}`: {why}")]
    NoDevice {
        /// As it was asked for.
        name: String,
        /// What is wrong, and what there is.
        why: String,
    },
    /// A file or folder could not be read or written.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was tried: "read", "write", …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A JSON file is not the JSON that it should be.
    #[error("`{}` is not valid JSON for a {what}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the file should be.
        what: &'static str,
        /// The parser's answer, with line and column.
        #[source]
        source: serde_json::Error,
    },
    /// A key of `config.json` is absent, or has a value that this crate does not run.
    #[error("`{}`, key `{key}`: {why}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key in it.
        key: &'static str,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// The folder holds no weights.
    #[error("`{}` holds neither `model.safetensors` nor `model.safetensors.index.json`: point to a folder with weights in Hugging Face layout", dir.display())]
    NoWeights {
        /// The folder.
        dir: PathBuf,
    },
    /// A shard is named by the index and does not exist.
    #[error("`{}` is absent, though `{}` names it for the tensor `{tensor}`: fetch the missing shard", shard.display(), index.display())]
    MissingShard {
        /// The file that is absent.
        shard: PathBuf,
        /// The index that names it.
        index: PathBuf,
        /// The first tensor that should be in it.
        tensor: String,
    },
    /// A file is not a whole safetensors file.
    #[error("`{}` is not a whole safetensors file: it may be truncated, so fetch it again", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The reader's answer.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// A tensor that the configuration asks for is absent.
    #[error("`{}` has no tensor `{tensor}`: the weights do not fit `config.json`", path.display())]
    MissingTensor {
        /// The file or the index.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
    },
    /// A tensor has another shape than the configuration asks for.
    #[error("`{}`: tensor `{tensor}` has the shape {found:?}, and `config.json` asks for {expected:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape by the configuration.
        expected: Vec<usize>,
    },
    /// A tensor is stored in a type that this crate does not read.
    #[error("`{}`: tensor `{tensor}` is stored as {dtype}: only F64, F32, F16 and BF16 are read", path.display())]
    StoredType {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The type in the file.
        dtype: String,
    },
    /// A model was asked for in a type that it does not run in.
    #[error("a model runs and is stored in F64, F32, F16 or BF16, not in {dtype:?}")]
    FloatType {
        /// The type asked for.
        dtype: burn::tensor::DType,
    },
    /// A cut keeps every n-th layer, and n was 0.
    #[error("a cut keeps every n-th layer, and n is at least 1")]
    CutEvery,
    /// A prompt has no tokens.
    #[error("prompt {prompt} has no tokens: a model needs at least one, such as its BOS token")]
    EmptyPrompt {
        /// Index of the prompt in the batch.
        prompt: usize,
    },
    /// A prompt and its answer do not fit into the context.
    #[error(
        "prompt {prompt} has {tokens} tokens, and {tokens} + {max_new_tokens} new ones exceed the context of {limit}: shorten the prompt or ask for fewer tokens"
    )]
    PromptTooLong {
        /// Index of the prompt in the batch.
        prompt: usize,
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens asked for.
        max_new_tokens: usize,
        /// Positions of the model.
        limit: usize,
    },
    /// A prompt holds a token id that the model does not have.
    #[error(
        "prompt {prompt}, position {position}: token id {id} is outside of the vocabulary of {vocab_size}: is this the model's own tokenizer?"
    )]
    TokenId {
        /// Index of the prompt in the batch.
        prompt: usize,
        /// Position of the token.
        position: usize,
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// There is not one seed per prompt.
    #[error("{prompts} prompts came with {seeds} seeds: each sequence needs its own")]
    Seeds {
        /// Prompts given.
        prompts: usize,
        /// Seeds given.
        seeds: usize,
    },
    /// A sampling setting is out of range.
    #[error("sampling setting `{setting}` is {value}: {range}")]
    Sampling {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: f64,
        /// What it may be.
        range: &'static str,
    },
    /// A stop string is empty.
    #[error("stop string {index} is empty, which would end every answer at once: leave it out")]
    EmptyStop {
        /// Which one, from 0.
        index: usize,
    },
    /// The device could not give the values of a tensor.
    #[error("cannot read {what} from the device: {why}")]
    Device {
        /// What was read.
        what: &'static str,
        /// The backend's answer.
        why: String,
    },
}

impl Error {
    /// Wraps the operating system's answer with what was tried on which path.
    pub(crate) fn io(
        action: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
