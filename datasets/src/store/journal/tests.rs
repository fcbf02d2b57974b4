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
