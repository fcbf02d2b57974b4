//! Choice of the reader by the end of a file's name.

use std::path::Path;

use super::column_path::listed;
use super::files::{FileFormat, format};
use super::row::RowIterator;
use super::settings::ImportSettings;
use super::{delimited, json, parquet};
use crate::error::Error;

/// Reads the rows of a file with at least the needed columns, or with all of them if `is_whole`.
pub(super) fn rows(
    path: &Path,
    settings: &ImportSettings,
    is_whole: bool,
) -> Result<RowIterator, Error> {
    let limit = settings.max_row_bytes;
    let format = format(path)?;
    if settings.delimiter.is_some() && !matches!(format, FileFormat::Csv | FileFormat::Tsv) {
        return Err(Error::invalid(
            format!(
                "{} is not CSV, and `delimiter` of [import] is set",
                path.display()
            ),
            "leave `delimiter` out",
        ));
    }
    match format {
        FileFormat::JsonLines => json::lines(path, limit),
        FileFormat::Json => json::rows(path, limit),
        FileFormat::Csv | FileFormat::Tsv => delimited::rows(path, limit, settings.delimiter),
        FileFormat::Parquet => {
            parquet::rows(path, limit, Some(&settings.columns).filter(|_| !is_whole))
        }
    }
}

/// Checks that files with a header have the same columns, before any row is read.
pub(super) fn check_headers(
    files: &[impl AsRef<Path>],
    settings: &ImportSettings,
) -> Result<(), Error> {
    let mut first: Option<(&Path, Vec<String>)> = None;
    for file in files.iter().map(AsRef::as_ref) {
        let mut names = match format(file)? {
            FileFormat::Csv | FileFormat::Tsv => {
                delimited::header(file, settings.max_row_bytes, settings.delimiter)?
            }
            FileFormat::Parquet => parquet::header(file)?,
            FileFormat::JsonLines | FileFormat::Json => return Ok(()),
        };
        names.sort();
        match &first {
            _ if names.is_empty() => {}
            None => first = Some((file, names)),
            Some((_, expected)) if *expected == names => {}
            Some((other, expected)) => {
                return Err(Error::invalid(
                    format!(
                        "{} has other columns than {}: {} and not {}",
                        file.display(),
                        other.display(),
                        listed(&names),
                        listed(expected)
                    ),
                    "name the files that belong together in `path` of [import], with a pattern such as `train-*.csv`",
                ));
            }
        }
    }
    Ok(())
}

/// Returns the error for data without prompts.
pub(super) fn no_prompts(path: &Path) -> Error {
    let why = match format(path) {
        Ok(FileFormat::JsonLines) => "the file has no lines",
        Ok(_) => "the file has no rows",
        Err(_) => "its files have no rows",
    };
    Error::invalid(
        format!("{} has no prompts: {why}", path.display()),
        "put prompts into it, or name another file in `path` of [import]",
    )
}
