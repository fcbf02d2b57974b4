//! Regular files that are read, and files that are written as a whole.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::Error;

/// Maps a file into memory for reading.
///
/// # Errors
/// Returns an error if the file is not a regular file, or cannot be opened or mapped.
#[allow(unsafe_code)]
pub(crate) fn map_file(path: &Path) -> Result<Mmap, Error> {
    let (file, _) = open_regular(path)?;
    // SAFETY: the map is read-only, its length is that of the file, and the slice that borrows it bounds every access.
    // What cannot be ensured is that no other process changes the file while it is mapped: then the bytes that are read are
    // unspecified, and reading beyond a new end is SIGBUS, as with every reader that maps a file. Callers drop the map when
    // they have read and copied the header of the file.
    unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))
}

/// Largest text file that is read, in bytes.
const MAX_TEXT: u64 = 100_000_000;

/// Opens a regular file for reading, and returns its length in bytes. Opening a pipe would wait for a writer.
///
/// # Errors
/// Returns an error if there is no such file, or if it is a folder, a pipe or a device.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64), Error> {
    let metadata = std::fs::metadata(path).map_err(Error::io("read", path))?;
    if !metadata.is_file() {
        return Err(Error::NotAFile {
            path: path.to_path_buf(),
        });
    }
    let file = File::open(path).map_err(Error::io("open", path))?;
    Ok((file, metadata.len()))
}

/// Reads a text file of at most 100 MB.
///
/// # Errors
/// Returns an error for a path that is no regular file, for a larger file, and for bytes that are not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String, Error> {
    let (file, length) = open_regular(path)?;
    if length > MAX_TEXT {
        return Err(Error::TextTooLong {
            path: path.to_path_buf(),
            length,
            limit: MAX_TEXT,
        });
    }
    let mut text = String::with_capacity(length as usize);
    file.take(MAX_TEXT)
        .read_to_string(&mut text)
        .map_err(Error::io("read", path))?;
    Ok(text)
}

/// Writes a JSON file as [`write_whole`] does.
pub(crate) fn write_json(path: &Path, value: &serde_json::Value) -> Result<(), Error> {
    write_whole(path, |file| {
        writeln!(file, "{value:#}").map_err(Error::io("write", path))
    })
}

/// Writes a temporary file next to `path`, syncs it and renames it, so that a reader sees the old file or the whole new
/// one.
pub(crate) fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let file = create_new(&temporary).map_err(Error::io("create", &temporary))?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    write(&mut file)?;
    let file = file
        .into_inner()
        .map_err(|error| Error::io("write", path)(error.into_error()))?;
    file.sync_all().map_err(Error::io("sync", &temporary))?;
    std::fs::rename(&temporary, path).map_err(Error::io("rename to", path))?;
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let dir = parent.unwrap_or(Path::new("."));
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::io("sync", dir))
}

/// Creates an empty file. What is there from an earlier process is removed and never written to, so that a symbolic link
/// cannot lead the writer to another file.
fn create_new(path: &Path) -> std::io::Result<File> {
    match File::create_new(path) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            std::fs::remove_file(path)?;
            File::create_new(path)
        }
        opened => opened,
    }
}
