//! A disk that is really full. The test runs itself again in a mount namespace of its own, with a small tmpfs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use potstill_datasets::{Error, Journal, Manifest, Signal, write_shard};

use super::chain;
use super::records;

/// Set for the run inside the namespace: where the small disk is.
const DISK: &str = "POTSTILL_TEST_FULL_DISK";
const NO_MOUNT: i32 = 77;

#[test]
fn a_full_disk_loses_nothing_that_was_stored() {
    if let Some(disk) = std::env::var_os(DISK) {
        return fill(&PathBuf::from(disk));
    }
    let disk = tempfile::tempdir().unwrap();
    let script = format!(
        r#"mount -t tmpfs -o size=256k none "$1" || exit {NO_MOUNT}; {DISK}="$1" exec "$2" --exact "$3""#
    );
    let run = |namespace: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(namespace)
            .args(["sh", "-c", &script, "sh"])
            .arg(disk.path());
        command
            .arg(std::env::current_exe().unwrap())
            .arg("store::full_disk::a_full_disk_loses_nothing_that_was_stored");
        command.output()
    };
    for namespace in [&["--mount"][..], &["--user", "--map-root-user", "--mount"]] {
        match run(namespace) {
            Ok(output) if output.status.success() => {
                assert!(
                    String::from_utf8_lossy(&output.stdout).contains("1 passed"),
                    "{output:?}"
                );
                return;
            }
            Ok(output) if output.status.code() == Some(101) => {
                panic!("{}", String::from_utf8_lossy(&output.stdout))
            }
            // No right to unshare or to mount.
            _ => {}
        }
    }
    eprintln!("skipped: a tmpfs cannot be mounted here");
}

fn fill(disk: &Path) {
    let path = disk.join("journal");
    let (mut journal, _) = Journal::open(&path).unwrap();
    let record = |index: usize| vec![index as u8; 10_000];
    let mut stored = 0;
    let error = loop {
        match journal.append(&record(stored)) {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
    };
    assert!(stored > 10);
    let message = chain(&error);
    let expected = format!(
        "cannot add a record to {}; the {stored} earlier records are safe: \
         No space left on device (os error 28)",
        path.display()
    );
    assert_eq!(message, expected);
    // The torn frame is gone already, a smaller record still fits, and nothing is lost on opening again.
    journal.append(&vec![7_u8; 10]).unwrap();
    drop(journal);
    let (mut journal, spans) = Journal::open(&path).unwrap();
    assert_eq!((spans.len(), journal.cut_bytes()), (stored + 1, 0));
    for (index, span) in spans[..stored].iter().enumerate() {
        assert_eq!(journal.read::<Vec<u8>>(*span).unwrap(), record(index));
    }

    fs::write(disk.join("rest"), vec![0; 1 << 20]).unwrap_err();
    let shard = disk.join("shard-00000.parquet");
    let error = write_shard(
        &shard,
        &records::signals(64, 100, 64),
        &records::provenances(),
    )
    .unwrap_err();
    assert!(
        matches!(error, Error::WriteShard { .. } | Error::Io { .. }),
        "{error:?}"
    );
    assert!(
        chain(&error).contains("No space left on device"),
        "{}",
        chain(&error)
    );
    assert!(!shard.exists());
    let rows = potstill_datasets::read_shard::<Signal>(&shard)
        .err()
        .unwrap();
    assert!(rows.to_string().starts_with("cannot open"), "{rows}");

    let manifest = Manifest {
        stage: "collect".into(),
        schema: 1,
        key: "k".repeat(10_000),
        settings: serde_json::Value::Null,
        inputs: Default::default(),
        files: Default::default(),
        counts: Default::default(),
        measures: Default::default(),
    };
    let folder = disk.join("completions");
    manifest.write(&folder).unwrap_err();
    assert_eq!(Manifest::read(&folder).unwrap(), None);
}
