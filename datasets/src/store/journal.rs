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
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    fn journal_of(path: &Path, records: &[Vec<u8>]) -> Vec<FrameSpan> {
        let (mut journal, old) = Journal::open(path).unwrap();
        assert!(old.is_empty());
        records
            .iter()
            .map(|record| journal.append(record).unwrap())
            .collect()
    }

    fn read_all(path: &Path) -> Result<Vec<Vec<u8>>, Error> {
        let (mut journal, spans) = Journal::open(path)?;
        spans.into_iter().map(|span| journal.read(span)).collect()
    }

    fn records() -> Vec<Vec<u8>> {
        vec![b"first".to_vec(), vec![], vec![0; 40], (0..200).collect()]
    }

    #[test]
    fn records_are_there_after_opening_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let spans = journal_of(&path, &records());
        let (mut journal, found) = Journal::open(&path).unwrap();
        assert_eq!((found, journal.cut_bytes()), (spans.clone(), 0));
        assert_eq!(journal.read::<Vec<u8>>(spans[3]).unwrap(), records()[3]);
        // Spans that are not frames, and a record of another type.
        let inside = FrameSpan {
            offset: spans[3].offset + 1,
            len: 20,
        };
        assert!(matches!(
            journal.read::<Vec<u8>>(inside),
            Err(Error::JournalFrame { .. })
        ));
        let beyond = FrameSpan {
            offset: spans[3].offset,
            len: u32::MAX,
        };
        assert!(matches!(
            journal.read::<Vec<u8>>(beyond),
            Err(Error::JournalFrame { .. })
        ));
        assert!(matches!(
            journal.read::<(u64, String)>(spans[0]),
            Err(Error::JournalRecord { .. })
        ));
    }

    /// A crash may leave any prefix of the file. Whole records are kept, and records can be appended.
    #[test]
    fn a_journal_cut_at_any_byte_keeps_its_whole_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let records = records();
        let spans = journal_of(&path, &records);
        let bytes = fs::read(&path).unwrap();
        for length in 0..bytes.len() {
            fs::write(&path, &bytes[..length]).unwrap();
            let whole = spans
                .iter()
                .filter(|span| span.end() <= length as u64)
                .count();
            let (mut journal, found) = Journal::open(&path).unwrap();
            assert_eq!(found, spans[..whole], "cut at byte {length}");
            let end = found.last().map_or(MAGIC.len() as u64, |span| span.end());
            assert_eq!(
                journal.cut_bytes(),
                (length as u64).saturating_sub(end),
                "cut at byte {length}"
            );
            journal.append(&b"next".to_vec()).unwrap();
            drop(journal);
            let expected: Vec<_> = records[..whole]
                .iter()
                .cloned()
                .chain([b"next".to_vec()])
                .collect();
            assert_eq!(read_all(&path).unwrap(), expected, "cut at byte {length}");
        }
    }

    /// A torn write may also leave arbitrary bytes of any length behind the whole records.
    #[test]
    fn arbitrary_bytes_at_the_end_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        journal_of(&path, &records());
        let bytes = fs::read(&path).unwrap();
        for tail in [
            vec![0; 1],
            vec![0; 7],
            vec![0; 100_000],
            vec![255; 100_000],
            vec![1; 30],
        ] {
            fs::write(&path, [bytes.clone(), tail.clone()].concat()).unwrap();
            let (journal, spans) = Journal::open(&path).unwrap();
            assert_eq!((spans.len(), journal.cut_bytes()), (4, tail.len() as u64));
            drop(journal);
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
    }

    /// A flipped byte is an error that changes nothing, wherever it is.
    #[test]
    fn a_flipped_byte_is_found_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let spans = journal_of(&path, &records());
        let bytes = fs::read(&path).unwrap();
        for index in 0..bytes.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[index] ^= flip;
                fs::write(&path, &damaged).unwrap();
                let frame = spans
                    .iter()
                    .position(|span| (span.offset..span.end()).contains(&(index as u64)));
                match (Journal::open(&path), frame) {
                    (Err(Error::NotAJournal { .. }), None) => {
                        assert_eq!(fs::read(&path).unwrap(), damaged)
                    }
                    (Err(Error::JournalEndDamaged { offset, frames, .. }), Some(3)) => {
                        assert_eq!((offset, frames), (spans[3].offset, 3));
                        assert_eq!(fs::read(&path).unwrap(), damaged);
                    }
                    (
                        Err(Error::JournalDamaged {
                            offset,
                            frames,
                            next,
                            ..
                        }),
                        Some(frame),
                    ) => {
                        assert_eq!((offset, frames), (spans[frame].offset, frame));
                        assert_eq!(next, spans[frame + 1].offset);
                        assert_eq!(fs::read(&path).unwrap(), damaged);
                    }
                    (other, frame) => panic!("byte {index} of frame {frame:?}: {other:?}"),
                }
            }
        }
    }

    /// A file system may leave zeros where a sector was not written. The record was not synced, so it did not count.
    #[test]
    fn a_last_frame_whose_end_is_zeros_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let record: Vec<u8> = (0..2000).map(|i| (i % 251) as u8 | 1).collect();
        let spans = journal_of(&path, &[record.clone(), record]);
        let bytes = fs::read(&path).unwrap();
        for sectors in 1..4 {
            let mut lost = bytes.clone();
            let from = (bytes.len() / 512 + 1 - sectors) * 512;
            lost[from..].fill(0);
            fs::write(&path, lost).unwrap();
            assert_eq!(
                Journal::open(&path).unwrap().1,
                spans[..1],
                "{sectors} sectors"
            );
        }
        let mut damaged = bytes;
        damaged[3000] ^= 4;
        fs::write(&path, &damaged).unwrap();
        let message = Journal::open(&path).unwrap_err().to_string();
        assert!(message.contains("its last record is complete"), "{message}");
        assert_eq!(fs::read(&path).unwrap(), damaged);
    }

    #[test]
    fn a_file_of_another_kind_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        fs::write(&path, "my notes").unwrap();
        let message = Journal::open(&path).unwrap_err().to_string();
        assert!(
            message.contains("notes.txt is not a Potstill journal\nhint: move it"),
            "{message}"
        );
        assert_eq!(fs::read(&path).unwrap(), b"my notes");
    }

    #[test]
    fn a_journal_has_one_user_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let (journal, _) = Journal::open(&path).unwrap();
        assert!(matches!(
            Journal::open(&path),
            Err(Error::JournalInUse { .. })
        ));
        drop(journal);
        Journal::open(&path).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Truncation and then one flipped byte: what is read is always a prefix of what was written, and an error
        /// never changes the file.
        #[test]
        fn damage_never_invents_or_reorders_records(
            records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..8),
            cut in any::<prop::sample::Index>(),
            flip in prop::option::of((any::<prop::sample::Index>(), 1..=255_u8)),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("journal");
            journal_of(&path, &records);
            let mut bytes = fs::read(&path).unwrap();
            bytes.truncate(cut.index(bytes.len() + 1));
            if let (Some((index, flip)), false) = (flip, bytes.is_empty()) {
                let index = index.index(bytes.len());
                bytes[index] ^= flip;
            }
            fs::write(&path, &bytes).unwrap();
            match read_all(&path) {
                Ok(read) => prop_assert!(records.starts_with(&read)),
                Err(
                    Error::JournalDamaged { .. }
                    | Error::JournalEndDamaged { .. }
                    | Error::NotAJournal { .. },
                ) => {
                    prop_assert_eq!(fs::read(&path).unwrap(), bytes);
                }
                Err(other) => return Err(TestCaseError::fail(other.to_string())),
            }
        }
    }
}
