//! Access to the bytes of an imported file.

use std::cell::Cell;
use std::fs::{self, File, FileType};
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::rc::Rc;

use flate2::read::MultiGzDecoder;

use super::encoding::{Foreign, foreign};
use crate::error::{Error, RowLocation};
use crate::limits::{IMPORT_BLANK_BYTES, UNPACKED_FREE_BYTES, UNPACKED_RATIO};

const BUFFER_BYTES: usize = 1 << 16;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The unpacked bytes of a file.
pub(super) type TextReader = BufReader<Box<dyn Read>>;

/// Opens a text file, and unpacks it if its name ends in `.gz` or `.zst`. A byte order mark of UTF-8 is skipped.
pub(super) fn open(path: &Path) -> Result<TextReader, Error> {
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, unpacked(path)?);
    let first = reader.fill_buf().map_err(read_error(path))?;
    match foreign(first) {
        Some(Foreign::Encoding { name, iconv }) => {
            let problem = format!("{} is not UTF-8: it looks like {name}", path.display());
            let hint = format!(
                "convert the file to UTF-8, for example with `iconv -f {iconv} -t UTF-8 FILE > NEW`"
            );
            return Err(Error::invalid(problem, hint));
        }
        Some(Foreign::Format { name, hint }) => {
            let problem = format!("{} is not text: it looks like {name}", path.display());
            return Err(Error::invalid(problem, hint));
        }
        None => {}
    }
    if first.starts_with(BYTE_ORDER_MARK) {
        reader.consume(BYTE_ORDER_MARK.len());
    }
    Ok(reader)
}

fn unpacked(path: &Path) -> Result<Box<dyn Read>, Error> {
    let file = open_regular(path)?;
    let packed = PackedFile {
        file,
        bytes: Rc::default(),
        idle: Rc::default(),
    };
    let (bytes, idle) = (packed.bytes.clone(), packed.idle.clone());
    let decoder: Box<dyn Read> = match compression(path) {
        None => return Ok(Box::new(packed.file)),
        Some("gz") => Box::new(MultiGzDecoder::new(BufReader::with_capacity(
            BUFFER_BYTES,
            packed,
        ))),
        Some(_) => Box::new(zstd::Decoder::new(packed).map_err(Error::io("read", path))?),
    };
    Ok(Box::new(Unpacked {
        decoder,
        packed: bytes,
        idle,
        bytes: 0,
    }))
}

/// Opens a regular file. Anything else (a pipe, a device, a socket) could block, or never end.
pub(super) fn open_regular(path: &Path) -> Result<File, Error> {
    let kind = fs::metadata(path)
        .map_err(Error::io("open", path))?
        .file_type();
    if !kind.is_file() {
        let problem = format!("{} is {}, not a file", path.display(), kind_name(kind));
        let hint = "copy the data to a regular file, and name that file in `path` of [import]";
        return Err(Error::invalid(problem, hint));
    }
    File::open(path).map_err(Error::io("open", path))
}

fn kind_name(kind: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return "a named pipe";
        }
        if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
        if kind.is_socket() {
            return "a socket";
        }
    }
    match kind.is_dir() {
        true => "a folder",
        false => "something else",
    }
}

/// Returns `gz` or `zst` if the file's name ends so.
pub(super) fn compression(path: &Path) -> Option<&'static str> {
    let extension = path.extension()?;
    ["gz", "zst"]
        .into_iter()
        .find(|name| extension.eq_ignore_ascii_case(name))
}

/// A packed file, which counts what was read of it.
struct PackedFile {
    file: File,
    bytes: Rc<Cell<u64>>,
    /// Bytes since the decoder last returned anything.
    idle: Rc<Cell<u64>>,
}

impl Read for PackedFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.bytes.set(self.bytes.get() + read as u64);
        self.idle.set(self.idle.get() + read as u64);
        match self.idle.get() > IMPORT_BLANK_BYTES as u64 {
            true => Err(io::Error::other(format!(
                "it has over {IMPORT_BLANK_BYTES} packed bytes without content\nhint: pack the file again"
            ))),
            false => Ok(read),
        }
    }
}

/// The content of a packed file. A small file that expands without end is refused.
struct Unpacked {
    decoder: Box<dyn Read>,
    packed: Rc<Cell<u64>>,
    idle: Rc<Cell<u64>>,
    bytes: u64,
}

impl Read for Unpacked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.decoder.read(buffer)?;
        self.idle.set(0);
        self.bytes += read as u64;
        let most = UNPACKED_RATIO.saturating_mul(self.packed.get());
        match self.bytes > most.max(UNPACKED_FREE_BYTES) {
            true => Err(io::Error::other(format!(
                "it expands to over {UNPACKED_RATIO} times its size\nhint: if the data is meant to be so, unpack the file and name the unpacked one"
            ))),
            false => Ok(read),
        }
    }
}

/// Returns the error for bytes that cannot be read. The decoder's own reasons are part of the message.
pub(super) fn read_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    Error::io("read", path)
}

/// Returns the error for a row that cannot be used. `why` may end with a line that begins with `hint: `.
pub(super) fn row_error(path: &Path, location: RowLocation, why: impl AsRef<str>) -> Error {
    Error::invalid(
        format!("{}{location}: {}", path.display(), why.as_ref()),
        "",
    )
}

/// Returns the error for a row that is longer than the setting allows. `why` may add a likely cause.
pub(super) fn row_too_long(path: &Path, location: RowLocation, limit: usize, why: &str) -> Error {
    Error::invalid(
        format!(
            "{}{location}: the row is longer than {limit} bytes{why}",
            path.display()
        ),
        "if the row is meant to be so long, set a larger `max_row_bytes` in [import]",
    )
}

/// Returns the error for a file whose next row is behind too much empty space.
pub(super) fn too_blank(path: &Path, location: RowLocation) -> Error {
    Error::invalid(
        format!(
            "{}{location}: over {IMPORT_BLANK_BYTES} blank bytes follow each other",
            path.display()
        ),
        "remove the blank lines; a file that holds nothing else was not written to its end",
    )
}
