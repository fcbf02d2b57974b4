//! Journal: an append-only file of records, each of which is on the disk before it counts.
//!
//! Layout: the 8 bytes `PSTJRNL1`, then frames of u32 LE length, u32 LE CRC-32, payload (postcard). The CRC covers the
//! length and the payload. A crash can tear only the last frame, so a broken end is cut off when the journal is opened.
//! A broken frame that is followed by a whole one is damage of another kind and an error: a cut would lose records. So is
//! a last frame of the right length without its CRC, unless its end is zeros, as a file system may leave it.

use std::fs::{File, TryLockError};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Error;
use crate::files::sync_parent;
use crate::private::private_file;

/// First bytes of a journal: name and version of the layout.
const MAGIC: [u8; 8] = *b"PSTJRNL1";

const HEADER_BYTES: u64 = 8;
/// Number of bytes that are read at a time while a file is scanned, however long its frames are.
const BLOCK_BYTES: usize = 1 << 16;
/// Largest number of bytes that a disk writes as a whole or not at all.
const SECTOR_BYTES: u64 = 512;
/// Number of zeros from which the end of a frame counts as a sector that was not written.
const OWN_ZEROS: usize = 8;

/// Position and length of a record in its journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameSpan {
    /// Byte at which the frame begins in the file.
    pub offset: u64,
    /// Length of the payload, in bytes.
    pub len: u32,
}

impl FrameSpan {
    fn end(self) -> u64 {
        self.offset + HEADER_BYTES + u64::from(self.len)
    }
}

/// An open journal, locked against other processes until it is dropped.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Byte after the last whole frame.
    end: u64,
    frames: usize,
    cut_bytes: u64,
}

