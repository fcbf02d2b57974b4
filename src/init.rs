//! `init`: writes a commented run file, from flags or after a few questions.
//!
//! The text is generated from the schema of the run file, so that it contains every key. A key is set
//! if its value follows from the data and the teacher; otherwise it is commented out with its default.

mod columns;
mod write;

use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use potstill_datasets::range::FilePath;
use potstill_datasets::{ChatTemplate, Tokenizer, data_files};
use potstill_model::Config;

use crate::errors;
use crate::progress::{Console, ask, can_ask};
use crate::run_file::{ConfigError, RunName, expand_path};
use crate::stages::sources;
use columns::Detected;

/// Values given by flags; those that are absent are asked for.
#[derive(Debug, Clone, Default)]
pub struct InitOptions {
    /// Path of the data file, or its name on the Hugging Face Hub.
    pub data: Option<String>,
    /// Path of the teacher's folder or GGUF file, or its name on the Hugging Face Hub.
    pub teacher: Option<String>,
    /// Name of the run.
    pub name: Option<String>,
}

/// Asks a question that may have a default.
type Ask<'a> = &'a mut dyn FnMut(&str, Option<&str>) -> anyhow::Result<String>;

/// Everything that the text of the run file depends on.
struct RunFileInputs {
    name: String,
    data: String,
    detected: Detected,
    teacher: String,
    facts: TeacherFacts,
}

/// Properties of the teacher from which settings follow.
struct TeacherFacts {
    layers: usize,
    vocabulary: usize,
    /// Longest context of the model, tokens.
    context: usize,
    has_template: bool,
    /// Variable by which the teacher's chat template switches reasoning.
    thinking_switch: Option<&'static str>,
}

/// Writes a run file.
///
/// # Errors
/// When the file exists and `force` is not set; when a value is absent and there is no terminal to ask
/// for it; when the data or the teacher cannot be used.
pub fn init(file: &Path, given: InitOptions, force: bool, console: &Console) -> anyhow::Result<()> {
    if file.exists() && !force {
        return Err(refusal(format!(
            "{} exists already\nhint: name another file, or overwrite this one with `--force`",
            file.display()
        )));
    }
    let inputs = match can_ask() {
        true => inputs(file, given, &mut ask, console)?,
        false => {
            let missing: Vec<&str> = [
                ("--data PATH", &given.data),
                ("--teacher PATH", &given.teacher),
            ]
            .iter()
            .filter(|(_, value)| value.is_none())
            .map(|(flag, _)| *flag)
            .collect();
            if !missing.is_empty() {
                return Err(refusal(format!(
                    "there is no terminal to ask for missing values\nhint: give {}",
                    missing.join(" and ")
                )));
            }
            inputs(
                file,
                given,
                &mut |_, default| Ok(default.unwrap_or_default().to_owned()),
                console,
            )?
        }
    };
    let text = write::run_file(&inputs);
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    for ignored in &inputs.detected.ignored {
        console.note(&format!("the data: not read as answers: {ignored}"));
    }
    console.note(&format!(
        "{file}: the data looks like {}\nnext: `potstill check {file}`, `potstill render {file}` (shows which tokens carry loss), `potstill run {file}`",
        inputs.detected.shape,
        file = file.display()
    ));
    Ok(())
}

fn refusal(message: String) -> anyhow::Error {
    ConfigError::plain(message).into()
}

/// Completes the given values by asking for those that are absent. A given value that cannot be used is
/// an error; the question is repeated if an answer to it cannot be used.
fn inputs(
    file: &Path,
    given: InitOptions,
    ask: Ask<'_>,
    console: &Console,
) -> anyhow::Result<RunFileInputs> {
    let folder = file.parent().unwrap_or(Path::new(""));
    let (data, detected) = given_or_asked(
        given.data,
        "Data file (prompts, with or without answers)",
        None,
        ask,
        console,
        |path| {
            let (found, written) = found(folder, path, console)?;
            Ok((written, columns::detect(&found)?))
        },
    )?;
    let (teacher, facts) = given_or_asked(
        given.teacher,
        "Teacher (a folder, a GGUF file, or org/name of the Hugging Face Hub)",
        None,
        ask,
        console,
        |path| {
            let (found, written) = found(folder, path, console)?;
            let facts = teacher_facts(&sources::checkpoint_folder(&found)?)?;
            Ok((written, facts))
        },
    )?;
    let proposed = proposed_name(&data);
    let name = given_or_asked(
        given.name,
        "Name of the run",
        Some(&proposed),
        ask,
        console,
        |name| {
            RunName::try_from(name.to_owned()).map_err(refusal)?;
            Ok(name.to_owned())
        },
    )?;
    Ok(RunFileInputs {
        name,
        data,
        detected,
        teacher,
        facts,
    })
}

