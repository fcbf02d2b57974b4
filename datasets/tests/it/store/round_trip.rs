//! Any rows come back as they were, and equal rows are equal bytes.

use std::fs;
use std::path::Path;

use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use potstill_datasets::{Error, Record, ShardWriter, Signal, read_footer, read_shard, write_shard};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::records;

fn returns<R: Record + Clone + PartialEq + std::fmt::Debug>(
    rows: &[R],
) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard-00000.parquet");
    write_shard(&path, rows, &records::provenances()).unwrap();
    let read: Vec<R> = read_shard(&path)
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    prop_assert_eq!(&read, rows);
    let footer = read_footer(&path).unwrap();
    prop_assert_eq!((footer.schema, footer.rows), (1, rows.len()));
    prop_assert_eq!(footer.provenance, records::provenances());
    let again = dir.path().join("again.parquet");
    write_by_row(&again, rows);
    prop_assert!(
        fs::read(&path).unwrap() == fs::read(&again).unwrap(),
        "equal rows gave other bytes"
    );
    prop_assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        2,
        "a temporary file is left"
    );
    // A part of a batch converts as the whole does.
    if rows.len() > 1 {
        let batch = R::to_batch(rows).unwrap();
        prop_assert_eq!(
            R::from_batch(&batch.slice(1, rows.len() - 1)).unwrap(),
            &rows[1..]
        );
    }
    Ok(())
}

fn write_by_row<R: Record + Clone>(path: &Path, rows: &[R]) {
    let optional = rows.iter().any(R::fills_optional);
    let mut writer = ShardWriter::<R>::begin(path, &records::provenances(), optional).unwrap();
    rows.iter()
        .try_for_each(|row| writer.push(row.clone()))
        .unwrap();
    writer.finish().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn prompts(rows in vec(records::prompt(), 0..40)) {
        returns(&rows)?;
    }

    #[test]
    fn completions(rows in vec(records::completion(), 0..40)) {
        returns(&rows)?;
    }

    #[test]
    fn signals(rows in vec(records::signal(), 0..70)) {
        returns(&rows)?;
    }

    #[test]
    fn lists_of_rows(
        selected in vec(records::selected(), 0..40),
        dropped in vec(records::dropped(), 0..40),
        values in vec(records::sequence_values(), 0..40),
        verdicts in vec(records::verdict(), 0..40),
        task_samples in vec(records::task_sample(), 0..40),
        own_texts in vec(records::own_text(), 0..40),
    ) {
        returns(&selected)?;
        returns(&dropped)?;
        returns(&values)?;
        returns(&verdicts)?;
        returns(&task_samples)?;
        returns(&own_texts)?;
    }
}

/// Files without draws are those that were written before there were any.
#[test]
fn columns_of_draws_are_there_for_draws_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard-00000.parquet");
    let columns = || {
        let file = fs::File::open(&path).unwrap();
        let reader = ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
        let fields = reader.schema().fields().iter();
        fields.map(|field| field.name().clone()).collect::<Vec<_>>()
    };
    let mut rows = records::signals(2, 3, 4);
    write_shard(&path, &rows, &records::provenances()).unwrap();
    assert_eq!(
        columns(),
        [
            "prompt_id",
            "sample_index",
            "token_ids",
            "loss_mask",
            "support_ids",
            "support_logprobs",
            "tail_logprob",
            "entropy",
            "log_z_at",
            "provenance"
        ]
    );
    let read: Result<Vec<Signal>, _> = read_shard(&path).unwrap().collect();
    assert_eq!(read.unwrap(), rows);

    rows[1].rows.change_rows(|_, row| {
        (row.draw_ids, row.draw_counts) = (vec![50, 51], vec![3, 1]);
    });
    write_shard(&path, &rows, &records::provenances()).unwrap();
    assert_eq!(columns()[9..], ["draw_ids", "draw_counts", "provenance"]);
    let read: Result<Vec<Signal>, _> = read_shard(&path).unwrap().collect();
    assert_eq!(read.unwrap(), rows);

    let mut writer = ShardWriter::new(&path, &records::provenances()).unwrap();
    rows.into_iter()
        .try_for_each(|row| writer.push(row))
        .unwrap();
    let message = super::chain(&writer.finish().unwrap_err());
    assert!(
        message.contains(
            "row 1, column `draw_ids, draw_counts`: the file was begun without these columns"
        ),
        "{message}"
    );
}

#[test]
fn a_row_that_breaks_the_rules_is_never_stored() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard-00000.parquet");
    let mut rows = records::signals(40, 3, 4);
    rows[35].provenance = 2;
    let error = write_shard(&path, &rows, &records::provenances()).unwrap_err();
    let message = super::chain(&error);
    assert!(
        message.contains("row 3, column `provenance`: 2 is not an index into the 2 entries"),
        "{message}"
    );
    rows[35].provenance = 0;
    rows[35].rows.truncate(2);
    let error = write_shard(&path, &rows, &records::provenances()).unwrap_err();
    assert!(
        matches!(&error, Error::InFile { source, .. } if matches!(**source, Error::BadSignal { .. })),
        "{error:?}"
    );
    let mut values = records::sequence_values()
        .new_tree(&mut TestRunner::deterministic())
        .unwrap()
        .current();
    (values.tokens, values.confidence, values.expected) = (2, vec![0.5; 2], vec![0.5; 1]);
    let message = super::chain(&write_shard(&path, &[values], &[]).unwrap_err());
    assert!(
        message.contains("row 0, column `expected`: the list has 1 entries, and 2 are expected"),
        "{message}"
    );
    assert!(!path.exists());
}