impl Journal {
    /// Opens or creates a journal and returns the spans of its records, in order. The folder must exist.
    ///
    /// # Errors
    /// [`Error::JournalInUse`]; [`Error::NotAJournal`] if the file is something else, in which case the file is not
    /// changed; [`Error::JournalDamaged`] if a broken frame is followed by whole ones; [`Error::JournalEndDamaged`] if the
    /// last frame is broken and not torn; [`Error::Io`].
    pub fn open(path: &Path) -> Result<(Journal, Vec<FrameSpan>), Error> {
        let new = !path.exists();
        let mut options = private_file();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(path).map_err(Error::io("open", path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::JournalInUse {
                    path: path.to_path_buf(),
                });
            }
            Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", path)(error)),
        }
        if new {
            sync_parent(path)?;
        }
        let length = file.metadata().map_err(Error::io("read", path))?.len();
        let spans = scan(&file, path, length)?;
        let end = spans.last().map_or(MAGIC.len() as u64, |span| span.end());
        let mut journal = Journal {
            path: path.to_path_buf(),
            file,
            end,
            frames: spans.len(),
            cut_bytes: length.saturating_sub(end),
        };
        if length < MAGIC.len() as u64 {
            journal.begin().map_err(Error::io("write", path))?;
        } else if length > end {
            journal
                .cut()
                .map_err(Error::io("cut the torn end of", path))?;
        }
        Ok((journal, spans))
    }

    /// Opens a journal to read it: it is neither created nor locked, and a torn last frame is left as it is.
    ///
    /// # Errors
    /// As [`Journal::open`].
    pub(crate) fn look(path: &Path) -> Result<(Journal, Vec<FrameSpan>), Error> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let length = file.metadata().map_err(Error::io("read", path))?.len();
        let spans = scan(&file, path, length)?;
        let journal = Journal {
            path: path.to_path_buf(),
            file,
            end: spans.last().map_or(MAGIC.len() as u64, |span| span.end()),
            frames: spans.len(),
            cut_bytes: 0,
        };
        Ok((journal, spans))
    }

    /// Number of bytes of a torn last frame that [`Journal::open`] cut off.
    pub fn cut_bytes(&self) -> u64 {
        self.cut_bytes
    }

    /// Length of the file in bytes.
    pub fn bytes(&self) -> u64 {
        self.end
    }

    /// Adds a record. When this returns, the record is on the disk.
    ///
    /// # Errors
    /// [`Error::JournalRecord`] if the record cannot be serialised; [`Error::JournalAppend`] if the disk refuses the
    /// write, for example because it is full: all earlier records are still whole, and `append` may be tried again.
    pub fn append<T: Serialize>(&mut self, record: &T) -> Result<FrameSpan, Error> {
        let mut frame = vec![0; HEADER_BYTES as usize];
        frame = postcard::to_extend(record, frame)
            .map_err(|source| self.record_error::<T>(self.end, source))?;
        let Ok(len) = u32::try_from(frame.len() as u64 - HEADER_BYTES) else {
            return Err(self.record_error::<T>(self.end, postcard::Error::SerializeBufferFull));
        };
        if let Some((header, payload)) = frame.split_first_chunk_mut() {
            *header = header_of(len, crc(len, payload));
        }
        let span = FrameSpan {
            offset: self.end,
            len,
        };
        match self.store(&frame) {
            Ok(()) => {
                self.end = span.end();
                self.frames += 1;
                Ok(span)
            }
            Err(source) => {
                // If this fails too, the torn frame lies beyond `end`: the next append overwrites it, or the next
                // open cuts it off.
                let _ = self.cut();
                Err(Error::JournalAppend {
                    path: self.path.clone(),
                    frames: self.frames,
                    source,
                })
            }
        }
    }

    /// Reads a record back.
    ///
    /// # Errors
    /// [`Error::JournalFrame`] if there is no such frame; [`Error::JournalRecord`] if the record is not a `T`;
    /// [`Error::Io`].
    pub fn read<T: DeserializeOwned>(&mut self, span: FrameSpan) -> Result<T, Error> {
        if span.end() > self.end {
            return Err(self.no_frame(span));
        }
        match self.read_frame(span.offset)? {
            (found, record) if found == span => Ok(record),
            _ => Err(self.no_frame(span)),
        }
    }

    /// Reads the record whose frame begins at `offset`, and returns the frame's span with the record.
    ///
    /// # Errors
    /// As [`Journal::read`].
    pub fn read_frame<T: DeserializeOwned>(
        &mut self,
        offset: u64,
    ) -> Result<(FrameSpan, T), Error> {
        let mut span = FrameSpan { offset, len: 0 };
        if offset < MAGIC.len() as u64 || span.end() > self.end {
            return Err(self.no_frame(span));
        }
        let mut header = [0; HEADER_BYTES as usize];
        self.file
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.file.read_exact(&mut header))
            .map_err(Error::io("read", &self.path))?;
        let [a, b, c, d, ..] = header;
        span.len = u32::from_le_bytes([a, b, c, d]);
        if span.end() > self.end {
            return Err(self.no_frame(span));
        }
        let mut payload = vec![0; span.len as usize];
        self.file
            .read_exact(&mut payload)
            .map_err(Error::io("read", &self.path))?;
        if header != header_of(span.len, crc(span.len, &payload)) {
            return Err(self.no_frame(span));
        }
        match postcard::from_bytes(&payload) {
            Ok(record) => Ok((span, record)),
            Err(source) => Err(self.record_error::<T>(offset, source)),
        }
    }

    fn no_frame(&self, span: FrameSpan) -> Error {
        Error::JournalFrame {
            path: self.path.clone(),
            offset: span.offset,
            bytes: span.len,
        }
    }

    fn begin(&mut self) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&MAGIC)?;
        self.file.sync_all()
    }

    fn cut(&mut self) -> std::io::Result<()> {
        self.file.set_len(self.end)?;
        self.file.sync_all()
    }

    fn store(&mut self, frame: &[u8]) -> std::io::Result<()> {
        self.file.seek(SeekFrom::Start(self.end))?;
        self.file.write_all(frame)?;
        self.file.sync_data()
    }

    fn record_error<T>(&self, offset: u64, source: postcard::Error) -> Error {
        Error::JournalRecord {
            path: self.path.clone(),
            offset,
            type_name: std::any::type_name::<T>(),
            source,
        }
    }
}

/// Finds the whole frames from the beginning of the file.
fn scan(file: &File, path: &Path, length: u64) -> Result<Vec<FrameSpan>, Error> {
    let mut reader = BufReader::with_capacity(BLOCK_BYTES, file);
    reader
        .seek(SeekFrom::Start(0))
        .map_err(Error::io("read", path))?;
    let mut magic = Vec::new();
    reader
        .by_ref()
        .take(MAGIC.len() as u64)
        .read_to_end(&mut magic)
        .map_err(Error::io("read", path))?;
    if !MAGIC.starts_with(&magic) {
        return Err(Error::NotAJournal {
            path: path.to_path_buf(),
        });
    }
    let mut spans = Vec::new();
    let mut offset = MAGIC.len() as u64;
    while offset < length {
        let Some(span) =
            whole_frame(&mut reader, offset, length).map_err(Error::io("read", path))?
        else {
            break;
        };
        spans.push(span);
        offset = span.end();
    }
    if offset < length
        && let Some(next) = frame_after(file, offset, length).map_err(Error::io("read", path))?
    {
        return Err(Error::JournalDamaged {
            path: path.to_path_buf(),
            offset,
            frames: spans.len(),
            next,
        });
    }
    if offset < length && !is_torn(file, offset).map_err(Error::io("read", path))? {
        return Err(Error::JournalEndDamaged {
            path: path.to_path_buf(),
            offset,
            frames: spans.len(),
        });
    }
    Ok(spans)
}

