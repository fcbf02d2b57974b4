//! `init`: a run file with comments, after a few questions or from flags.
//!
//! What is written is made from the run file's own schema, so that every key is there: set where the
//! data and the teacher say how, else commented out with its default.

mod columns;
mod write;

use std::fmt::Display;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use potstill_datasets::range::FilePath;
use potstill_datasets::{ChatTemplate, Tokenizer};
use potstill_model::Config;

use crate::progress::{Console, ask, can_ask};
use crate::run_file::ConfigError;
use crate::run_file::ranges::{RunName, expand_path};
use columns::Detected;

/// What is known before anything is asked.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Where the data is.
    pub data: Option<String>,
    /// Where the teacher is.
    pub teacher: Option<String>,
    /// The run's name.
    pub name: Option<String>,
}

/// Asks a question that may have a default.
type Ask<'a> = &'a mut dyn FnMut(&str, Option<&str>) -> anyhow::Result<String>;

/// What the run file is written from.
struct Answers {
    name: String,
    data: String,
    detected: Detected,
    teacher: String,
    facts: TeacherFacts,
}

/// What of the teacher settings follow from.
struct TeacherFacts {
    layers: usize,
    vocabulary: usize,
    /// Positions it was made for, tokens.
    context: usize,
    has_template: bool,
}

/// Writes a run file.
///
/// # Errors
/// When the file is there and `force` is not given; when something is not known and nobody can be
/// asked; when the data or the teacher cannot be used.
pub fn init(file: &Path, wanted: Wanted, force: bool, console: &Console) -> anyhow::Result<()> {
    if file.exists() && !force {
        return Err(refusal(format!(
            "{} is there already: name another file, or write over it with `--force`",
            file.display()
        )));
    }
    let answers = match can_ask() {
        true => answers(file, wanted, &mut ask, console)?,
        false => {
            let missing: Vec<&str> = [
                ("--data PATH", &wanted.data),
                ("--teacher PATH", &wanted.teacher),
            ]
            .iter()
            .filter(|(_, given)| given.is_none())
            .map(|(flag, _)| *flag)
            .collect();
            if !missing.is_empty() {
                return Err(refusal(format!(
                    "nobody can be asked, since this is not a terminal: give {}",
                    missing.join(" and ")
                )));
            }
            answers(
                file,
                wanted,
                &mut |_, default| Ok(default.unwrap_or_default().to_owned()),
                console,
            )?
        }
    };
    let text = write::run_file(&answers);
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    console.note(&format!(
        "{file}: the data looks like {}\nnext: `potstill check {file}`, `potstill render {file}` (which tokens carry loss), `potstill run {file}`",
        answers.detected.name,
        file = file.display()
    ));
    Ok(())
}

fn refusal(message: String) -> anyhow::Error {
    ConfigError::plain(message).into()
}

/// Everything that is needed, asked for where it was not given. A given value that cannot be used is
/// an error; an answered one is asked for again.
fn answers(
    file: &Path,
    wanted: Wanted,
    ask: Ask<'_>,
    console: &Console,
) -> anyhow::Result<Answers> {
    let folder = file.parent().unwrap_or(Path::new(""));
    let (data, detected) = known(
        wanted.data,
        "the data (prompts, with or without answers)",
        None,
        ask,
        console,
        |path| {
            let found = existing(path)?;
            let detected = columns::detect(&found)?;
            Ok((beside(folder, path)?, detected))
        },
    )?;
    let (teacher, facts) = known(
        wanted.teacher,
        "the teacher (a folder in Hugging Face layout)",
        None,
        ask,
        console,
        |path| {
            let facts = teacher_facts(&existing(path)?)?;
            Ok((beside(folder, path)?, facts))
        },
    )?;
    let proposed = proposed_name(&data);
    let given = wanted.name;
    let name = known(
        given,
        "a name for the run",
        Some(&proposed),
        ask,
        console,
        |name| {
            RunName::try_from(name.to_owned()).map_err(refusal)?;
            Ok(name.to_owned())
        },
    )?;
    Ok(Answers {
        name,
        data,
        detected,
        teacher,
        facts,
    })
}

fn known<T>(
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
            Err(error) => console.note(&format!("{error:#}")),
        }
    }
}

/// The path itself, variables replaced, when something is there.
fn existing(path: &str) -> anyhow::Result<PathBuf> {
    let path = FilePath::try_from(path.to_owned()).map_err(|why| refusal(why.to_owned()))?;
    let path = expand_path(path.as_path()).map_err(refusal)?;
    match path.exists() {
        true => Ok(path),
        false => Err(refusal(format!("there is no {}", path.display()))),
    }
}

/// A path from the current folder, as a run file in `folder` has to write it.
fn beside(folder: &Path, path: &str) -> anyhow::Result<String> {
    let here = [Path::new(""), Path::new(".")].contains(&folder);
    if here || path.contains("${") || Path::new(path).is_absolute() {
        return Ok(path.to_owned());
    }
    let absolute = std::path::absolute(path).with_context(|| format!("cannot resolve {path}"))?;
    let text = absolute.to_str().map(str::to_owned);
    text.with_context(|| format!("{} is not UTF-8: move it", absolute.display()))
}

fn teacher_facts(dir: &Path) -> anyhow::Result<TeacherFacts> {
    if !dir.join("config.json").is_file() {
        return Err(refusal(format!(
            "{} has no config.json, so it is not a checkpoint in Hugging Face layout",
            dir.display()
        )));
    }
    let config = Config::from_dir(dir)?;
    Tokenizer::from_dir(dir)?;
    Ok(TeacherFacts {
        layers: config.num_hidden_layers,
        vocabulary: config.vocab_size,
        context: config.max_position_embeddings,
        has_template: ChatTemplate::from_dir(dir)?.is_some(),
    })
}

/// The data's file name, as far as it can be a folder's.
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

/// A text as TOML writes it.
fn quoted(text: impl Display) -> String {
    toml::Value::String(text.to_string()).to_string()
}

#[cfg(test)]
mod tests;
