//! The files that a path stands for: itself, the files of a folder, or those that match a pattern.

use std::fs;
use std::path::{Component, Path, PathBuf};

use super::file::compression;
use crate::error::Error;
use crate::limits::IMPORT_FILES;

/// Format of an imported file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileFormat {
    JsonLines,
    Json,
    Csv,
    Tsv,
    Parquet,
}

impl FileFormat {
    fn name(self) -> &'static str {
        match self {
            FileFormat::JsonLines => ".jsonl",
            FileFormat::Json => ".json",
            FileFormat::Csv => ".csv",
            FileFormat::Tsv => ".tsv",
            FileFormat::Parquet => ".parquet",
        }
    }
}

/// Files that describe a data set or a model and hold no rows.
const DESCRIPTIONS: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "croissant.json",
];

/// Returns the format of a file by the end of its name.
pub(super) fn format(path: &Path) -> Result<FileFormat, Error> {
    known_format(path).ok_or_else(|| {
        let arrow = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("arrow"));
        let hint = match arrow {
            true => "write the data as Parquet, for example with `to_parquet` of Hugging Face datasets",
            false => "the name must end in .jsonl, .ndjson, .json, .csv or .tsv, each with or without .gz or .zst, or in .parquet: rename the file, or convert it",
        };
        Error::invalid(
            format!("{} has a format that Potstill does not read", path.display()),
            hint,
        )
    })
}

fn known_format(path: &Path) -> Option<FileFormat> {
    let is_packed = compression(path).is_some();
    let name = match is_packed {
        true => Path::new(path.file_stem()?),
        false => path,
    };
    let extension = name.extension()?.to_ascii_lowercase();
    match extension.to_str()? {
        "jsonl" | "ndjson" => Some(FileFormat::JsonLines),
        "json" => Some(FileFormat::Json),
        "csv" => Some(FileFormat::Csv),
        "tsv" => Some(FileFormat::Tsv),
        // A Parquet file compresses its pages itself and is read out of order.
        "parquet" if !is_packed => Some(FileFormat::Parquet),
        _ => None,
    }
}

/// Lists the files that the `path` of `[import]` stands for, in the order in which they are read. A folder stands for
/// its data files, and a name with `*` or `?` for the files that match it; both in the order of their names.
///
/// # Errors
/// [`Error::Io`]; [`Error::Invalid`] if there is no such file, if the files have several formats, or if they are too
/// many.
pub fn data_files(path: &Path) -> Result<Vec<PathBuf>, Error> {
    if path.is_dir() {
        let (files, skipped): (Vec<_>, Vec<_>) =
            children(path)?.into_iter().partition(|file| is_data(file));
        return match files.is_empty() {
            true => Err(no_files(path, &skipped)),
            false => one_format(path, files),
        };
    }
    let is_pattern = path.to_string_lossy().contains(['*', '?']);
    if !is_pattern || fs::symlink_metadata(path).is_ok() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut files: Vec<PathBuf> = matching(path)?
        .into_iter()
        .filter(|file| !file.is_dir())
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(Error::invalid(
            format!("no file matches {}", path.display()),
            "compare the pattern with the names of the files",
        ));
    }
    files.iter().try_for_each(|file| format(file).map(drop))?;
    one_format(path, files)
}

/// Whether a file of a folder is data. Hidden files are not.
fn is_data(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    !name.starts_with(['.', '_'])
        && !DESCRIPTIONS.contains(&name.as_ref())
        && known_format(path).is_some()
        && !path.is_dir()
}

/// Lists the entries of a folder in the order of their names.
fn children(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = fs::read_dir(folder).map_err(Error::io("list", folder))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    let mut paths: Vec<PathBuf> = paths
        .collect::<Result<_, _>>()
        .map_err(Error::io("list", folder))?;
    paths.sort();
    Ok(paths)
}

fn one_format(path: &Path, files: Vec<PathBuf>) -> Result<Vec<PathBuf>, Error> {
    if files.len() > IMPORT_FILES {
        return Err(Error::invalid(
            format!(
                "{} has {} files, more than {IMPORT_FILES}",
                path.display(),
                files.len()
            ),
            "join them to fewer files",
        ));
    }
    let mut formats: Vec<FileFormat> = Vec::new();
    for file in &files {
        let format = format(file)?;
        if !formats.contains(&format) {
            formats.push(format);
        }
    }
    match formats.as_slice() {
        [first, second, ..] => {
            let (first, second) = (first.name(), second.name());
            let pattern = match path.is_dir() {
                true => path.join(format!("*{first}")),
                false => PathBuf::from(format!("*{first}")),
            };
            Err(Error::invalid(
                format!(
                    "{} has files of several formats, such as {first} and {second}",
                    path.display()
                ),
                format!(
                    "name those of one format in `path` of [import], for example {:?}",
                    pattern.display().to_string()
                ),
            ))
        }
        _ => Ok(files),
    }
}