/// Whether the bytes from `offset` to the end can be what a crash left of a frame. They cannot if they are a whole frame
/// but for damaged bytes: with the right length and another CRC, or with the right CRC and another length.
fn is_torn(mut file: &File, offset: u64) -> std::io::Result<bool> {
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(offset))?;
    file.read_to_end(&mut tail)?;
    let Some((header, payload)) = tail.split_first_chunk::<{ HEADER_BYTES as usize }>() else {
        return Ok(true);
    };
    let [a, b, c, d, ..] = *header;
    let Ok(len) = u32::try_from(payload.len()) else {
        return Ok(true);
    };
    if *header == header_of(u32::from_le_bytes([a, b, c, d]), crc(len, payload)) {
        return Ok(false);
    }
    // A sector that never reached the disk reads as zeros. A few zeros may be a record's own.
    let last_sector = (offset + tail.len() as u64 - 1) / SECTOR_BYTES * SECTOR_BYTES;
    let lost = tail.get(last_sector.saturating_sub(offset) as usize..);
    let is_zero = |lost: &[u8]| lost.len() >= OWN_ZEROS && lost.iter().all(|byte| *byte == 0);
    Ok(lost.is_some_and(is_zero) || u32::from_le_bytes([a, b, c, d]) != len)
}

/// Reads the frame at `offset`, which is the reader's position, and returns its span if the frame is whole and its CRC
/// is right.
fn whole_frame(
    reader: &mut impl Read,
    offset: u64,
    length: u64,
) -> std::io::Result<Option<FrameSpan>> {
    if length - offset < HEADER_BYTES {
        return Ok(None);
    }
    let mut header = [0; HEADER_BYTES as usize];
    reader.read_exact(&mut header)?;
    let [a, b, c, d, ..] = header;
    let span = FrameSpan {
        offset,
        len: u32::from_le_bytes([a, b, c, d]),
    };
    if span.end() > length {
        return Ok(None);
    }
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&span.len.to_le_bytes());
    let mut payload = reader.take(u64::from(span.len));
    let mut block = vec![0; BLOCK_BYTES.min(span.len as usize)];
    loop {
        let count = payload.read(&mut block)?;
        match block.get(..count) {
            None | Some([]) => break,
            Some(part) => hasher.update(part),
        }
    }
    Ok((header == header_of(span.len, hasher.finalize())).then_some(span))
}

/// Looks for a whole frame that begins after `broken`. A crash tears only one frame, so a whole frame after the broken
/// one proves other damage. The probability of a false match is 2⁻³² for each byte.
fn frame_after(file: &File, broken: u64, length: u64) -> std::io::Result<Option<u64>> {
    let mut tail = BufReader::with_capacity(BLOCK_BYTES, file);
    tail.seek(SeekFrom::Start(broken + 1))?;
    let mut window = [0; HEADER_BYTES as usize];
    let mut candidates = Vec::new();
    for (end, byte) in (broken + 2..).zip(tail.bytes()) {
        let [_, rest @ ..] = window;
        let [b, c, d, e, f, g, h] = rest;
        window = [b, c, d, e, f, g, h, byte?];
        let Some(offset) = end
            .checked_sub(HEADER_BYTES)
            .filter(|offset| *offset > broken)
        else {
            continue;
        };
        // Most offsets are ruled out because the length that their bytes would mean exceeds the file, and runs of
        // zeros by their CRC.
        let span = FrameSpan {
            offset,
            len: u32::from_le_bytes([b, c, d, e]),
        };
        if span.end() <= length && (span.len > 0 || window == header_of(0, crc(0, &[]))) {
            candidates.push(offset);
        }
    }
    for offset in candidates {
        let mut reader = BufReader::with_capacity(BLOCK_BYTES, file);
        reader.seek(SeekFrom::Start(offset))?;
        if whole_frame(&mut reader, offset, length)?.is_some() {
            return Ok(Some(offset));
        }
    }
    Ok(None)
}

fn crc(len: u32, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&len.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}

fn header_of(len: u32, crc: u32) -> [u8; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (len.to_le_bytes(), crc.to_le_bytes());
    [a, b, c, d, e, f, g, h]
}

#[cfg(test)]
mod tests;
