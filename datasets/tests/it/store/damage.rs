//! Files that are cut, damaged, of another version or another table.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray, UInt32Array};
use arrow_schema::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use potstill_datasets::{
    Completion, Error, FinishReason, PROVENANCE_KEY, Record, SCHEMA_KEY, Signal, Usage,
    read_footer, read_shard, shards, write_shard,
};

use super::chain;
use super::records;

fn completion() -> Completion {
    Completion {
        prompt_id: "p".into(),
        sample_index: 0,
        reasoning: None,
        answer: "a".into(),
        tool_calls: vec![],
        finish_reason: FinishReason::Stop,
        usage: Usage {
            prompt_tokens: 1,
            completion_tokens: 1,
        },
        tokens: vec![],
        provenance: 0,
    }
}

/// Writes a batch as Potstill would not.
fn write_raw(dir: &Path, batch: &RecordBatch, footer: &[(&str, &str)]) -> PathBuf {
    let path = dir.join("shard-00000.parquet");
    let footer = footer
        .iter()
        .map(|(key, value)| KeyValue::new((*key).into(), (*value).to_owned()))
        .collect();
    let properties = WriterProperties::builder()
        .set_key_value_metadata(Some(footer))
        .build();
    let mut writer = ArrowWriter::try_new(
        File::create(&path).unwrap(),
        batch.schema(),
        Some(properties),
    )
    .unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
    path
}

/// The message without the folder, which differs from run to run.
fn refusal<R: Record>(path: &Path) -> String {
    let rows = read_shard::<R>(path).and_then(|rows| rows.collect::<Result<Vec<R>, _>>());
    let message = chain(&rows.err().unwrap());
    message.replace(&path.parent().unwrap().display().to_string(), "DIR")
}

const FOOTER: [(&str, &str); 2] = [(SCHEMA_KEY, "1"), (PROVENANCE_KEY, "[]")];

#[test]
fn a_shard_cut_at_any_byte_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard-00000.parquet");
    write_shard(&path, &records::signals(3, 2, 3), &records::provenances()).unwrap();
    let bytes = fs::read(&path).unwrap();
    for length in 0..bytes.len() {
        fs::write(&path, &bytes[..length]).unwrap();
        for error in [
            read_footer(&path).err().unwrap(),
            read_shard::<Signal>(&path).err().unwrap(),
        ] {
            assert!(
                matches!(error, Error::DamagedShard { .. }),
                "cut at byte {length}: {error:?}"
            );
        }
    }
    insta::assert_snapshot!(
        read_footer(&path).unwrap_err().to_string().replace(&dir.path().display().to_string(), "DIR"),
        @"
DIR/shard-00000.parquet is not a complete Parquet file (cut short, damaged, or not Parquet)
hint: delete it and run the stage that writes it again
"
    );
}

/// Parquet has no checksum of its own here (the manifest has), so a flipped byte may go unseen; it must not panic.
#[test]
fn a_flipped_byte_is_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard-00000.parquet");
    write_shard(&path, &records::signals(3, 2, 3), &records::provenances()).unwrap();
    let bytes = fs::read(&path).unwrap();
    let mut refused = 0;
    for index in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[index] ^= 0xff;
        fs::write(&path, &damaged).unwrap();
        let rows = read_shard::<Signal>(&path).and_then(|rows| rows.collect::<Result<Vec<_>, _>>());
        refused += usize::from(rows.is_err());
    }
    assert!(
        refused > bytes.len() / 2,
        "only {refused} of {} were seen",
        bytes.len()
    );
}

#[test]
fn a_later_version_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let batch = Completion::to_batch(&[completion()]).unwrap();
    let path = write_raw(
        dir.path(),
        &batch,
        &[(SCHEMA_KEY, "2"), (PROVENANCE_KEY, "?")],
    );
    insta::assert_snapshot!(
        refusal::<Completion>(&path),
        @"
DIR/shard-00000.parquet was written by a later Potstill: it has schema 2, and this one reads schema 1
hint: use the later Potstill; or, if there is none, the file was damaged: restore it from a copy
"
    );
}

#[test]
fn a_footer_that_is_not_ours_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let batch = Completion::to_batch(&[completion()]).unwrap();
    let path = write_raw(dir.path(), &batch, &[]);
    insta::assert_snapshot!(
        refusal::<Completion>(&path),
        @"
DIR/shard-00000.parquet has no `potstill.schema` in its footer, so Potstill did not write it
hint: move it out of the folder
"
    );
    let path = write_raw(
        dir.path(),
        &batch,
        &[(SCHEMA_KEY, "1"), (PROVENANCE_KEY, "{")],
    );
    insta::assert_snapshot!(
        refusal::<Completion>(&path),
        @"`potstill.provenance` in the footer of DIR/shard-00000.parquet cannot be read: invalid type: map, expected a sequence at line 1 column 0"
    );
    let path = write_raw(
        dir.path(),
        &batch,
        &[(SCHEMA_KEY, "one"), (PROVENANCE_KEY, "[]")],
    );
    insta::assert_snapshot!(
        refusal::<Completion>(&path),
        @"`potstill.schema` in the footer of DIR/shard-00000.parquet cannot be read: it is not a number"
    );
}