fn no_files(path: &Path, skipped: &[PathBuf]) -> Error {
    let is_arrow = |file: &&PathBuf| file.extension().is_some_and(|end| end == "arrow");
    let problem = format!("{} is a folder without data files", path.display());
    let hint = match (
        skipped.iter().find(|file| file.is_dir()),
        skipped.iter().any(|file| is_arrow(&file)),
    ) {
        (_, true) => "its .arrow files are not read: write the data as Parquet, for example with `to_parquet` of Hugging Face datasets".to_owned(),
        (Some(folder), _) => format!("files in its folders are not read: name one of these, such as {}", folder.display()),
        _ => "the names must end in .jsonl, .ndjson, .json, .csv, .tsv or .parquet".to_owned(),
    };
    Error::invalid(problem, hint)
}

/// Lists the paths that match a pattern, whose parts may have `*` and `?`.
fn matching(pattern: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found = vec![PathBuf::new()];
    for part in pattern.components() {
        let text = part.as_os_str().to_string_lossy().into_owned();
        if !matches!(part, Component::Normal(_)) || !text.contains(['*', '?']) {
            found.iter_mut().for_each(|path| path.push(part));
            found.retain(|path| path.as_os_str().is_empty() || path.exists());
            continue;
        }
        let mut next = Vec::new();
        for folder in found {
            let listed = match folder.as_os_str().is_empty() {
                true => Path::new("."),
                false => folder.as_path(),
            };
            if !listed.is_dir() {
                continue;
            }
            for child in children(listed)? {
                let name = child
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned();
                let is_hidden = name.starts_with('.') && !text.starts_with('.');
                if !is_hidden && is_match(text.as_bytes(), name.as_bytes()) {
                    next.push(folder.join(name));
                }
            }
        }
        found = next;
    }
    Ok(found)
}

/// Whether a name matches a pattern, in time that is at most the product of their lengths.
fn is_match(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    // The last `*`, and the place in the name at which the text behind it was tried.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(byte) if *byte == b'?' || name.get(n) == Some(byte) => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, tried)) => {
                    star = Some((at, tried + 1));
                    p = at + 1;
                    n = tried + 1;
                }
                None => return false,
            },
        }
    }
    pattern
        .get(p..)
        .unwrap_or_default()
        .iter()
        .all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_a_shell() {
        for (pattern, name, expected) in [
            ("*.jsonl", "a.jsonl", true),
            ("*.jsonl", "a.jsonl.gz", false),
            ("train-*-of-?.p*", "train-00-of-3.parquet", true),
            ("a*b*c", "abbbcabc", true),
            ("a*b*c", "abbbcab", false),
            ("*", "", true),
            ("?", "", false),
        ] {
            assert_eq!(
                is_match(pattern.as_bytes(), name.as_bytes()),
                expected,
                "{pattern} {name}"
            );
        }
        let long = "a".repeat(10_000);
        assert!(!is_match(b"a*a*a*a*a*a*a*a*a*b", long.as_bytes()));
    }

    #[test]
    fn a_folder_stands_for_its_files_of_one_format() {
        let dir = tempfile::tempdir().unwrap();
        let names = |path: &Path| -> Vec<String> {
            let files = data_files(path).unwrap().into_iter();
            files
                .map(|file| file.strip_prefix(dir.path()).unwrap().display().to_string())
                .collect()
        };
        let write = |name: &str| std::fs::write(dir.path().join(name), "").unwrap();
        for name in [
            "b.jsonl",
            "a.jsonl.gz",
            "README.md",
            "dataset_info.json",
            ".c.jsonl",
            "_d.jsonl",
        ] {
            write(name);
        }
        assert_eq!(names(dir.path()), ["a.jsonl.gz", "b.jsonl"]);
        write("x.csv");
        let error = data_files(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("has files of several formats, such as .jsonl and .csv"),
            "{error}"
        );
        assert_eq!(names(&dir.path().join("*.csv")), ["x.csv"]);
        std::fs::create_dir(dir.path().join("e")).unwrap();
        write("e/1.csv");
        assert_eq!(names(&dir.path().join("*/?.csv")), ["e/1.csv"]);
        let none = data_files(&dir.path().join("*.tsv"))
            .unwrap_err()
            .to_string();
        assert!(none.starts_with("no file matches "), "{none}");
        std::fs::create_dir(dir.path().join("f")).unwrap();
        write("f/data-00000-of-00001.arrow");
        let arrow = data_files(&dir.path().join("f")).unwrap_err().to_string();
        assert!(
            arrow.contains("is a folder without data files\nhint: its .arrow files"),
            "{arrow}"
        );
    }
}
