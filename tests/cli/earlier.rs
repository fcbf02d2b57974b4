//! Outputs in `earlier/`: taken back when a setting is changed back, listed and deleted by `clean`, and announced by a dry
//! run, which writes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::fixture::{Run, interrupt};

const RATE: &str = "learning_rate = 1e-2";
const OTHER_RATE: &str = "learning_rate = 2e-2";

/// Runs a command with `--json`, which must succeed, and collects its events.
fn events(run: &Run, arguments: &[&str]) -> Vec<Value> {
    let output = run.potstill(&[arguments, &["--json"]].concat());
    assert_eq!(output.code, 0, "{}", output.stderr);
    let lines = output.stdout.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The stages of the events with this name.
fn stages(events: &[Value], name: &str) -> BTreeSet<String> {
    let of = events.iter().filter(|event| event["event"] == name);
    of.map(|event| event["stage"].as_str().unwrap().to_owned())
        .collect()
}

/// The folders of `earlier/` that the events with this name have.
fn folders(events: &[Value], name: &str) -> BTreeSet<String> {
    let of = events.iter().filter(|event| event["event"] == name);
    of.map(|event| event["path"].as_str().unwrap().to_owned())
        .collect()
}

/// What is published now.
fn current(run: &Run) -> BTreeMap<String, Vec<u8>> {
    let mut files = run.published();
    files.retain(|name, _| !name.starts_with("earlier/") && name != "run.toml");
    files
}

/// Every file and folder below a folder, with its size and time of change.
fn tree(folder: &Path) -> BTreeMap<String, (u64, Option<SystemTime>)> {
    let mut all = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for path in entries.map(|entry| entry.unwrap().path()) {
            let metadata = fs::symlink_metadata(&path).unwrap();
            let found = (metadata.len(), metadata.modified().ok());
            all.insert(path.display().to_string(), found);
            if metadata.is_dir() {
                folders.push(path);
            }
        }
    }
    all
}

/// Compares what a dry run says with what the run then does. Returns the events of the run.
fn dry_run_is_true(run: &Run, what: &str) -> Vec<Value> {
    let root = run.path("");
    let before = tree(&root);
    let dry = events(run, &["run", "run.toml", "--dry-run"]);
    assert_eq!(tree(&root), before, "{what}: a dry run writes nothing");
    let real = events(run, &["run", "run.toml"]);
    let is_certain = |event: &&Value| event["because"].is_null();
    let of_name = dry.iter().filter(|event| event["event"] == "would_run");
    let (certain, dependent): (Vec<&Value>, Vec<&Value>) = of_name.partition(is_certain);
    let names = |events: Vec<&Value>| -> BTreeSet<String> {
        let names = events.into_iter().map(|event| event["stage"].as_str());
        names.map(|name| name.unwrap().to_owned()).collect()
    };
    let (certain, dependent) = (names(certain), names(dependent));
    let would_run: BTreeSet<String> = certain.union(&dependent).cloned().collect();
    // A training that `tune` has made is published without being started.
    let ran = stages(&real, "finished");
    assert!(certain.is_subset(&ran), "{what}: {certain:?} and {ran:?}");
    assert!(
        ran.is_subset(&would_run),
        "{what}: {ran:?} and {would_run:?}"
    );
    let would_restore = stages(&dry, "would_restore");
    let restored = stages(&real, "restored");
    assert!(
        would_restore.is_subset(&restored),
        "{what}: {would_restore:?}"
    );
    let more: BTreeSet<String> = restored.difference(&would_restore).cloned().collect();
    assert!(more.is_subset(&dependent), "{what}: {more:?}");
    let (would_keep, kept) = (folders(&dry, "would_keep"), folders(&real, "kept"));
    assert!(
        kept.is_subset(&would_keep),
        "{what}: {kept:?} and {would_keep:?}"
    );
    for event in dry.iter().filter(|event| event["event"] == "would_keep") {
        // Only output that turns out to be up to date is not kept.
        let stage = event["stage"].as_str().unwrap();
        let is_kept = kept.contains(event["path"].as_str().unwrap());
        let is_current = stages(&real, "up_to_date").contains(stage);
        assert!(is_kept || is_current, "{what}: {event}");
    }
    let up_to_date = stages(&dry, "up_to_date");
    assert!(up_to_date.is_subset(&stages(&real, "up_to_date")), "{what}");
    real
}

