//! Checkpoints that the run file names: finds their folders, hashes them, and checks that the tokenizer
//! fits the model.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use potstill_datasets::limits::TOKENIZER_FILE_BYTES;
use potstill_datasets::range::FilePath;
use potstill_datasets::{
    ChatTemplate, FloatType, TemplateArguments, TemplateSource, Tokenizer, hash_file, read_text,
};
use potstill_model::{Config, DType, Decoder, Device, weight_files};
use potstill_teacher::TeacherSettings;
use sha2::{Digest, Sha256};

use super::memory;
use crate::run_file::{HubSource, Loaded};

/// Files beside the weights that affect what a checkpoint computes or how it tokenises text.
const SMALL_FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// Returns the folder of a checkpoint, which must exist.
///
/// # Errors
/// [`crate::run_file::ConfigError`] that points at `key`.
pub fn folder(run: &Loaded, key: &[&str], path: &FilePath) -> anyhow::Result<PathBuf> {
    let folder = path.as_path().to_owned();
    if folder.join("config.json").is_file() {
        return Ok(folder);
    }
    let what = match folder.is_dir() {
        true => format!(
            "{} has no config.json, so it is not a checkpoint in Hugging Face layout\nhint: name the folder that holds config.json, tokenizer.json and the safetensors files",
            folder.display()
        ),
        false => format!(
            "the folder {} does not exist\nhint: a relative path starts at the folder of the run file",
            folder.display()
        ),
    };
    Err(run.problem(key, what).into())
}

/// Returns the folder of the local teacher.
///
/// # Errors
/// As [`folder`]; also when the teacher is behind a server.
pub fn teacher(run: &Loaded) -> anyhow::Result<PathBuf> {
    let Some(path) = &teacher_table(run)?.path else {
        let what = "this needs a local teacher, and [teacher] names a server\nhint: set `path` of [teacher] to the folder of a checkpoint";
        return Err(run.problem(&["teacher"], what).into());
    };
    folder(run, &["teacher", "path"], path)
}

/// Returns the folder with the teacher's tokenizer and chat template: the teacher's own folder, or for a
/// teacher behind a server the folder that `tokenizer` of `[teacher]` names. `None` if `tokenizer` is not
/// set.
///
/// # Errors
/// [`crate::run_file::ConfigError`] when the folder or its `tokenizer.json` does not exist.
pub fn teacher_tokenizer_folder(run: &Loaded) -> anyhow::Result<Option<PathBuf>> {
    let teacher = teacher_table(run)?;
    if !teacher.is_served() {
        return self::teacher(run).map(Some);
    }
    let Some(path) = &teacher.tokenizer else {
        return Ok(None);
    };
    let folder = path.as_path().to_owned();
    match folder.join("tokenizer.json").is_file() {
        true => Ok(Some(folder)),
        false => {
            let what = format!(
                "{} has no tokenizer.json\nhint: name a folder that holds the tokenizer of the model that the server runs",
                folder.display()
            );
            Err(run.problem(&["teacher", "tokenizer"], what).into())
        }
    }
}

/// Returns the table `[teacher]` for a stage that needs it.
///
/// # Errors
/// [`crate::run_file::ConfigError`] when the table is absent.
pub fn teacher_table(run: &Loaded) -> anyhow::Result<&TeacherSettings> {
    run.settings.teacher.as_ref().ok_or_else(|| {
        let what = "this stage needs a table [teacher]\nhint: add [teacher] with the `path` of a checkpoint or the `url` of a server";
        run.problem(&["teacher"], what).into()
    })
}

/// Returns the folder of the checkpoint that the student starts from.
///
/// # Errors
/// As [`folder`].
pub fn student(run: &Loaded) -> anyhow::Result<PathBuf> {
    match &run.settings.student.path {
        Some(path) => folder(run, &["student", "path"], path),
        None => teacher(run),
    }
}

/// Checks that a checkpoint has its weights, or that they are fetched from its repository before they are needed.
///
/// # Errors
/// When the weights or one of their shards are absent.
pub fn check_weights(run: &Loaded, folder: &Path) -> anyhow::Result<()> {
    match hub_source(run, folder) {
        Some(source) if !source.has_weights() => Ok(()),
        _ => Ok(weight_files(folder).map(|_| ())?),
    }
}

/// The name of a checkpoint for people: its repository and commit, its GGUF file, or its folder.
pub fn name(run: &Loaded, folder: &Path) -> String {
    let path = run.gguf.get(folder).map_or(folder, PathBuf::as_path);
    match hub_source(run, path) {
        Some(source) => source.describe(),
        None => path.display().to_string(),
    }
}

/// The repository that a folder or file of the Hub's cache belongs to.
fn hub_source<'a>(run: &'a Loaded, path: &Path) -> Option<&'a HubSource> {
    let mut sources = run.hub.values();
    sources.find(|source| path.starts_with(&source.folder))
}

/// Computes the SHA-256 of the weights and of `SMALL_FILES`.
///
/// # Errors
/// When a file cannot be read, or a weight shard that the index names is absent.
pub fn content_hash(dir: &Path) -> anyhow::Result<String> {
    hash_of(small_files(dir).chain(weight_files(dir)?))
}

/// Computes the SHA-256 of `SMALL_FILES` alone, without the weights.
///
/// # Errors
/// When a file cannot be read.
pub fn small_files_hash(dir: &Path) -> anyhow::Result<String> {
    hash_of(small_files(dir))
}

