//! Errors of the crate. Each message names the file and tensor, the prompt or the key; a hint is on a line of its own.

use std::path::PathBuf;

/// All errors that this crate returns.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device is unknown to this build, or does not compute.
    #[error("no device `{name}`: {why}\nhint: {hint}")]
    NoDevice {
        /// Name of the device as the caller gave it.
        name: String,
        /// Reason why there is no such device.
        why: String,
        /// Remedy for the user.
        hint: &'static str,
    },
    /// A file or folder could not be read or written.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// The action that failed: "read", "write", …
        action: &'static str,
        /// Path of the file or folder.
        path: PathBuf,
        /// Error of the operating system.
        #[source]
        source: std::io::Error,
    },
    /// A JSON file is malformed or has other contents than expected.
    #[error("`{}` is not valid JSON for a {what}\nhint: the file may be truncated; get it again", path.display())]
    Json {
        /// Path of the JSON file.
        path: PathBuf,
        /// The kind of contents that was expected.
        what: &'static str,
        /// Error of the parser, with line and column.
        #[source]
        source: serde_json::Error,
    },
    /// A key of `config.json` is absent, or has a value that this crate does not support.
    #[error("`{}`, key `{key}`: {why}", path.display())]
    Config {
        /// Path of the configuration.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// The problem, and the values that are supported.
        why: String,
    },
    /// A folder holds no weights.
    #[error("`{}` holds neither `model.safetensors` nor `model.safetensors.index.json` nor `model.gguf`\nhint: name a folder with weights in Hugging Face layout", dir.display())]
    NoWeights {
        /// Path of the folder.
        dir: PathBuf,
    },
    /// A shard that the index names does not exist.
    #[error("`{}` does not exist, but `{}` names it for the tensor `{tensor}`\nhint: download the missing shard", shard.display(), index.display())]
    MissingShard {
        /// Path of the absent shard.
        shard: PathBuf,
        /// Path of the index that names the shard.
        index: PathBuf,
        /// Name of the first tensor that the shard should hold.
        tensor: String,
    },
    /// A file is not a complete safetensors file.
    #[error("`{}` is not a complete safetensors file\nhint: the file may be truncated; download it again", path.display())]
    Safetensors {
        /// Path of the weight file.
        path: PathBuf,
        /// Error of the safetensors parser.
        #[source]
        source: safetensors::SafeTensorError,
    },
    /// A GGUF file is damaged, or holds something that this crate does not read.
    #[error("cannot use `{}`: {what}\nhint: {hint}", path.display())]
    Gguf {
        /// Path of the file.
        path: PathBuf,
        /// The problem, with the key or the tensor.
        what: String,
        /// Remedy for the user.
        hint: &'static str,
    },
    /// A checkpoint cannot be written as GGUF.
    #[error("cannot write `{}` as GGUF: {what}\nhint: {hint}", dir.display())]
    NoGguf {
        /// Folder of the checkpoint.
        dir: PathBuf,
        /// The problem, with the file and the key.
        what: String,
        /// Remedy for the user.
        hint: &'static str,
    },
    /// A tensor that the configuration requires is absent.
    #[error("`{}` has no tensor `{tensor}`\nhint: the weights do not belong to this `config.json`; use both from the same model", path.display())]
    MissingTensor {
        /// Path of the weight file or of the index.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
    },
    /// A tensor has another shape than the configuration requires.
    #[error("`{}`: tensor `{tensor}` has the shape {found:?}, but `config.json` requires {expected:?}\nhint: the weights do not belong to this `config.json`; use both from the same model", path.display())]
    Shape {
        /// Path of the weight file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Shape of the tensor in the file.
        found: Vec<usize>,
        /// Shape that follows from the configuration.
        expected: Vec<usize>,
    },
    /// The weights hold a tensor of the decoder that the configuration has no place for.
    #[error("`{}`: `config.json` has no place for {count} of the stored tensors, among them `{tensor}`\nhint: `num_hidden_layers` or another size in `config.json` may be wrong; use both files from the same model", path.display())]
    SpareTensors {
        /// Path of a weight file.
        path: PathBuf,
        /// Name of the first tensor without a place.
        tensor: String,
        /// Number of tensors without a place.
        count: usize,
    },
    /// An index names a file that is not in the folder of the checkpoint.
    #[error("`{}` names the file `{file}`, which is not a plain file name\nhint: shards must be in the same folder as their index", index.display())]
    OutsideFolder {
        /// Path of the index.
        index: PathBuf,
        /// The file that the index names.
        file: String,
    },
    /// A path that should be a file is a folder, a pipe or a device.
    #[error("`{}` is not a regular file\nhint: name a folder with the files themselves, or with links to them", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A text file is too large to be what its name says.
    #[error("`{}` has {length} bytes, and at most {limit} are read\nhint: the file cannot be what its name says; get it again", path.display())]
    TextTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
        /// Largest length that is read.
        limit: u64,
    },
    /// A tensor is stored in a type that this crate does not read.
    #[error("`{}`: tensor `{tensor}` is stored as {dtype}, but only F64, F32, F16, BF16 and F8_E4M3 are supported\nhint: use the checkpoint in one of these types", path.display())]
    StoredType {
        /// Path of the weight file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Type of the tensor in the file.
        dtype: String,
    },
    /// A model was requested in a type that models do not run in.
    #[error("models run and are stored in F64, F32, F16 or BF16, not in {dtype:?}")]
    FloatType {
        /// The requested type.
        dtype: burn::tensor::DType,
    },
    /// A device does not compute in a type.
    #[error(
        "the device does not compute in {}\nhint: use f32 (`dtype` in [teacher], `precision` in [train]), or another `--device`",
        dtype.name()
    )]
    DeviceType {
        /// The requested type.
        dtype: burn::tensor::DType,
    },
    /// Layer pruning would keep no layer, or a layer that the model does not have.
    #[error(
        "a model of {count} layers cannot be pruned to its layers {layers:?}\nhint: name one or more layers from 0 to {}",
        count.saturating_sub(1)
    )]
    PrunedLayers {
        /// The requested layers.
        layers: Vec<usize>,
        /// Number of layers of the model.
        count: usize,
    },
    /// The feed-forward blocks of a model cannot be cut to a width.
    #[error(
        "the feed-forward blocks cannot be cut to {width} neurons, because {why}\nhint: a width can be cut in models without experts, and to a smaller number only"
    )]
    PrunedWidth {
        /// The requested width.
        width: usize,
        /// The reason.
        why: String,
    },
    /// An adapter does not fit a model.
    #[error("{what}\nhint: {hint}")]
    Adapter {
        /// The problem, with the key, layer or file.
        what: String,
        /// Remedy for the user.
        hint: String,
    },
    /// A prompt has no tokens.
    #[error(
        "prompt {prompt} has no tokens\nhint: begin the prompt with a token, such as the model's BOS token"
    )]
    EmptyPrompt {
        /// Index of the prompt in the batch.
        prompt: usize,
    },
    /// A prompt and its answer do not fit into the context.
    #[error(
        "prompt {prompt} has {tokens} tokens, and with {max_new_tokens} new tokens it exceeds the context of {limit}\nhint: shorten the prompt, or generate fewer tokens"
    )]
    PromptTooLong {
        /// Index of the prompt in the batch.
        prompt: usize,
        /// Number of tokens of the prompt.
        tokens: usize,
        /// Largest number of tokens of the answer.
        max_new_tokens: usize,
        /// Number of positions of the model's context.
        limit: usize,
    },
    /// A prompt holds a token id outside the vocabulary.
    #[error(
        "prompt {prompt}, position {position}: token id {id} is outside the vocabulary of {vocab_size} tokens\nhint: use the tokenizer that belongs to the model"
    )]
    TokenId {
        /// Index of the prompt in the batch.
        prompt: usize,
        /// Position of the token in the prompt.
        position: usize,
        /// The token id.
        id: u32,
        /// Number of rows of the embedding.
        vocab_size: usize,
    },
    /// The number of seeds differs from the number of prompts.
    #[error("there are {prompts} prompts but {seeds} seeds: each prompt needs a seed of its own")]
    Seeds {
        /// Number of prompts.
        prompts: usize,
        /// Number of seeds.
        seeds: usize,
    },
    /// A sampling setting is out of range.
    #[error("sampling setting `{setting}` is {value}, but must be {range}")]
    Sampling {
        /// Name of the setting.
        setting: &'static str,
        /// Value of the setting.
        value: f64,
        /// The allowed values.
        range: &'static str,
    },
    /// A stop string is empty.
    #[error(
        "stop string {index} is empty and would end every answer at once\nhint: remove the empty string"
    )]
    EmptyStop {
        /// Index of the stop string, from 0.
        index: usize,
    },
    /// The values of a tensor could not be read from the device.
    #[error("cannot read {what} from the device: {why}")]
    Device {
        /// The tensor that was read.
        what: &'static str,
        /// Error of the backend.
        why: String,
    },
}

impl Error {
    /// Makes a function that adds the failed action and the path to an error of the operating system.
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
