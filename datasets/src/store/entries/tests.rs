use std::path::PathBuf;

use super::*;
use crate::records::{FinishReason, Usage};

fn provenance(teacher: &str) -> Provenance {
    Provenance {
        teacher: teacher.to_owned(),
        revision: String::new(),
        engine: String::new(),
        dtype: String::new(),
        tokenizer: String::new(),
        template: String::new(),
        sampling: "{}".to_owned(),
        temperatures: Vec::new(),
        licence: None,
    }
}

fn id(number: u32) -> String {
    format!("{number:016x}{:016x}", 7)
}

fn index(count: u32) -> UnitIndex {
    let units = (0..count).map(|n| Ok::<_, Error>((id(n), 0)));
    UnitIndex::new(count as usize, units).unwrap()
}

fn answer(number: u32) -> (u32, Entry<Answer>) {
    let completion = Completion {
        prompt_id: id(number),
        sample_index: 0,
        reasoning: None,
        answer: format!("answer {number}"),
        tool_calls: Vec::new(),
        finish_reason: FinishReason::Stop,
        usage: Usage {
            prompt_tokens: 0,
            completion_tokens: 0,
        },
        tokens: Vec::new(),
        provenance: 0,
    };
    let signal = None;
    (number, Ok(Answer { completion, signal }))
}

fn failure(number: u32) -> (u32, Entry<Answer>) {
    let failed = Failed {
        prompt_id: id(number),
        sample_index: 0,
        reason: "cut".to_owned(),
        message: String::new(),
    };
    (number, Err(failed))
}

fn journal(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("journal.bin")
}

fn open(dir: &tempfile::TempDir, units: u32) -> Store<Answer> {
    Store::open(&journal(dir), &index(units)).unwrap()
}

/// Each unit's answer with the index of its provenance, or the reason of its failure.
fn read(store: &mut Store<Answer>, units: std::ops::Range<u32>) -> Vec<Option<String>> {
    let text = |ordinal| {
        store.get(ordinal).unwrap().map(|entry| match entry {
            Ok(Answer { completion, .. }) => {
                format!("{} from {}", completion.answer, completion.provenance)
            }
            Err(failed) => failed.reason,
        })
    };
    units.map(text).collect()
}

#[test]
fn entries_of_any_order_are_read_in_the_order_of_units_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(&dir, 6);
    store
        .add(&provenance("a"), vec![answer(4), answer(1)])
        .unwrap();
    store
        .add(&provenance("b"), vec![failure(0), answer(3)])
        .unwrap();
    let expected = [
        Some("cut"),
        Some("answer 1 from 0"),
        None,
        Some("answer 3 from 1"),
        Some("answer 4 from 0"),
        None,
    ];
    let expected = expected.map(|text| text.map(str::to_owned));
    assert_eq!(read(&mut store, 0..6), expected);
    drop(store);
    let mut store = open(&dir, 6);
    // A second reading decodes again what the first one took.
    for _ in 0..2 {
        assert_eq!(read(&mut store, 0..6), expected);
    }
    assert_eq!(read(&mut store, 3..4), expected[3..4]);
    let tally = Tally {
        records: 3,
        published: 0,
        failures: 1,
        missing: 2,
    };
    assert_eq!(store.tally(), tally);
    assert!(store.is_missing(2, false) && !store.is_missing(0, false));
    assert!(store.is_missing(0, true) && !store.is_missing(1, true));
    // With fewer prompts, the entries of the others stay in the journal and are counted.
    drop(store);
    let store = open(&dir, 2);
    assert_eq!((store.unlisted(), store.tally().records), (2, 1));
}

#[test]
fn an_answer_replaces_a_failure_and_nothing_replaces_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(&dir, 1);
    let from = provenance("a");
    for entry in [failure(0), answer(0), failure(0)] {
        store.add(&from, vec![entry]).unwrap();
    }
    let expected = [Some("answer 0 from 0".to_owned())];
    assert_eq!(read(&mut store, 0..1), expected);
    drop(store);
    assert_eq!(read(&mut open(&dir, 1), 0..1), expected);
}

#[test]
fn samples_of_a_prompt_are_told_apart_and_duplicates_are_refused() {
    let units = (0..3).flat_map(|p| (0..4).map(move |s| Ok::<_, Error>((id(p), s))));
    let index = UnitIndex::new(12, units).unwrap();
    assert_eq!(index.find(&id(2), 3), Some(11));
    assert_eq!(index.find(&id(3), 0), None);
    let twice = [Ok((id(1), 0)), Ok((id(1), 0))];
    assert!(matches!(
        UnitIndex::new(2, twice.into_iter()),
        Err(Error::DuplicateUnit)
    ));
}

/// Reading in order decodes each frame once, however many entries the frames have.
#[test]
fn a_frame_is_decoded_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(&dir, 4000);
    let from = provenance("a");
    for first in (0..4000).step_by(1000) {
        // Entries of neighbouring frames are mixed.
        let ordinals = (first..first + 1000).map(|n| (n * 7) % 4000);
        store.add(&from, ordinals.map(answer).collect()).unwrap();
    }
    assert_eq!(read(&mut store, 0..4000).iter().flatten().count(), 4000);
    assert!(store.frames.is_empty(), "every entry was taken");
}
