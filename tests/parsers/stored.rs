//! Targets: what a run directory stores.

use std::fmt::Debug;
use std::fs;
use std::path::Path;

use potstill_datasets::{
    Answer, Completion, Dropped, Entry, Error, Failed, Footer, Journal, Manifest, NearDuplicate,
    OwnText, Prompt, Record, Selected, SequenceValues, Signal, Store, Table, TaskSample, UnitIndex,
    Verdict, read_footer, read_shard, to_checked_line, to_sealed_json, write_shard,
};
use potstill_teacher::http::RequestLog;
use serde::ser::SerializeTuple;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::scratch::{check_error, check_error_names, file, folder};

/// Number of kinds of tables.
pub const TABLES: u8 = 11;

/// Input: the kind of the table as a byte, then a shard.
pub fn tables(data: &[u8]) {
    let Some((kind, shard)) = data.split_first() else {
        return;
    };
    match kind % TABLES {
        0 => table::<Prompt>(shard),
        1 => table::<Completion>(shard),
        2 => table::<Signal>(shard),
        3 => table::<Selected>(shard),
        4 => table::<Dropped>(shard),
        5 => table::<NearDuplicate>(shard),
        6 => table::<Failed>(shard),
        7 => table::<SequenceValues>(shard),
        8 => table::<Verdict>(shard),
        9 => table::<TaskSample>(shard),
        _ => table::<OwnText>(shard),
    }
}

fn rows<R: Record>(path: &Path) -> Result<(Footer, Vec<R>), Error> {
    let shard = read_shard::<R>(path)?;
    let footer = shard.footer().clone();
    Ok((footer, shard.collect::<Result<_, _>>()?))
}

/// Reads a shard whole and by row, and writes its rows to another shard, which must hold the same rows.
fn table<R: Record + Debug>(shard: &[u8]) {
    let name = "shard-00000.parquet";
    let path = file(name, shard);
    if let Err(error) = read_footer(&path) {
        check_error_names(&error, name);
    }
    let (footer, read) = match rows::<R>(&path) {
        Ok(read) => read,
        Err(error) => return check_error_names(&error, name),
    };
    assert_eq!(footer.rows, read.len());
    // Numbers may be NaN, so texts are compared.
    let texts: Vec<String> = read.iter().map(|row| format!("{row:?}")).collect();
    if let Some(parent) = path.parent()
        && let Ok(mut table) = Table::<R>::open(parent)
    {
        for (row, text) in texts.iter().enumerate() {
            match table.get(0, row as u32) {
                Ok(row) => assert_eq!(*text, format!("{row:?}")),
                Err(error) => check_error_names(&error, name),
            }
        }
    }
    let again = path.with_file_name("again.parquet");
    match write_shard(&again, &read, &footer.provenance) {
        Ok(()) => {
            let (_, read) = rows::<R>(&again).unwrap();
            let again: Vec<String> = read.iter().map(|row| format!("{row:?}")).collect();
            assert_eq!(texts, again);
        }
        Err(error) => check_error(&error),
    }
}

fn units() -> UnitIndex {
    let units = (0..8).map(|number| Ok::<_, Error>((format!("prompt {}", number / 2), number % 2)));
    UnitIndex::new(8, units).unwrap()
}

fn entries(path: &Path) -> Result<Vec<Option<Entry<Answer>>>, Error> {
    let mut store = Store::<Answer>::open(path, &units())?;
    (0..8).map(|ordinal| store.get(ordinal)).collect()
}

