//! Reads run files, and reports problems at places in them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use potstill_datasets::limits::RUN_FILE_BYTES;
use potstill_datasets::range::FilePath;
use potstill_datasets::{Error, TemplateSource, read_text};

use super::hub_source::HubSource;
use super::problem::{ConfigError, Problem, is_written};
use super::{RunFile, rules};

/// The settings of a run, with the file that they come from, so that later problems can point into it.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The settings, with defaults filled in and paths resolved.
    pub settings: RunFile,
    /// Path of the run file, as the user gave it.
    pub path: PathBuf,
    /// Text of the run file.
    pub text: String,
    /// Repositories of the Hugging Face Hub that the settings named before their local folders took the place of the
    /// names, by the name of the source: `teacher`, `student`, `tokenizer` or `data`.
    pub hub: BTreeMap<String, HubSource>,
    /// GGUF files that the settings named, by the folders that they are laid out in.
    pub gguf: BTreeMap<PathBuf, PathBuf>,
}

impl Loaded {
    /// Reads and checks a run file.
    ///
    /// # Errors
    /// When the file cannot be read, is not TOML, or breaks a rule: each problem with line, column and
    /// hint.
    pub fn read(path: &Path) -> Result<Loaded, ConfigError> {
        let unreadable = |why: String| {
            ConfigError::plain(format!(
                "cannot read the run file {}: {why}\nhint: give the path of a TOML file; `potstill init` writes one",
                path.display()
            ))
        };
        let text = read_text(path, RUN_FILE_BYTES).map_err(|error| match error {
            Error::Io { source, .. } => unreadable(source.to_string()),
            other => unreadable(other.to_string()),
        })?;
        Loaded::of_text(path, text)
    }

    /// Checks the text of the run file at `path`, which is not read.
    ///
    /// # Errors
    /// See [`Loaded::read`].
    pub fn of_text(path: &Path, text: String) -> Result<Loaded, ConfigError> {
        let settings = parse(path, &text)?;
        Ok(Loaded {
            settings,
            path: path.to_owned(),
            text,
            hub: BTreeMap::new(),
            gguf: BTreeMap::new(),
        })
    }

    /// An error that points at a key, such as `["import", "path"]`.
    pub fn problem(&self, key: &[&str], message: impl Into<String>) -> ConfigError {
        let problem = Problem::at_key(&self.text, key, message.into());
        ConfigError::new(&self.path, &self.text, vec![problem])
    }
}

/// Parses the text of the run file at `path`, which is not read.
///
/// # Errors
/// See [`Loaded::read`].
pub fn parse(path: &Path, text: &str) -> Result<RunFile, ConfigError> {
    if text.trim_start().starts_with(['{', '<']) {
        return Err(ConfigError::plain(format!(
            "{} is not a run file, which is TOML\nhint: if it is your data, `potstill init --data {}` writes a run file",
            path.display(),
            path.display()
        )));
    }
    let mut file: RunFile = toml::from_str(text)
        .map_err(|e| ConfigError::new(path, text, vec![Problem::from_toml(text, &e)]))?;
    // Without distributions the controls would equal the student.
    if !file.has_signals() && !is_written(text, "train", "controls") {
        file.train.controls.clear();
    }
    let mut problems = resolve_paths(&mut file, path.parent().unwrap_or(Path::new("")), text);
    problems.extend(rules::broken(&file, text));
    if problems.is_empty() {
        Ok(file)
    } else {
        Err(ConfigError::new(path, text, problems))
    }
}

/// Replaces the variables in all paths, and takes relative paths to be below `base`, the run file's folder.
fn resolve_paths(file: &mut RunFile, base: &Path, text: &str) -> Vec<Problem> {
    let student = &mut file.student;
    let adapter = file.train.adapter.as_mut();
    let mut paths: Vec<(&[&str], Option<&mut FilePath>)> = vec![
        (&["import", "path"], Some(&mut file.import.path)),
        (&["student", "path"], student.path.as_mut()),
        (
            &["student", "template"],
            template_file(&mut student.template),
        ),
        (
            &["train", "adapter", "path"],
            adapter.and_then(|adapter| adapter.path.as_mut()),
        ),
    ];
    if let Some(teacher) = &mut file.teacher {
        paths.push((&["teacher", "path"], teacher.path.as_mut()));
        let template = template_file(&mut teacher.template);
        paths.push((&["teacher", "template"], template));
        paths.push((&["teacher", "providers"], teacher.providers.as_mut()));
        paths.push((&["teacher", "tokenizer"], teacher.tokenizer.as_mut()));
    }
    let mut problems = Vec::new();
    for (key, path) in paths
        .into_iter()
        .filter_map(|(key, path)| Some((key, path?)))
    {
        match expand_path(path.as_path()) {
            Ok(expanded) => *path = FilePath::below(base, &expanded),
            Err(why) => problems.push(Problem::at_key(text, key, why)),
        }
    }
    problems
}

fn template_file(template: &mut Option<TemplateSource>) -> Option<&mut FilePath> {
    match template {
        Some(TemplateSource::File(path)) => Some(path),
        Some(TemplateSource::Plain) | None => None,
    }
}

/// Replaces every `${NAME}` in a path by the value of an environment variable.
///
/// # Errors
/// A variable that is not set, or a brace that is not closed.
pub fn expand_path(path: &Path) -> Result<PathBuf, String> {
    expand(&path.to_string_lossy(), |name| std::env::var(name).ok()).map(PathBuf::from)
}

fn expand(written: &str, variable: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = written;
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, after)) = after.split_once('}') else {
            return Err(format!(
                "`${{` is not closed by `}}` in {written:?}\nhint: write a variable as `${{NAME}}`"
            ));
        };
        let value = variable(name).filter(|value| !value.is_empty()).ok_or_else(|| {
            format!(
                "the environment variable {name} is not set\nhint: run `export {name}=…` first, or write the path without it"
            )
        })?;
        out.push_str(before);
        out.push_str(&value);
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::expand;

    #[test]
    fn variables_are_expanded_and_unset_ones_named() {
        let variable = |name: &str| (name == "A").then(|| "/data".to_owned());
        assert_eq!(expand("${A}/x/${A}", variable).unwrap(), "/data/x//data");
        assert_eq!(expand("plain$5", variable).unwrap(), "plain$5");
        let unset = expand("${B}/x", variable).unwrap_err();
        assert!(unset.starts_with("the environment variable B is not set\nhint: "));
        let open = expand("${A/x", variable).unwrap_err();
        assert!(open.starts_with("`${` is not closed by `}` in \"${A/x\"\nhint: "));
    }
}