/// Returns the given value, or asks until `read` accepts the answer.
fn given_or_asked<T>(
    given: Option<String>,
    question: &str,
    default: Option<&str>,
    ask: Ask<'_>,
    console: &Console,
    read: impl Fn(&str) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    if let Some(given) = given {
        return read(&given);
    }
    loop {
        let answer = ask(question, default)?;
        match read(&answer) {
            Ok(value) => return Ok(value),
            Err(error) if default == Some(&answer) => return Err(error),
            Err(error) => console.note(&errors::message(&error)),
        }
    }
}

/// Finds a file or folder, or fetches the one that is named on the Hugging Face Hub. Returns its path, and the text that
/// a run file in `folder` names it by.
fn found(folder: &Path, written: &str, console: &Console) -> anyhow::Result<(PathBuf, String)> {
    match sources::from_hub(written, console)? {
        Some(path) => Ok((path, written.to_owned())),
        None => Ok((existing(written)?, beside(folder, written)?)),
    }
}

/// Replaces the variables in a path and checks that the path exists.
fn existing(path: &str) -> anyhow::Result<PathBuf> {
    let path = FilePath::try_from(path.to_owned()).map_err(|why| refusal(why.to_owned()))?;
    let path = expand_path(path.as_path()).map_err(refusal)?;
    // A pattern names files by parts of their names.
    let is_pattern = || data_files(&path).is_ok_and(|files| files.iter().all(|file| file.exists()));
    match path.exists() || is_pattern() {
        true => Ok(path),
        false => Err(refusal(format!("{} does not exist", path.display()))),
    }
}

/// Rewrites a path relative to the current folder, so that a run file in `folder` can contain it.
fn beside(folder: &Path, path: &str) -> anyhow::Result<String> {
    let here = [Path::new(""), Path::new(".")].contains(&folder);
    if here || path.contains("${") || Path::new(path).is_absolute() {
        return Ok(path.to_owned());
    }
    let absolute = std::path::absolute(path).with_context(|| format!("cannot resolve {path}"))?;
    let text = absolute.to_str().map(str::to_owned);
    text.with_context(|| {
        let path = absolute.display();
        format!("{path} is not UTF-8, so a run file cannot name it\nhint: rename or move it")
    })
}

fn teacher_facts(dir: &Path) -> anyhow::Result<TeacherFacts> {
    if !dir.join("config.json").is_file() {
        return Err(refusal(format!(
            "{} has no config.json, so it is not a checkpoint in Hugging Face layout\nhint: name the folder that holds config.json, tokenizer.json and the safetensors files",
            dir.display()
        )));
    }
    let config = Config::from_dir(dir)?;
    Tokenizer::from_dir(dir)?;
    let template = ChatTemplate::from_dir(dir)?;
    Ok(TeacherFacts {
        layers: config.num_hidden_layers(),
        vocabulary: config.vocab_size,
        context: config.max_position_embeddings,
        has_template: template.is_some(),
        thinking_switch: template.and_then(|template| template.thinking_switch()),
    })
}

/// Derives a name for the run from the name of the data file. The name is valid as a folder name.
fn proposed_name(data: &str) -> String {
    let stem = Path::new(data)
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy();
    let legal = |c: char| {
        if c.is_ascii_alphanumeric() || "-_.".contains(c) {
            c
        } else {
            '-'
        }
    };
    let name: String = stem.chars().map(legal).take(64).collect();
    let name = name.trim_start_matches('.');
    match name.is_empty() {
        true => "run".to_owned(),
        false => name.to_owned(),
    }
}

/// Quotes a text as a TOML string.
fn quoted(text: impl Display) -> String {
    toml::Value::String(text.to_string()).to_string()
}

#[cfg(test)]
mod tests;
