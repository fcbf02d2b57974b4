//! Choice of the reader by the end of a file's name.

use std::path::Path;

use super::file::is_gzip;
use super::row::RowIterator;
use super::settings::Columns;
use super::{delimited, json, parquet};
use crate::error::Error;

/// Format of an imported file.
enum FileFormat {
    JsonLines,
    Json,
    Delimited(u8),
    Parquet,
}

/// Reads the rows of a file with all their columns, or at least with those of `columns`.
pub(super) fn rows(path: &Path, columns: Option<&Columns>) -> Result<RowIterator, Error> {
    match format(path)? {
        FileFormat::JsonLines => json::lines(path),
        FileFormat::Json => json::array_or_lines(path),
        FileFormat::Delimited(delimiter) => delimited::rows(path, delimiter),
        FileFormat::Parquet => parquet::rows(path, columns),
    }
}

fn format(path: &Path) -> Result<FileFormat, Error> {
    let name = match is_gzip(path) {
        true => Path::new(path.file_stem().unwrap_or_default()),
        false => path,
    };
    let extension = name.extension().unwrap_or_default().to_ascii_lowercase();
    match extension.to_str() {
        Some("jsonl" | "ndjson") => Ok(FileFormat::JsonLines),
        Some("json") => Ok(FileFormat::Json),
        Some("csv") => Ok(FileFormat::Delimited(b',')),
        Some("tsv") => Ok(FileFormat::Delimited(b'\t')),
        // A Parquet file compresses its pages itself and is read out of order.
        Some("parquet") if !is_gzip(path) => Ok(FileFormat::Parquet),
        _ => Err(Error::invalid(
            format!(
                "{} has a format that Potstill does not read",
                path.display()
            ),
            "the name must end in .jsonl, .ndjson, .json, .csv or .tsv, each with or without .gz, or in .parquet: rename the file, or convert it",
        )),
    }
}

/// Returns the error for a file without prompts.
pub(super) fn no_prompts(path: &Path) -> Error {
    let unit = match format(path) {
        Ok(FileFormat::JsonLines) => "lines",
        _ => "rows",
    };
    Error::invalid(
        format!("{} has no prompts: the file has no {unit}", path.display()),
        "put prompts into it, or name another file in `path` of [import]",
    )
}