#[test]
fn a_dry_run_says_what_the_run_then_does() {
    let run = Run::new();
    let ran = |events: &[Value]| stages(events, "finished");
    let all = ran(&dry_run_is_true(&run, "fresh"));
    assert!(all.contains("train sft") && all.contains("report"));
    assert!(ran(&dry_run_is_true(&run, "finished")).is_empty());
    let first = current(&run);

    run.edit(RATE, OTHER_RATE);
    let changed = dry_run_is_true(&run, "a changed rate");
    assert!(ran(&changed).contains("train sft"));
    assert!(!ran(&changed).contains("curate"));
    assert_eq!(folders(&changed, "kept").len(), 3);
    run.edit(OTHER_RATE, RATE);
    let back = dry_run_is_true(&run, "changed back");
    assert_eq!(ran(&back), BTreeSet::new());
    let restored = ["report", "train sft", "train student"].map(str::to_owned);
    assert_eq!(stages(&back, "restored"), BTreeSet::from(restored));
    assert!(first == current(&run));

    run.write_prompts(15);
    dry_run_is_true(&run, "more prompts");
    run.write_prompts(12);
    let back = dry_run_is_true(&run, "fewer prompts again");
    assert!(!ran(&back).iter().any(|stage| stage.starts_with("train")));
    assert!(first == current(&run));

    run.edit(
        RATE,
        "learning_rate = 1e-2\ncontrols = [\"sft\", \"same_token\"]",
    );
    let controls = ran(&dry_run_is_true(&run, "a further control"));
    assert!(controls.contains("train same_token") && !controls.contains("train student"));
    run.edit(RATE, "learning_rate = 1e-2\nseeds = 2");
    let seeds = ran(&dry_run_is_true(&run, "more seeds"));
    assert!(seeds.contains("train student-2") && !seeds.contains("train student"));

    fs::remove_dir_all(run.path("runs/tiny/completions")).unwrap();
    dry_run_is_true(&run, "a deleted table");
    fs::remove_dir_all(run.path("runs/tiny/students/sft/export")).unwrap();
    dry_run_is_true(&run, "a deleted export");
    run.edit("resamples = 100", "resamples = 120");
    let report = ran(&dry_run_is_true(&run, "another number of resamples"));
    assert_eq!(report, BTreeSet::from(["report".to_owned()]));

    run.edit(RATE, "learning_rates = [1e-3, 1e-2]");
    run.edit("test = 0.4", "dev = 0.3\ntest = 0.3");
    dry_run_is_true(&run, "learning rates to choose from");
    run.edit("[1e-3, 1e-2]", "[1e-3, 2e-3]");
    dry_run_is_true(&run, "another rate");
    run.edit("[1e-3, 2e-3]", "[1e-3, 1e-2]");
    let back = ran(&dry_run_is_true(&run, "the first rates again"));
    assert!(
        !back.iter().any(|stage| stage.starts_with("train")),
        "{back:?}"
    );
}

/// Settings of each stage are changed and changed back: nothing is computed again.
#[test]
fn what_is_changed_back_is_not_computed_again() {
    let run = Run::new();
    run.run();
    let first = current(&run);
    let changes = [
        (
            "columns = { text = \"text\" }",
            "columns = { text = \"text\" }\nlimit = 9",
        ),
        ("max_new_tokens = 12", "max_new_tokens = 10"),
        ("signals = { top_k = 6 }", "signals = { top_k = 5 }"),
        ("test = 0.4", "test = 0.5"),
        ("layers = { every = 2 }", "layers = [1]"),
        ("batch = 4", "batch = 3"),
        ("[eval]", "[export]\ndtype = \"bf16\"\n\n[eval]"),
        ("resamples = 100", "resamples = 90"),
        ("seed = 3", "seed = 4"),
    ];
    for (from, to) in changes {
        run.edit(from, to);
        let changed = events(&run, &["run", "run.toml"]);
        assert!(!stages(&changed, "finished").is_empty(), "{to}");
        run.edit(to, from);
        let back = events(&run, &["run", "run.toml"]);
        assert_eq!(stages(&back, "started"), BTreeSet::new(), "{to}");
        assert!(!stages(&back, "restored").is_empty(), "{to}");
        assert!(first == current(&run), "{to}");
    }
    // The page of an earlier report is complete in its folder.
    let earlier = fs::read_dir(run.path("runs/tiny/earlier")).unwrap();
    let mut reports = earlier.map(|entry| entry.unwrap().path().join("report.html"));
    assert!(reports.any(|page| page.is_file()));
}

