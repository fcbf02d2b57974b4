//! Random access gives what reading in order gives.

use potstill_datasets::{Error, SequenceLength, Signal, Table, shard_name, write_shard};

use super::records;

#[test]
fn rows_by_place_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let rows = records::signals(150, 3, 4);
    for (index, part) in rows.chunks(100).enumerate() {
        write_shard(
            &dir.path().join(shard_name(index)),
            part,
            &records::provenances(),
        )
        .unwrap();
    }
    let mut table = Table::<Signal>::open(dir.path()).unwrap();
    assert_eq!((table.len(), table.is_empty()), (150, false));
    assert_eq!(
        table
            .footers()
            .map(|footer| footer.rows)
            .collect::<Vec<_>>(),
        [100, 50]
    );
    for step in 0..300_u32 {
        let index = step * 77 % 150;
        let (shard, row) = (index / 100, index % 100);
        assert_eq!(table.get(shard, row).unwrap(), rows[index as usize]);
    }
    let lengths: Vec<SequenceLength> = rows.iter().map(SequenceLength::of).collect();
    assert_eq!(table.lengths().unwrap().concat(), lengths);
    for (shard, row) in [(0, 100), (1, 50), (2, 0), (0, u32::MAX)] {
        assert!(
            matches!(table.get(shard, row), Err(Error::NoSuchRow { .. })),
            "({shard}, {row})"
        );
    }
}

#[test]
fn an_empty_table_has_no_rows() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Table::<Signal>::open(dir.path()).unwrap().is_empty());
    write_shard::<Signal>(&dir.path().join(shard_name(0)), &[], &[]).unwrap();
    let mut table = Table::<Signal>::open(dir.path()).unwrap();
    assert_eq!(table.len(), 0);
    assert_eq!(table.lengths().unwrap(), [[]]);
    assert!(matches!(table.get(0, 0), Err(Error::NoSuchRow { .. })));
}
