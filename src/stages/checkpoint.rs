//! Checkpoints that the run file names: what identifies one, and whether it fits together.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use potstill_datasets::range::FilePath;
use potstill_datasets::{ChatTemplate, FloatType, TemplateSource, Tokenizer, hash_file};
use potstill_model::{Config, DType, weight_files};
use sha2::{Digest, Sha256};

use crate::run_file::{Loaded, Teacher};

/// Files beside the weights that change what a checkpoint computes or how text is read.
const SMALL_FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// A checkpoint's folder, which must be there.
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
            "{} has no config.json, so it is not a checkpoint in Hugging Face layout",
            folder.display()
        ),
        false => format!("there is no folder {}", folder.display()),
    };
    Err(run.problem(key, what).into())
}

/// The teacher's folder.
///
/// # Errors
/// As [`folder`], and where the teacher is behind a server.
pub fn teacher(run: &Loaded) -> anyhow::Result<PathBuf> {
    let Some(path) = &teacher_table(run)?.path else {
        let what = "this needs a teacher that runs here: give the `path` of a checkpoint";
        return Err(run.problem(&["teacher"], what).into());
    };
    folder(run, &["teacher", "path"], path)
}

/// The folder that says how text becomes tokens for the teacher: its own, or for one behind a server
/// its `tokenizer`. `None` where a server's is not known.
///
/// # Errors
/// [`crate::run_file::ConfigError`] where it is not there.
pub fn teachers_text(run: &Loaded) -> anyhow::Result<Option<PathBuf>> {
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
            let what = format!("{} has no tokenizer.json", folder.display());
            Err(run.problem(&["teacher", "tokenizer"], what).into())
        }
    }
}

/// `[teacher]`, where a stage needs it.
///
/// # Errors
/// [`crate::run_file::ConfigError`] when it is absent.
pub fn teacher_table(run: &Loaded) -> anyhow::Result<&Teacher> {
    run.file.teacher.as_ref().ok_or_else(|| {
        let what =
            "this stage needs [teacher] with the `path` of a checkpoint or the `url` of a server";
        run.problem(&["teacher"], what).into()
    })
}

/// The folder that the student starts from.
///
/// # Errors
/// As [`folder`].
pub fn student(run: &Loaded) -> anyhow::Result<PathBuf> {
    match &run.file.student.path {
        Some(path) => folder(run, &["student", "path"], path),
        None => teacher(run),
    }
}

/// SHA-256 over the content of everything in a checkpoint that matters.
///
/// # Errors
/// When a file cannot be read, or a shard that the index names is absent.
pub fn content_hash(dir: &Path) -> anyhow::Result<String> {
    hash_of(small_files(dir).chain(weight_files(dir)?))
}

/// SHA-256 over what a checkpoint has besides weights: its shape and how text is read.
///
/// # Errors
/// When a file cannot be read.
pub fn shell_hash(dir: &Path) -> anyhow::Result<String> {
    hash_of(small_files(dir))
}

fn small_files(dir: &Path) -> impl Iterator<Item = PathBuf> {
    SMALL_FILES
        .iter()
        .map(|name| dir.join(name))
        .filter(|path| path.exists())
}

fn hash_of(files: impl Iterator<Item = PathBuf>) -> anyhow::Result<String> {
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

/// A tokenizer, when every id it gives has a row in the model's embedding.
///
/// # Errors
/// When either cannot be read, or the tokenizer is the larger one.
pub fn tokenizer(dir: &Path) -> anyhow::Result<Tokenizer> {
    let tokenizer = Tokenizer::from_dir(dir)?;
    let rows = Config::from_dir(dir)?.vocab_size;
    let ids = tokenizer.vocab_size();
    if ids > rows {
        bail!(
            "the tokenizer in {dir} has ids up to {}, and the model's embedding has {rows} rows (`vocab_size` in {dir}/config.json): they are not of one checkpoint; copy the files of one into {dir}",
            ids - 1,
            dir = dir.display()
        );
    }
    Ok(tokenizer)
}

/// The template of `[teacher]`, or of `[student]` where there is no teacher: `"plain"`, a file, or
/// the checkpoint's own.
///
/// # Errors
/// When there is none, or it cannot be read or compiled.
pub fn template(run: &Loaded, dir: &Path) -> anyhow::Result<ChatTemplate> {
    let (table, template) = match &run.file.teacher {
        Some(teacher) => ("teacher", &teacher.template),
        None => ("student", &run.file.student.template),
    };
    match template {
        Some(TemplateSource::Plain) => Ok(ChatTemplate::plain()?),
        Some(TemplateSource::File(file)) => {
            let file = file.as_path();
            let source = std::fs::read_to_string(file).map_err(|e| {
                run.problem(
                    &[table, "template"],
                    format!("cannot read {}: {e}", file.display()),
                )
            })?;
            let name = file.display().to_string();
            ChatTemplate::from_source(&name, &source).with_context(|| format!("cannot use {name}"))
        }
        None => ChatTemplate::from_dir(dir)?.ok_or_else(|| {
            let own = run.file.student.path.as_ref();
            let key: &[&str] = match own.is_some_and(|path| path.as_path() == dir) {
                true => &["student", "path"],
                false => &[table],
            };
            let what = format!(
                "{} has no chat template\nhint: set `template` in [{table}]: \"plain\" puts messages one after the other, and a path names a .jinja file",
                dir.display()
            );
            run.problem(key, what).into()
        }),
    }
}

/// The run file's type as the model's.
pub fn dtype(dtype: FloatType) -> DType {
    match dtype {
        FloatType::F32 => DType::F32,
        FloatType::Bf16 => DType::BF16,
        FloatType::F16 => DType::F16,
        FloatType::F64 => DType::F64,
    }
}