#[test]
fn other_names_and_places_of_the_same_files_change_nothing() {
    let run = Run::new();
    run.edit("[student]\n", "[student]\npath = \"model\"\n");
    run.edit("template = \"plain\"", "template = \"a.jinja\"");
    let template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}";
    run.write("a.jinja", template);
    run.run();
    let first = current(&run);
    fs::rename(run.path("prompts.jsonl"), run.path("other.jsonl")).unwrap();
    run.edit("prompts.jsonl", "other.jsonl");
    fs::create_dir_all(run.path("models")).unwrap();
    fs::rename(run.path("model"), run.path("models/teacher")).unwrap();
    run.edit("path = \"model\"", "path = \"models/teacher\"");
    fs::rename(run.path("a.jinja"), run.path("b.jinja")).unwrap();
    run.edit("a.jinja", "b.jinja");
    let again = run.run();
    assert!(again.stderr.contains("nothing to do"), "{}", again.stderr);
    let text = fs::read_to_string(run.path("run.toml")).unwrap();
    fs::create_dir_all(run.path("jobs")).unwrap();
    let moved = ["other.jsonl", "models/teacher", "b.jinja"]
        .iter()
        .fold(text, |text, path| {
            text.replace(&format!("\"{path}\""), &format!("\"../{path}\""))
        });
    run.write("jobs/moved.toml", &moved);
    let again = run.potstill(&["run", "jobs/moved.toml"]);
    assert!(again.stderr.contains("nothing to do"), "{}", again.stderr);
    fs::rename(run.path("runs/tiny"), run.path("elsewhere")).unwrap();
    let again = run.potstill(&["run", "run.toml", "--run-dir", "elsewhere"]);
    assert!(again.stderr.contains("nothing to do"), "{}", again.stderr);
    fs::rename(run.path("elsewhere"), run.path("runs/tiny")).unwrap();
    assert!(first == current(&run));
}

#[test]
fn given_answers_do_not_depend_on_the_name_of_their_file() {
    let run = Run::new();
    let line = |i: i32| format!("{{\"q\":\"Story {i}\",\"a\":\"once {i}\"}}\n");
    run.write("prompts.jsonl", &(0..12).map(line).collect::<String>());
    run.edit(
        "columns = { text = \"text\" }",
        "columns = { instruction = \"q\", output = \"a\" }\nanswers = \"given\"",
    );
    run.edit("signals = { top_k = 6 }\n", "");
    run.edit("[curate]", "[score]\ntop_k = 6\n\n[curate]");
    dry_run_is_true(&run, "fresh");
    fs::rename(run.path("prompts.jsonl"), run.path("other.jsonl")).unwrap();
    run.edit("prompts.jsonl", "other.jsonl");
    let again = run.run();
    assert!(again.stderr.contains("nothing to do"), "{}", again.stderr);
    // Distributions that `score` wrote give way to those of another number, and come back.
    run.edit("top_k = 6", "top_k = 5");
    dry_run_is_true(&run, "other distributions");
    run.edit("top_k = 5", "top_k = 6");
    let back = dry_run_is_true(&run, "the first distributions again");
    assert!(stages(&back, "restored").contains("score"));
    assert_eq!(stages(&back, "started"), BTreeSet::new());
}

/// Waits until the training has a checkpoint, and interrupts it.
fn interrupted_training(run: &Run) {
    let child = run.start(&["run", "run.toml"]);
    let began = Instant::now();
    let checkpoints = run.path("runs/tiny/students/student/checkpoints");
    let has_checkpoint = || fs::read_dir(&checkpoints).is_ok_and(|entries| entries.count() > 0);
    while !has_checkpoint() {
        assert!(began.elapsed() < Duration::from_secs(120));
        std::thread::sleep(Duration::from_millis(5));
    }
    let (code, stderr) = interrupt(child);
    assert_eq!(code, Some(1), "{stderr}");
}