fn small_files(dir: &Path) -> impl Iterator<Item = PathBuf> {
    SMALL_FILES
        .iter()
        .map(|name| dir.join(name))
        .filter(|path| path.exists())
}

/// Computes the SHA-256 of the names and contents of files.
pub(super) fn hash_of(files: impl Iterator<Item = PathBuf>) -> anyhow::Result<String> {
    let mut hash = Sha256::new();
    for path in files {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        hash.update(format!("{name} {}\n", hash_file(&path)?.sha256));
    }
    Ok(hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// Reads a tokenizer and checks that each of its ids has a row in the model's embedding. Added tokens may have none; a
/// text with them is refused.
///
/// # Errors
/// When the tokenizer or the configuration cannot be read, or an ordinary token has no row in the embedding.
pub fn tokenizer(dir: &Path) -> anyhow::Result<Tokenizer> {
    let tokenizer = Tokenizer::from_dir(dir)?;
    let rows = Config::from_dir(dir)?.vocab_size;
    let ids = tokenizer.vocab_size();
    tokenizer.with_rows(rows).map_err(|token| {
        anyhow!(
            "the tokenizer in {dir} has ids up to {}, but the model's embedding has only {rows} rows (`vocab_size` in {dir}/config.json), so {token:?} has none\nhint: tokenizer and model come from different checkpoints; copy all files of one checkpoint into {dir}",
            ids - 1,
            dir = dir.display()
        )
    })
}

/// Loads a checkpoint. Its distributions are over the tokens of the tokenizer in `tokenizer_dir`, without the padding of
/// the embedding; a training checkpoint has no tokenizer of its own.
///
/// # Errors
/// When the tokenizer cannot be read or is larger than the embedding, or the weights cannot be read.
pub fn load(
    dir: &Path,
    tokenizer_dir: &Path,
    dtype: DType,
    device: &Device,
) -> anyhow::Result<Decoder> {
    let tokens = tokenizer(tokenizer_dir)?.vocab_size();
    check_memory(dir, dtype, device)?;
    Ok(potstill_model::load(dir, dtype, device)?.with_token_count(tokens))
}

/// Refuses a checkpoint whose weights do not fit into memory in this type.
///
/// # Errors
/// When the configuration cannot be read, or the weights do not fit.
pub fn check_memory(dir: &Path, dtype: DType, device: &Device) -> anyhow::Result<()> {
    let parameters = Config::from_dir(dir)?.parameters();
    memory::require(
        &format!("loading the model in {}", dir.display()),
        parameters,
        dtype.size() as u64,
        device,
        "set `dtype = \"bf16\"` in [teacher], or let a server run the teacher and set its `url`",
    )
}

/// Returns the chat template that `template` of `[teacher]` (of `[student]` in a run without a teacher)
/// selects: `"plain"`, a file, or by default the checkpoint's own. Its arguments are those of the same table.
///
/// # Errors
/// When the checkpoint has no template and none is set, or the template cannot be read or compiled.
pub fn template(run: &Loaded, dir: &Path) -> anyhow::Result<ChatTemplate> {
    let arguments = match &run.settings.teacher {
        Some(teacher) => teacher.template_arguments.clone(),
        None => student_arguments(run),
    };
    Ok(bare_template(run, dir)?.with_arguments(arguments))
}

/// Returns the chat template that the student learns and answers with: as [`template`], with the arguments of
/// `[student]` where it has them.
///
/// # Errors
/// As [`template`].
pub fn student_template(run: &Loaded, dir: &Path) -> anyhow::Result<ChatTemplate> {
    Ok(bare_template(run, dir)?.with_arguments(student_arguments(run)))
}

/// Returns the arguments of the student's template: its own, or by default the teacher's.
fn student_arguments(run: &Loaded) -> TemplateArguments {
    let teacher = run.settings.teacher.as_ref();
    let own = run.settings.student.template_arguments.clone();
    own.or_else(|| Some(teacher?.template_arguments.clone()))
        .unwrap_or_default()
}

/// Returns the chat template without arguments.
fn bare_template(run: &Loaded, dir: &Path) -> anyhow::Result<ChatTemplate> {
    let (table, template) = match &run.settings.teacher {
        Some(teacher) => ("teacher", &teacher.template),
        None => ("student", &run.settings.student.template),
    };
    match template {
        Some(TemplateSource::Plain) => Ok(ChatTemplate::plain()?),
        Some(TemplateSource::File(file)) => {
            let file = file.as_path();
            let source = read_text(file, TOKENIZER_FILE_BYTES)
                .map_err(|e| run.problem(&[table, "template"], e.to_string()))?;
            let name = file.display().to_string();
            ChatTemplate::from_source(&name, &source).with_context(|| format!("cannot use {name}"))
        }
        None => ChatTemplate::from_dir(dir)?.ok_or_else(|| {
            let own = run.settings.student.path.as_ref();
            let key: &[&str] = match own.is_some_and(|path| path.as_path() == dir) {
                true => &["student", "path"],
                false => &[table],
            };
            let what = format!(
                "{} has no chat template\nhint: set `template` of [{table}] to a .jinja file, or to \"plain\", which concatenates the messages",
                dir.display()
            );
            run.problem(key, what).into()
        }),
    }
}

/// Converts the run file's number type into the model's.
pub fn dtype(dtype: FloatType) -> DType {
    match dtype {
        FloatType::F32 => DType::F32,
        FloatType::Bf16 => DType::BF16,
        FloatType::F16 => DType::F16,
        FloatType::F64 => DType::F64,
    }
}
