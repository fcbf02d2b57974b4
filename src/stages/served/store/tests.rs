use std::path::PathBuf;

use super::*;

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

fn index(count: u32) -> Index {
    Index::new(count as usize, (0..count).map(|n| Ok((id(n), 0)))).unwrap()
}

fn row(number: u32, outcome: Outcome<String>) -> (u32, Row<String>) {
    let row = Row {
        prompt_id: id(number),
        sample_index: 0,
        attempts: 1,
        outcome,
    };
    (number, row)
}

fn got(number: u32) -> (u32, Row<String>) {
    row(number, Outcome::Got(format!("answer {number}")))
}

fn failed(number: u32) -> (u32, Row<String>) {
    let outcome = Outcome::Failed {
        reason: "cut".to_owned(),
        message: String::new(),
    };
    row(number, outcome)
}

fn journal(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("journal.bin")
}

fn read(store: &mut Store<String>, units: std::ops::Range<usize>) -> Vec<Option<(String, usize)>> {
    let rows = store
        .read(units, &mut |_, _, _| anyhow::bail!("none"))
        .unwrap();
    rows.into_iter()
        .map(|row| {
            row.map(|(row, number)| match row.outcome {
                Outcome::Got(text) => (text, number),
                Outcome::Failed { reason, .. } => (reason, number),
            })
        })
        .collect()
}

#[test]
fn a_place_takes_eight_bytes_and_keeps_everything() {
    assert_eq!(size_of::<Place>(), 8);
    assert_eq!(Place::NOWHERE.kind(), Kind::Nowhere);
    for (offset, row) in [
        (8, 0),
        ((1 << OFFSET_BITS) - 1, FRAME_ROWS - 1),
        (12_345_678_901, 17),
    ] {
        for kind in [Kind::Answer, Kind::Failure] {
            let place = Place::in_journal(kind, offset, row).unwrap();
            assert_eq!((place.kind(), place.frame()), (kind, (offset, row)));
        }
    }
    let place = Place::published(4095, (1 << 24) - 1, 77).unwrap();
    assert_eq!(
        (place.kind(), place.row()),
        (Kind::Published, (4095, (1 << 24) - 1, 77))
    );
    assert!(Place::in_journal(Kind::Answer, 1 << OFFSET_BITS, 0).is_err());
    assert!(Place::published(0, 0, 1 << 24).is_err());
}

#[test]
fn what_landed_in_any_order_is_read_in_the_order_of_units_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::<String>::open(&journal(&dir), &index(6)).unwrap();
    store.add(&provenance("a"), vec![got(4), got(1)]).unwrap();
    store
        .add(&provenance("b"), vec![failed(0), got(3)])
        .unwrap();
    let expected = [
        Some(("cut".to_owned(), 1)),
        Some(("answer 1".to_owned(), 0)),
        None,
        Some(("answer 3".to_owned(), 1)),
        Some(("answer 4".to_owned(), 0)),
        None,
    ];
    assert_eq!(read(&mut store, 0..6), expected);
    drop(store);
    let mut store = Store::<String>::open(&journal(&dir), &index(6)).unwrap();
    assert_eq!(read(&mut store, 0..6), expected);
    assert_eq!(read(&mut store, 3..4), expected[3..4]);
    let tally = Tally {
        answers: 3,
        failures: 1,
        missing: 2,
    };
    assert_eq!(store.tally(), tally);
    assert!(store.is_missing(2, false) && !store.is_missing(0, false));
    assert!(store.is_missing(0, true) && !store.is_missing(1, true));
    // Fewer prompts: what is not among them stays where it is, and is counted.
    drop(store);
    let store = Store::<String>::open(&journal(&dir), &index(2)).unwrap();
    assert_eq!((store.others, store.tally().answers), (2, 1));
}

#[test]
fn an_answer_takes_a_failures_place_and_nothing_takes_an_answers() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::<String>::open(&journal(&dir), &index(1)).unwrap();
    let from = provenance("a");
    for landed in [failed(0), got(0), failed(0)] {
        store.add(&from, vec![landed]).unwrap();
    }
    assert_eq!(read(&mut store, 0..1), [Some(("answer 0".to_owned(), 0))]);
    drop(store);
    let mut store = Store::<String>::open(&journal(&dir), &index(1)).unwrap();
    assert_eq!(read(&mut store, 0..1), [Some(("answer 0".to_owned(), 0))]);
}

#[test]
fn samples_of_a_prompt_are_told_apart_and_twins_are_refused() {
    let units = (0..3).flat_map(|p| (0..4).map(move |s| Ok((id(p), s))));
    let index = Index::new(12, units).unwrap();
    assert_eq!(index.find(&id(2), 3), Some(11));
    assert_eq!(index.find(&id(3), 0), None);
    let twins = [Ok((id(1), 0)), Ok((id(1), 0))];
    assert!(Index::new(2, twins.into_iter()).is_err());
}
