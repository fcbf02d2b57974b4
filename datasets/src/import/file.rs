//! Access to the bytes of an imported file.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;

use crate::error::{Error, RowLocation};

/// Opens a file, and decompresses it if its name ends in `.gz`.
pub(super) fn open(path: &Path) -> Result<Box<dyn Read>, Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    Ok(match is_gzip(path) {
        true => Box::new(MultiGzDecoder::new(file)),
        false => Box::new(file),
    })
}

pub(super) fn is_gzip(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("gz"))
}

/// Returns the error for a row that cannot be used. `why` may end with a line that begins with `hint: `.
pub(super) fn row_error(path: &Path, location: RowLocation, why: impl AsRef<str>) -> Error {
    Error::invalid(
        format!("{}{location}: {}", path.display(), why.as_ref()),
        "",
    )
}

/// Returns the error for a byte that is not UTF-8. `line` and `column` count from 1.
pub(super) fn utf8_error(path: &Path, line: usize, column: usize) -> Error {
    let problem = format!("{}:{line}:{column} is not valid UTF-8", path.display());
    Error::invalid(problem, "convert the file to UTF-8")
}
