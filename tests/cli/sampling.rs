//! The sampling test of `collect` and `score`, on the quickstart's teacher and with faults planted.

use std::fs;
use std::path::{Path, PathBuf};

use potstill::datasets::{
    FolderRows, Manifest, Signal, hash_file, read_footer, read_shard, shards, write_shard,
};
use potstill::eval::{Evidence, SamplingCheck, SamplingLaw, SamplingTally, conclude};
use serde_json::Value;

use crate::fixture::{CommandOutput, Run};

fn quickstart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/quickstart")
}

/// A run of the quickstart's teacher on 150 problems.
fn run(collect: &str) -> Run {
    let run = Run::new();
    let folder = quickstart();
    run.write(
        "run.toml",
        &format!(
            r#"[run]
name = "tiny"
seed = 17

[import]
path = "{folder}/problems.jsonl"
limit = 150
columns = {{ question = "question", answer = "answer" }}

[teacher]
path = "{folder}/teacher"

[collect]
samples = 1
max_new_tokens = 96
batch = 128
reasoning = {{ open = "<think>", close = "</think>" }}
{collect}

[curate]
keep = "all"

[student]
layers = {{ every = 2 }}

[train]
steps = 2
"#,
            folder = folder.display()
        ),
    );
    stage(&run, "import");
    run
}

fn stage(run: &Run, name: &str) -> CommandOutput {
    let output = run.potstill(&[name, "run.toml"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    output
}

fn measure(run: &Run, table: &str, name: &str) -> f64 {
    let path = run.path(&format!("runs/tiny/{table}_manifest.json"));
    let manifest: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    manifest["measures"][name].as_f64().unwrap()
}

#[test]
fn collected_signals_pass_and_a_shift_by_one_is_a_doubt() {
    let run = run("signals = { top_k = 16 }");
    let output = stage(&run, "collect");
    assert!(!output.stderr.contains("warning"), "{}", output.stderr);
    let z = measure(&run, "completions", "sampling_z");
    assert!(z.abs() < 3.0, "{z}");
    assert!(measure(&run, "completions", "sampling_positions") > 3000.0);

    let mut tally = SamplingTally::new(SamplingLaw::PLAIN, 16);
    for signal in FolderRows::<Signal>::open(&run.path("runs/tiny/signals")).unwrap() {
        let mut signal = signal.unwrap();
        shift_rows(&mut signal);
        tally.add(&signal, &[]);
    }
    let shifted: SamplingCheck = tally.check().unwrap();
    let evidence = Evidence {
        sampling: Some(&shifted),
        ..Evidence::of(&[], &[])
    };
    let doubts = conclude(&evidence).doubts.join("\n");
    assert!(doubts.contains("a shift by one"), "{doubts}");
}

/// Moves each distribution to the next position, and the last one to the first.
fn shift_rows(signal: &mut Signal) {
    let mut rows: Vec<_> = signal.rows.rows().map(|row| row.to_row()).collect();
    rows.rotate_right(1);
    signal.rows = rows.into_iter().collect();
}

/// The text is drawn at another temperature than the run file says, as with a stale file or a server's own default.
#[test]
fn text_of_another_temperature_is_a_warning() {
    let run = run("temperature = 1.5\n\n[score]\ntop_k = 16");
    stage(&run, "collect");
    let right = stage(&run, "score");
    assert!(!right.stderr.contains("warning"), "{}", right.stderr);
    let floor = measure(&run, "signals", "sampling_floor_nats");
    assert!(floor > 0.0, "{floor}");
    run.edit("temperature = 1.5", "temperature = 1.0");
    fs::remove_dir_all(run.path("runs/tiny/signals")).unwrap();
    let wrong = stage(&run, "score");
    let warning = "warning: score: The answers are not a sample of the stored distributions";
    assert!(wrong.stderr.contains(warning), "{}", wrong.stderr);
    assert!(measure(&run, "signals", "sampling_z") > 4.0);
}

/// Another model than the one that wrote the answers scores them: the same weights with other rotary frequencies.
#[test]
fn distributions_of_another_teacher_are_a_warning() {
    let run = run("\n[score]\ntop_k = 16");
    stage(&run, "collect");
    let teacher = quickstart().join("teacher");
    fs::create_dir(run.path("other")).unwrap();
    for file in fs::read_dir(&teacher).unwrap() {
        let file = file.unwrap().path();
        let copy = run.path("other").join(file.file_name().unwrap());
        fs::copy(&file, copy).unwrap();
    }
    let config = fs::read_to_string(teacher.join("config.json")).unwrap();
    let theta = "\"rope_theta\": 10000.0";
    assert!(config.contains(theta), "{config}");
    let changed = config.replace(theta, "\"rope_theta\": 1000.0");
    run.write("other/config.json", &changed);
    run.edit(&teacher.display().to_string(), "other");
    let output = stage(&run, "score");
    assert!(output.stderr.contains("another model"), "{}", output.stderr);
    assert!(measure(&run, "signals", "sampling_z") > 10.0);
}

/// Distributions that were moved by one position after `collect` had tested them are a doubt in the report.
#[test]
fn signals_that_were_shifted_on_disk_are_a_doubt_in_the_report() {
    let run = run("signals = { top_k = 16 }");
    stage(&run, "collect");
    for shard in shards(&run.path("runs/tiny/signals")).unwrap() {
        let footer = read_footer(&shard).unwrap();
        let mut signals = Vec::new();
        for signal in read_shard::<Signal>(&shard).unwrap() {
            let mut signal = signal.unwrap();
            let targets: Vec<u32> = (signal.loss_positions())
                .map(|at| signal.token_ids[at])
                .collect();
            shift_rows(&mut signal);
            // Each support contains its target token, so the moved ones get it too.
            signal.rows.change_rows(|index, row| {
                if !row.ids.contains(&targets[index]) {
                    row.ids.push(targets[index]);
                    row.logprobs.push(-60.0);
                }
            });
            signals.push(signal);
        }
        write_shard(&shard, &signals, &footer.provenance).unwrap();
        // The stages compare the files with the manifest, so the fault is as if it had been there at publication.
        let table = run.path("runs/tiny/completions");
        let mut manifest = Manifest::read(&table).unwrap().unwrap();
        let name = format!("signals/{}", shard.file_name().unwrap().to_str().unwrap());
        manifest.files.insert(name, hash_file(&shard).unwrap());
        manifest.write(&table).unwrap();
    }
    for name in ["curate", "train", "export", "eval", "report"] {
        stage(&run, name);
    }
    let report = fs::read_to_string(run.path("runs/tiny/report.md")).unwrap();
    assert!(report.contains("a shift by one"), "{report}");
}