#[test]
fn wrong_columns_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard-00000.parquet");
    write_shard(&path, &[completion()], &records::provenances()).unwrap();
    insta::assert_snapshot!(
        refusal::<Signal>(&path),
        @"cannot use DIR/shard-00000.parquet: the column `token_ids` of a signals table must be List(non-null UInt32, field: 'element'), and it is absent"
    );

    let narrow = |column: ArrayRef| {
        let field = |name: &str, kind: DataType| Field::new(name, kind, false);
        let mut fields = vec![
            field("shard", DataType::UInt32),
            field("row", column.data_type().clone()),
        ];
        fields.push(field("prompt_id", DataType::Utf8));
        fields.push(field("sample_index", DataType::UInt32));
        let number: ArrayRef = Arc::new(UInt32Array::from(vec![0]));
        let text: ArrayRef = Arc::new(StringArray::from(vec!["p"]));
        RecordBatch::try_new(
            Arc::new(Schema::new(fields)),
            vec![number.clone(), column, text, number],
        )
        .unwrap()
    };
    let path = write_raw(
        dir.path(),
        &narrow(Arc::new(StringArray::from(vec!["0"]))),
        &FOOTER,
    );
    insta::assert_snapshot!(
        refusal::<potstill_datasets::Selected>(&path),
        @"cannot use DIR/shard-00000.parquet: the column `row` of a train table must be UInt32, and it is Utf8"
    );
    let path = write_raw(
        dir.path(),
        &narrow(Arc::new(UInt32Array::from(vec![0]))),
        &FOOTER,
    );
    insta::assert_snapshot!(
        refusal::<potstill_datasets::Dropped>(&path),
        @"cannot use DIR/shard-00000.parquet: the column `reason` of a dropped table must be Utf8, and it is absent"
    );
}

#[test]
fn illegal_values_are_refused_with_their_row() {
    let dir = tempfile::tempdir().unwrap();
    let rows = vec![completion(); 40];
    let batch = Completion::to_batch(&rows).unwrap();
    let with_column = |name: &str, column: ArrayRef| {
        let mut columns = batch.columns().to_vec();
        columns[batch.schema().index_of(name).unwrap()] = column;
        RecordBatch::try_new(batch.schema(), columns).unwrap()
    };
    let provenance = serde_json::to_string(&records::provenances()).unwrap();
    let footer = [(SCHEMA_KEY, "1"), (PROVENANCE_KEY, provenance.as_str())];
    // Row 35 is in the second batch that is read.
    let names = (0..40).map(|row| if row == 35 { "stopped" } else { "stop" });
    let bad = with_column(
        "finish_reason",
        Arc::new(StringArray::from_iter_values(names)),
    );
    insta::assert_snapshot!(
        refusal::<Completion>(&write_raw(dir.path(), &bad, &footer)),
        @"cannot use DIR/shard-00000.parquet: row 35, column `finish_reason`: `stopped` is not a reason to finish"
    );
    let bad = with_column("provenance", Arc::new(UInt32Array::from_iter_values(0..40)));
    insta::assert_snapshot!(
        refusal::<Completion>(&write_raw(dir.path(), &bad, &footer)),
        @"cannot use DIR/shard-00000.parquet: row 2, column `provenance`: 2 is not an index into the 2 entries of the footer"
    );
}

#[test]
fn a_folder_with_a_hole_or_a_stray_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let touch = |name: &str| fs::write(dir.path().join(name), "").unwrap();
    touch("results.json");
    touch("shard-00000.parquet.tmp");
    assert!(shards(dir.path()).unwrap().is_empty());
    touch("shard-00000.parquet");
    touch("shard-00001.parquet");
    assert_eq!(
        shards(dir.path()).unwrap(),
        [0, 1].map(|i| dir.path().join(format!("shard-0000{i}.parquet")))
    );
    touch("shard-00003.parquet");
    let message = shards(dir.path()).unwrap_err().to_string();
    assert!(
        message.contains("shard-00002.parquet is absent, but later shards exist"),
        "{message}"
    );
    for stray in ["shard-2.parquet", "other.parquet", "shard-+0002.parquet"] {
        touch(stray);
        let message = shards(dir.path()).unwrap_err().to_string();
        assert!(
            message.contains(&format!("{stray} does not have the name of a shard")),
            "{message}"
        );
        fs::remove_file(dir.path().join(stray)).unwrap();
    }
    let message = shards(&dir.path().join("none")).unwrap_err().to_string();
    assert!(message.starts_with("cannot list"), "{message}");
}
