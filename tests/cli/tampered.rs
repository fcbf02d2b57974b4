//! Files of a run directory that were changed or damaged after they were published.

use std::fs;

use crate::fixture::{CommandOutput, Run};

/// Flips one bit of a file of the run directory, calls `check`, and writes the file as it was.
fn with_flipped_bit(run: &Run, name: &str, bit: usize, check: impl FnOnce()) {
    let path = run.path(&format!("runs/tiny/{name}"));
    let bytes = fs::read(&path).unwrap();
    let mut damaged = bytes.clone();
    damaged[bit / 8] ^= 1 << (bit % 8);
    fs::write(&path, damaged).unwrap();
    check();
    fs::write(&path, bytes).unwrap();
}

fn bits(run: &Run, name: &str) -> usize {
    let path = run.path(&format!("runs/tiny/{name}"));
    fs::metadata(path).unwrap().len() as usize * 8
}

fn remove(run: &Run, name: &str) {
    let path = run.path(&format!("runs/tiny/{name}"));
    match path.is_dir() {
        true => fs::remove_dir_all(path).unwrap(),
        false => fs::remove_file(path).unwrap(),
    }
}

/// The command failed and named the file.
fn assert_refused(output: &CommandOutput, name: &str) {
    assert_eq!(output.code, 1, "{}", output.stderr);
    assert!(output.stderr.contains(name), "{}", output.stderr);
    let damaged = output.stderr.contains("was changed or damaged")
        || output.stderr.contains("is damaged or was changed");
    assert!(damaged, "{}", output.stderr);
    assert!(output.stderr.contains("\nhint: "), "{}", output.stderr);
}

/// Bits all over the shard: header, pages, footer, and the footer's length.
#[test]
fn training_refuses_a_shard_of_signals_with_a_flipped_bit() {
    let run = Run::new();
    for stage in ["import", "collect", "curate"] {
        let output = run.potstill(&[stage, "run.toml"]);
        assert_eq!(output.code, 0, "{}", output.stderr);
    }
    let shard = "signals/shard-00000.parquet";
    let bits = bits(&run, shard);
    for position in 0..16 {
        let bit = (position * bits / 16 + 13 * position) % bits;
        with_flipped_bit(&run, shard, bit, || {
            assert_refused(&run.potstill(&["train", "run.toml"]), shard);
        });
    }
    assert!(!run.path("runs/tiny/students/student/checkpoints").exists());
    let trained = run.potstill(&["train", "run.toml"]);
    assert_eq!(trained.code, 0, "{}", trained.stderr);
}

#[test]
fn every_reader_refuses_a_damaged_file_by_name() {
    let run = Run::new();
    run.run();
    let student = "students/student";
    let last = format!("{student}/checkpoints/step-00000006");
    // The damaged file, the output that is made from it, and the stage that makes it.
    for (file, output, stage) in [
        ("prompts/shard-00000.parquet", "train", "curate"),
        ("completions/shard-00000.parquet", "train", "curate"),
        ("train/shard-00000.parquet", student, "train"),
        (
            &format!("{last}/model.safetensors"),
            &format!("{student}/export"),
            "export",
        ),
        (
            &format!("{last}/config.json"),
            &format!("{student}/export"),
            "export",
        ),
        (
            &format!("{student}/export/model.safetensors"),
            &format!("{student}/eval"),
            "eval",
        ),
        (
            &format!("{student}/export/tokenizer.json"),
            &format!("{student}/eval"),
            "eval",
        ),
        ("test/shard-00000.parquet", "students/base/eval", "eval"),
        (
            &format!("{student}/eval/test/samples.parquet"),
            "report.html",
            "report",
        ),
        ("curation.json", "report.html", "report"),
        (&format!("{student}/metrics.jsonl"), "report.html", "report"),
        ("ledger.jsonl", "report.html", "report"),
    ] {
        let copy = run.path("copy");
        copy_folder(&run.path("runs"), &copy);
        remove(&run, output);
        if output == "report.html" {
            remove(&run, "_manifest.json");
        }
        with_flipped_bit(&run, file, bits(&run, file) / 2 + 3, || {
            assert_refused(&run.potstill(&[stage, "run.toml"]), file);
        });
        fs::remove_dir_all(run.path("runs")).unwrap();
        fs::rename(copy, run.path("runs")).unwrap();
    }
    let shard = "completions/shard-00000.parquet";
    with_flipped_bit(&run, shard, 999, || {
        assert_refused(&run.potstill(&["render", "run.toml"]), shard);
    });
}

fn copy_folder(from: &std::path::Path, to: &std::path::Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy_folder(&path, &target),
            false => drop(fs::copy(&path, &target).unwrap()),
        }
    }
}

#[test]
fn a_manifest_of_another_schema_or_with_a_changed_field_is_refused() {
    let run = Run::new();
    run.run();
    let path = run.path("runs/tiny/signals_manifest.json");
    assert!(!path.exists());
    let path = run.path("runs/tiny/completions_manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{text}");
        fs::write(&path, text.replace(from, to)).unwrap();
        let output = run.potstill(&["run", "run.toml"]);
        assert_eq!(output.code, 1, "{}", output.stderr);
        assert!(
            output.stderr.contains("completions_manifest.json"),
            "{}",
            output.stderr
        );
        output.stderr
    };
    let later = with("\"schema\": 1", "\"schema\": 99");
    assert!(
        later.contains("it has schema 99, and this one reads schema 1"),
        "{later}"
    );
    let counted = with("\"answers\": 24", "\"answers\": 25");
    assert!(counted.contains("is damaged or was changed"), "{counted}");
    let measured = with("\"sampling_z\": ", "\"sampling_z\": 1");
    assert!(measured.contains("is damaged or was changed"), "{measured}");
    fs::write(&path, &text).unwrap();
    assert!(run.run().stderr.contains("nothing to do"));
}

/// A stage hashes each file that it reads once, says so, and logs the time. A run with nothing to do hashes none.
#[test]
fn a_run_with_nothing_to_do_reads_manifests_only() {
    let run = Run::new();
    run.run();
    let idle = run.potstill(&["run", "run.toml", "--verbose"]);
    assert!(idle.stderr.contains("nothing to do"), "{}", idle.stderr);
    assert!(
        !idle.stderr.contains("with their manifests"),
        "{}",
        idle.stderr
    );
    remove(&run, "students/student/export");
    let busy = run.potstill(&["export", "run.toml", "--verbose"]);
    assert_eq!(busy.code, 0, "{}", busy.stderr);
    assert!(
        busy.stderr.contains("export student: compared "),
        "{}",
        busy.stderr
    );
    let ledger = fs::read_to_string(run.path("runs/tiny/ledger.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(ledger.lines().last().unwrap()).unwrap();
    assert_eq!(last["stage"], "export student");
    assert!(last["verify_seconds"].as_f64().unwrap() > 0.0, "{last}");
}