fn newest_step(run: &Run, folder: &str) -> u64 {
    let entries = fs::read_dir(run.path(folder).join("checkpoints")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let steps = names.filter_map(|name| name.strip_prefix("step-")?.parse().ok());
    steps.max().unwrap()
}

#[test]
fn an_interrupted_training_goes_on_when_its_settings_come_back() {
    let run = Run::new();
    run.edit("steps = 6", "steps = 400");
    run.edit("checkpoint_every = 2", "checkpoint_every = 20");
    let whole = Run::new();
    for part in ["steps = 6", "checkpoint_every = 2"] {
        let to = part.replace("= 6", "= 400").replace("= 2", "= 20");
        whole.edit(part, &to);
    }
    whole.run();
    interrupted_training(&run);
    let step = newest_step(&run, "runs/tiny/students/student");
    assert!(step < 400);
    let dry = events(&run, &["run", "run.toml", "--dry-run"]);
    let train = |event: &&Value| event["event"] == "would_run" && event["stage"] == "train student";
    assert_eq!(dry.iter().find(train).unwrap()["from_step"], step);

    run.edit("steps = 400", "steps = 4");
    let changed = dry_run_is_true(&run, "fewer steps");
    let kept = folders(&changed, "kept");
    let entry = kept.iter().find(|path| path.contains("/train-student-"));
    let listed = run.potstill(&["clean", "run.toml"]);
    assert_eq!(listed.code, 0, "{}", listed.stderr);
    let mut line = listed.stdout.lines().rev();
    let line = line.find(|line| line.starts_with("earlier/train-student-"));
    let line = line.unwrap();
    let differs = line.ends_with("unfinished; `train.checkpoint_every` is 20, now 2")
        || line.ends_with("unfinished; `train.schedule.steps` is 400, now 4");
    assert!(differs, "{line}");
    assert!(entry.is_some());

    run.edit("steps = 4", "steps = 400");
    let dry = events(&run, &["run", "run.toml", "--dry-run"]);
    assert!(stages(&dry, "would_restore").contains("train student"));
    assert_eq!(dry.iter().find(train).unwrap()["from_step"], step);
    let back = dry_run_is_true(&run, "the first steps again");
    assert!(stages(&back, "restored").contains("train student"));
    let is_training = |event: &&Value| {
        let is_of_it = event["event"] == "progress" && event["stage"] == "train student";
        // Before its first step the training reads all rows.
        is_of_it && event["done"] != 0
    };
    // Progress is shown once a second, so a quick training shows none after its start.
    if let Some(event) = back.iter().find(is_training) {
        let first = event["done"].as_u64().unwrap();
        assert!(first > step, "{first} and {step}");
    }
    assert!(current(&whole) == current(&run));
}

#[test]
fn clean_lists_and_deletes_what_is_not_current() {
    let run = Run::new();
    let none = run.potstill(&["clean", "run.toml"]);
    assert_eq!(
        (none.code, none.stdout.contains("nothing to delete")),
        (0, true)
    );
    assert!(!run.path("runs").exists());
    run.run();
    let none = run.potstill(&["clean", "run.toml"]);
    assert!(none.stdout.contains("nothing to delete"), "{}", none.stdout);
    run.edit(RATE, OTHER_RATE);
    run.run();
    fs::create_dir_all(run.path("runs/tiny/.work/draft-eval-student/out")).unwrap();
    run.write("runs/tiny/.work/draft-eval-student/out/a", "abc");
    let listed = run.potstill(&["clean", "run.toml"]);
    assert_eq!(listed.code, 0, "{}", listed.stderr);
    let line = |start: &str| {
        let mut lines = listed.stdout.lines();
        lines
            .find(|line| line.starts_with(start))
            .unwrap_or_else(|| panic!("{}", listed.stdout))
    };
    let trained = line("earlier/train-student-");
    assert!(
        trained.ends_with("`train.schedule.learning_rate` is 0.01, now 0.02"),
        "{trained}"
    );
    assert!(line("earlier/report-").contains("other `students/"));
    assert!(line(".work/draft-eval-student").contains("interrupted"));
    assert!(
        listed
            .stdout
            .contains("hint: `potstill clean run.toml --yes` deletes them")
    );

    // Nothing is deleted while another process uses the directory.
    let lock = fs::File::open(run.path("runs/tiny/.work/lock")).unwrap();
    lock.lock().unwrap();
    let refused = run.potstill(&["clean", "run.toml", "--yes"]);
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!(refused.stderr.contains("another potstill process uses"));
    // A dry run needs no lock.
    let dry = run.potstill(&["run", "run.toml", "--dry-run"]);
    assert_eq!(dry.code, 0, "{}", dry.stderr);
    let check = run.potstill(&["check", "run.toml", "--dry-run"]);
    assert_eq!(check.code, 0, "{}", check.stderr);
    drop(lock);

    let before = current(&run);
    let deleted = events(&run, &["clean", "run.toml", "--yes"]);
    let of: Vec<&Value> = deleted
        .iter()
        .filter(|e| e["event"] == "earlier_output")
        .collect();
    assert_eq!(of.len(), 4);
    assert!(
        of.iter()
            .all(|event| event["deleted"] == true && event["bytes"].as_u64() > Some(0))
    );
    let mut text = deleted.iter().filter_map(|event| event["text"].as_str());
    assert!(
        text.next_back()
            .unwrap()
            .starts_with("deleted 4 folders, which freed ")
    );
    assert!(before == current(&run));
    assert_eq!(
        fs::read_dir(run.path("runs/tiny/earlier")).unwrap().count(),
        0
    );
    assert!(run.run().stderr.contains("nothing to do"));
    run.edit(OTHER_RATE, RATE);
    let back = events(&run, &["run", "run.toml"]);
    assert!(stages(&back, "started").contains("train student"));
}

/// The journal of a collection that was interrupted belongs to its settings: it is kept as long as they hold.
#[test]
fn clean_keeps_the_answers_that_the_run_goes_on_with() {
    let run = Run::new();
    run.write_prompts(200);
    let mut child = run.start(&["run", "run.toml"]);
    let began = Instant::now();
    let journal = || {
        let work = fs::read_dir(run.path("runs/tiny/.work")).ok()?;
        let mut folders = work.map(|entry| entry.unwrap().path());
        folders.find(|path| path.to_string_lossy().contains("/collect-"))
    };
    let bytes = || journal().and_then(|path| fs::metadata(path.join("journal.bin")).ok());
    while bytes().is_none_or(|metadata| metadata.len() < 1000) {
        assert!(child.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let before = tree(&run.path("runs/tiny"));
    let dry = run.potstill(&["run", "run.toml", "--dry-run"]);
    assert_eq!(dry.code, 0, "{}", dry.stderr);
    assert_eq!(before, tree(&run.path("runs/tiny")));
    let deleted = run.potstill(&["clean", "run.toml", "--yes"]);
    assert_eq!(deleted.code, 0, "{}", deleted.stderr);
    assert!(journal().is_some());
    run.edit("max_new_tokens = 12", "max_new_tokens = 3");
    let listed = run.potstill(&["clean", "run.toml", "--yes"]);
    assert!(
        listed.stdout.contains(".work/collect-"),
        "{}",
        listed.stdout
    );
    assert!(journal().is_none());
}

#[test]
fn an_earlier_output_that_is_incomplete_is_refused_by_name() {
    let run = Run::new();
    run.run();
    run.edit("max_new_tokens = 12", "max_new_tokens = 10");
    let changed = events(&run, &["run", "run.toml"]);
    let kept = folders(&changed, "kept");
    let entry = kept.iter().find(|path| path.contains("/collect-")).unwrap();
    let shard = run.path(entry).join("completions/shard-00000.parquet");
    fs::write(shard, "cut short").unwrap();
    run.edit("max_new_tokens = 10", "max_new_tokens = 12");
    for arguments in [&["run", "run.toml", "--dry-run"][..], &["run", "run.toml"]] {
        let output = run.potstill(arguments);
        assert_eq!(output.code, 1, "{}", output.stderr);
        let name = "completions/shard-00000.parquet is 9 bytes long";
        assert!(output.stderr.contains(name), "{}", output.stderr);
        assert!(output.stderr.contains("hint: delete "), "{}", output.stderr);
    }
    fs::remove_dir_all(run.path(entry)).unwrap();
    run.run();
}