/// Input: a journal. A journal that is refused is not changed, and one that is cut is read the same way again.
pub fn journal(data: &[u8]) {
    let name = "answers.journal";
    let path = file(name, data);
    let spans = match Journal::open(&path) {
        Ok((journal, spans)) => {
            assert_eq!(journal.bytes(), fs::metadata(&path).unwrap().len());
            spans
        }
        Err(error) => {
            assert_eq!(
                fs::read(&path).unwrap(),
                data,
                "a refused journal was changed"
            );
            return check_error_names(&error, name);
        }
    };
    for span in &spans {
        assert!(span.offset + u64::from(span.len) <= data.len() as u64);
    }
    let (journal, again) = Journal::open(&path).unwrap();
    assert_eq!((spans, 0), (again, journal.cut_bytes()));
    drop(journal);
    match (entries(&path), entries(&path)) {
        (Ok(first), Ok(second)) => assert_eq!(format!("{first:?}"), format!("{second:?}")),
        (first, second) => {
            let errors = [first, second].map(|entries| entries.unwrap_err());
            assert_eq!(errors[0].to_string(), errors[1].to_string());
            check_error_names(&errors[0], name);
        }
    }
}

/// Bytes that serialise as themselves.
struct Payload<'a>(&'a [u8]);

impl Serialize for Payload<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut tuple = serializer.serialize_tuple(self.0.len())?;
        for byte in self.0 {
            tuple.serialize_element(byte)?;
        }
        tuple.end()
    }
}

/// Input: payloads of a journal's frames, each after a byte with its length. The checksums of the frames are right.
pub fn journal_records(data: &[u8]) {
    let path = folder().join("answers.journal");
    let (mut journal, _) = Journal::open(&path).unwrap();
    let mut rest = data;
    while let Some((length, after)) = rest.split_first() {
        let (payload, next) = after.split_at(after.len().min(usize::from(*length)));
        journal.append(&Payload(payload)).unwrap();
        rest = next;
    }
    drop(journal);
    match entries(&path) {
        Ok(first) => assert_eq!(
            format!("{first:?}"),
            format!("{:?}", entries(&path).unwrap())
        ),
        Err(error) => check_error(&error),
    }
}

/// Input: a manifest. One that is read is written and read again with the same content, and so is one whose hash is not
/// that of its content when it gets the right one.
pub fn manifest(data: &[u8]) {
    let name = "prompts_manifest.json";
    let table = file(name, data).with_file_name("prompts");
    match Manifest::read(&table) {
        Ok(None) => panic!("a manifest that is there was not read"),
        Ok(Some(manifest)) => {
            manifest.write(&table).unwrap();
            let again = Manifest::read(&table).unwrap().unwrap();
            assert_eq!(manifest.content_hash(), again.content_hash());
            assert_eq!(format!("{manifest:?}"), format!("{again:?}"));
        }
        Err(error) => check_error_names(&error, name),
    }
    let fields = serde_json::from_slice::<Value>(data);
    if let Ok(text) = fields.and_then(|fields| to_sealed_json(&fields)) {
        fs::write(table.with_file_name(name), text).unwrap();
        match Manifest::read(&table) {
            Ok(manifest) => manifest.unwrap().write(&table).unwrap(),
            Err(error) => check_error_names(&error, name),
        }
    }
}

/// Input: `requests.jsonl`, as it is and with the right checksum on each line.
pub fn request_log(data: &[u8]) {
    log(data);
    let checked = data.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = serde_json::from_slice::<Map<String, Value>>(line).ok()?;
        fields.shift_remove("crc32c");
        to_checked_line(&fields).ok()
    });
    log(&checked.collect::<Vec<_>>().concat());
}

/// Reads a log. What was spent is a number, and opening the file for writing does not change it.
fn log(data: &[u8]) {
    let name = "requests.jsonl";
    let path = file(name, data);
    let before = match RequestLog::read_spending(&path) {
        Ok(spent) => spent,
        Err(error) => {
            check_error_names(&error, name);
            assert!(RequestLog::open(&path, "collect").is_err());
            return assert_eq!(fs::read(&path).unwrap(), data, "a refused log was changed");
        }
    };
    assert!(
        !before.usd.is_nan() && !before.seconds.is_nan(),
        "{before:?}"
    );
    drop(RequestLog::open(&path, "collect").unwrap());
    let after = RequestLog::read_spending(&path).unwrap();
    assert_eq!(
        (before.requests, before.tokens, before.usd.to_bits()),
        (after.requests, after.tokens, after.usd.to_bits())
    );
}
