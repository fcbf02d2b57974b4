use serde_json::json;

use super::*;

const RUN: &str = "[run]\nname = \"tiny\"\n[import]\npath = \"p\"\ncolumns = { text = \"t\" }\n[teacher]\npath = \"m\"\n[collect]\nsignals = { top_k = 4 }\n[student]\nlayers = { every = 2 }\n";

fn loaded(text: &str) -> Loaded {
    let path = PathBuf::from("tiny.toml");
    let settings = crate::run_file::parse(&path, text).unwrap();
    Loaded {
        settings,
        path,
        text: text.to_owned(),
        hub: BTreeMap::new(),
        gguf: BTreeMap::new(),
    }
}

/// An open run directory of the tiny run.
pub(super) fn open(root: &Path) -> RunDir {
    RunDir::open(root, &loaded(RUN), Access::Work).unwrap()
}

fn plan(version: u32) -> StagePlan {
    StagePlan {
        stage: "collect".to_owned(),
        home: "completions".to_owned(),
        outputs: ["signals", "completions", "notes.json"]
            .map(str::to_owned)
            .to_vec(),
        settings: json!({ "version": version }),
        inputs: BTreeMap::new(),
    }
}

/// Writes a draft and leaves it unpublished.
fn draft(dir: &RunDir, version: u32) {
    let out = dir.draft(&plan(version)).unwrap();
    for name in ["signals/a", "completions/a", "notes.json"] {
        fs::write(out.join(name), format!("{version}")).unwrap();
    }
}

fn publish(dir: &RunDir, version: u32, earlier: EarlierOutput) -> Vec<String> {
    draft(dir, version);
    dir.publish(&plan(version), earlier, Counts::new(), BTreeMap::new())
        .unwrap()
}

fn content(root: &Path, name: &str) -> String {
    fs::read_to_string(root.join(name)).unwrap_or_else(|_| "absent".to_owned())
}

/// Folder in which the output of a version is kept.
fn entry(version: u32) -> String {
    format!("earlier/collect-{}", short(&plan(version).key()))
}

#[test]
fn a_changed_stage_keeps_its_old_output_and_takes_it_back() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path();
    let dir = open(root);
    assert!(dir.published("completions").unwrap().is_none());
    assert!(publish(&dir, 1, EarlierOutput::Keep).is_empty());
    let manifest = dir.published("completions").unwrap().unwrap();
    assert_eq!(manifest.key, plan(1).key());
    assert_eq!(manifest.files.len(), 3);
    assert_eq!(publish(&dir, 2, EarlierOutput::Keep), [entry(1)]);
    assert_eq!(publish(&dir, 3, EarlierOutput::Keep), [entry(2)]);
    let mut names = dir.earlier_outputs("collect").unwrap();
    names.sort_by_key(|name| *name != entry(1));
    assert_eq!(names, [entry(1), entry(2)]);
    assert_eq!(content(root, &format!("{}/signals/a", entry(1))), "1");
    assert_eq!(content(root, "signals/a"), "3");

    let found = dir.find_earlier(&plan(1)).unwrap().unwrap();
    assert_eq!(found.manifest.as_ref().unwrap(), &manifest);
    assert_eq!(dir.restore(&plan(1), &found).unwrap(), [entry(3)]);
    assert_eq!(dir.published("completions").unwrap().unwrap(), manifest);
    for name in ["signals/a", "completions/a", "notes.json"] {
        assert_eq!(content(root, name), "1");
    }
    // What is taken back is not there twice.
    assert!(!dir.path(&entry(1)).exists());
    assert!(dir.find_earlier(&plan(1)).unwrap().is_none());

    assert!(publish(&dir, 4, EarlierOutput::Replace).is_empty());
    assert!(publish(&dir, 4, EarlierOutput::Keep).is_empty());
    assert_eq!(dir.earlier_outputs("collect").unwrap().len(), 2);
    assert_eq!(content(root, "notes.json"), "4");
    let left: Vec<_> = fs::read_dir(root.join(".work")).unwrap().collect();
    assert_eq!(left.len(), 1, "the lock alone: {left:?}");
}

/// A key that a user copied back by hand is not kept twice, and output without a manifest is not deleted.
#[test]
fn output_is_kept_once_and_without_a_manifest_under_another_name() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path();
    let dir = open(root);
    publish(&dir, 1, EarlierOutput::Keep);
    publish(&dir, 2, EarlierOutput::Keep);
    publish(&dir, 1, EarlierOutput::Keep);
    assert!(root.join(entry(1)).exists() && root.join(entry(2)).exists());
    assert_eq!(publish(&dir, 3, EarlierOutput::Keep), [entry(1)]);
    assert_eq!(content(root, &format!("{}/notes.json", entry(1))), "1");
    assert_eq!(dir.earlier_outputs("collect").unwrap().len(), 2);

    fs::remove_file(root.join("completions_manifest.json")).unwrap();
    let kept = publish(&dir, 4, EarlierOutput::Keep);
    assert_eq!(kept, ["earlier/collect-unknown-1"]);
    assert_eq!(
        content(root, "earlier/collect-unknown-1/completions/a"),
        "3"
    );
    // A user who deletes the folder wants the stage to run again; the rest of its output is kept.
    fs::remove_dir_all(root.join("completions")).unwrap();
    assert!(dir.published("completions").unwrap().is_none());
    let kept = publish(&dir, 5, EarlierOutput::Keep);
    assert_eq!(kept, ["earlier/collect-unknown-2"]);
    assert_eq!(content(root, "earlier/collect-unknown-2/signals/a"), "4");
    assert!(dir.published("completions").unwrap().is_some());
}

/// `score` writes `signals/` where `collect` wrote it before, and the other way round.
#[test]
fn an_output_of_another_stage_is_kept_with_its_own_manifest() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path();
    let dir = open(root);
    publish(&dir, 1, EarlierOutput::Keep);
    let without = StagePlan {
        outputs: vec!["completions".to_owned()],
        ..plan(2)
    };
    let score = StagePlan {
        stage: "score".to_owned(),
        home: "signals".to_owned(),
        outputs: vec!["signals".to_owned()],
        settings: json!({}),
        inputs: BTreeMap::new(),
    };
    let publish = |plan: &StagePlan| {
        let out = dir.draft(plan).unwrap();
        for output in &plan.outputs {
            fs::write(out.join(output).join("a"), &plan.stage).unwrap();
        }
        dir.publish(plan, EarlierOutput::Keep, Counts::new(), BTreeMap::new())
            .unwrap()
    };
    assert_eq!(publish(&without), [entry(1)]);
    assert_eq!(content(root, &format!("{}/signals/a", entry(1))), "1");
    assert!(publish(&score).is_empty());
    let found = dir.find_earlier(&plan(1)).unwrap().unwrap();
    let scored = format!("earlier/score-{}", short(&score.key()));
    assert_eq!(
        dir.restore(&plan(1), &found).unwrap(),
        [scored.clone(), entry(2)]
    );
    assert_eq!(content(root, &format!("{scored}/signals/a")), "score");
    assert_eq!(content(root, "signals/a"), "1");
    assert!(dir.published("signals").unwrap().is_none());
    assert!(dir.find_earlier(&score).unwrap().is_some());
    assert!(dir.find_earlier(&without).unwrap().is_some());
}

/// Carries a publication out in steps: it is interrupted after each of its moves in turn, and before and after the
/// deletion of its plan.
fn interrupt_each_step(
    prepare: impl Fn(&RunDir) -> (String, Publication),
    check: impl Fn(&RunDir, usize),
) {
    let mut steps = 0;
    loop {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path();
        let dir = open(root);
        let (stage, publication) = prepare(&dir);
        let draft = root.join(draft_name(&stage));
        fs::create_dir_all(&draft).unwrap();
        let plan = draft.join(PLAN_FILE);
        potstill_datasets::write_sealed(&plan, &publication).unwrap();
        for (from, to) in publication.moves.iter().take(steps) {
            rename(&root.join(from), &root.join(to)).unwrap();
        }
        if steps > publication.moves.len() {
            fs::remove_file(&plan).unwrap();
        }
        drop(dir);
        let look = RunDir::open(root, &loaded(RUN), Access::Look).unwrap();
        assert_eq!(plan.exists(), steps <= publication.moves.len());
        drop(look);
        check(&open(root), steps);
        assert!(!plan.exists());
        if steps > publication.moves.len() {
            break;
        }
        steps += 1;
    }
    assert!(steps > 4);
}

#[test]
fn an_interrupted_publication_is_finished() {
    let prepare = |dir: &RunDir| {
        publish(dir, 1, EarlierOutput::Keep);
        draft(dir, 2);
        let out = dir.path(".work/draft-collect/out");
        let files = hash_files(&out).unwrap();
        let manifest = plan(2).manifest(files, Counts::new(), BTreeMap::new());
        manifest.write(&out).unwrap();
        let publication = dir.publication(&plan(2), EarlierOutput::Keep).unwrap();
        assert_eq!(publication.moves.len(), 8);
        ("collect".to_owned(), publication)
    };
    interrupt_each_step(prepare, |dir, steps| {
        let manifest = dir.published("completions").unwrap().unwrap();
        assert_eq!(manifest.key, plan(2).key(), "after {steps} steps");
        let old = dir.find_earlier(&plan(1)).unwrap().unwrap();
        assert_eq!(old.manifest.unwrap().key, plan(1).key());
        let old = format!("{}/completions/a", entry(1));
        for (name, version) in [("signals/a", "2"), (&old, "1"), ("notes.json", "2")] {
            assert_eq!(
                content(&dir.root, name),
                version,
                "{name} after {steps} steps"
            );
        }
    });
}

#[test]
fn an_interrupted_restoration_is_finished() {
    let prepare = |dir: &RunDir| {
        publish(dir, 1, EarlierOutput::Keep);
        publish(dir, 2, EarlierOutput::Keep);
        let found = dir.find_earlier(&plan(1)).unwrap().unwrap();
        let restoration = dir.restoration(&plan(1), &found).unwrap();
        ("collect".to_owned(), restoration)
    };
    interrupt_each_step(prepare, |dir, steps| {
        let manifest = dir.published("completions").unwrap().unwrap();
        assert_eq!(manifest.key, plan(1).key(), "after {steps} steps");
        assert!(dir.find_earlier(&plan(1)).unwrap().is_none());
        assert!(dir.find_earlier(&plan(2)).unwrap().is_some());
        for name in ["signals/a", "completions/a", "notes.json"] {
            assert_eq!(content(&dir.root, name), "1", "{name} after {steps} steps");
        }
    });
}

/// The plan of a training, which is written in its place.
fn training(version: u32) -> StagePlan {
    StagePlan {
        stage: "train student".to_owned(),
        home: "students/student".to_owned(),
        outputs: vec!["students/student".to_owned()],
        settings: json!({ "version": version }),
        inputs: BTreeMap::new(),
    }
}

/// Begins a training, with a checkpoint and, if it is finished, a manifest and an export.
fn train(dir: &RunDir, version: u32, is_finished: bool) {
    let plan = training(version);
    dir.start(&plan).unwrap();
    let home = dir.path(&plan.home);
    for (file, is_there) in [("checkpoints/a", true), ("export/a", is_finished)] {
        if is_there {
            fs::create_dir_all(home.join(file).parent().unwrap()).unwrap();
            fs::write(home.join(file), format!("{version}")).unwrap();
        }
    }
    if is_finished {
        let manifest = plan.manifest(BTreeMap::new(), Counts::new(), BTreeMap::new());
        manifest.write(&home).unwrap();
    }
}

/// An unfinished training gives way to a finished one, which brings its export back, and the other way round.
#[test]
fn interrupted_exchanges_of_trainings_are_finished() {
    for is_back in [false, true] {
        let prepare = |dir: &RunDir| {
            train(dir, 1, !is_back);
            dir.move_aside(&training(2)).unwrap();
            train(dir, 2, is_back);
            let found = dir.find_earlier(&training(1)).unwrap().unwrap();
            assert_eq!(found.manifest.is_some(), !is_back);
            let restoration = dir.restoration(&training(1), &found).unwrap();
            ("train student".to_owned(), restoration)
        };
        let mut most = 0;
        for steps in 0..5 {
            let temp = tempfile::tempdir().unwrap();
            let root = temp.path();
            let dir = open(root);
            let (stage, restoration) = prepare(&dir);
            most = restoration.moves.len();
            let work = root.join(draft_name(&stage));
            fs::create_dir_all(&work).unwrap();
            potstill_datasets::write_sealed(&work.join(PLAN_FILE), &restoration).unwrap();
            for (from, to) in restoration.moves.iter().take(steps) {
                rename(&root.join(from), &root.join(to)).unwrap();
            }
            drop(dir);
            let dir = open(root);
            assert_eq!(content(root, "students/student/checkpoints/a"), "1");
            let key = dir.started_key("students/student").unwrap();
            assert_eq!(key, Some(training(1).key()));
            let export = content(root, "students/student/export/a");
            assert_eq!(export, if is_back { "absent" } else { "1" });
            let published = dir.published("students/student").unwrap();
            assert_eq!(published.is_some(), !is_back);
            let other = dir.find_earlier(&training(2)).unwrap().unwrap();
            assert_eq!(other.manifest.is_some(), is_back);
        }
        assert!((3..5).contains(&most), "{most}");
    }
}

#[test]
fn a_training_without_a_checkpoint_is_not_kept() {
    let temp = tempfile::tempdir().unwrap();
    let dir = open(temp.path());
    dir.start(&training(1)).unwrap();
    fs::write(dir.path("students/student/metrics.jsonl"), "").unwrap();
    assert!(dir.move_aside(&training(2)).unwrap().is_empty());
    assert!(!dir.path("students/student").exists());
    // The manifest of a folder that a user deleted does not describe the next training.
    train(&dir, 2, true);
    fs::remove_dir_all(dir.path("students/student")).unwrap();
    dir.move_aside(&training(2)).unwrap();
    dir.start(&training(2)).unwrap();
    assert!(dir.published("students/student").unwrap().is_none());
    assert!(dir.earlier_folders().unwrap().is_empty());
}

/// A dry run finds what would be taken back where it is now, and writes nothing.
#[test]
fn a_dry_run_changes_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path();
    let look = || RunDir::open(root, &loaded(RUN), Access::Look).unwrap();
    let absent = RunDir::open(&root.join("none"), &loaded(RUN), Access::Look).unwrap();
    assert!(absent.published("completions").unwrap().is_none());
    assert!(!root.join("none").exists());
    let held = open(root);
    train(&held, 1, true);
    held.move_aside(&training(2)).unwrap();
    train(&held, 2, true);
    let dir = look();
    let found = dir.find_earlier(&training(1)).unwrap().unwrap();
    let kept = dir.restore(&training(1), &found).unwrap();
    assert_eq!(kept.len(), 1);
    let manifest = dir.published("students/student").unwrap().unwrap();
    assert_eq!(manifest.key, training(1).key());
    let export = fs::read_to_string(dir.path("students/student/export/a"));
    assert_eq!(export.unwrap(), "1");
    assert_eq!(content(root, "students/student/export/a"), "2");
    // A stage that would run takes its output away from those behind it.
    let dir = look();
    assert_eq!(
        dir.assume_run(&training(3), EarlierOutput::Keep)
            .unwrap()
            .len(),
        1
    );
    let error = dir.require("students/student", "train", &loaded(RUN));
    let error = error.unwrap_err();
    let before = error.downcast_ref::<NotYetWritten>().unwrap();
    assert_eq!(before.stage, "train student");
    assert!(dir.published("students/student/export").unwrap().is_none());
    let message = dir.draft(&plan(1)).unwrap_err().to_string();
    assert!(
        message.contains("cannot be written: this is a dry run"),
        "{message}"
    );
}

#[test]
fn a_folder_of_another_run_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path().join("runs");
    let message = |text: &str| {
        let error = RunDir::open(&root, &loaded(text), Access::Work).unwrap_err();
        error
            .to_string()
            .replace(&root.display().to_string(), "RUNS")
    };
    drop(open(&root));
    let mut all = message(&RUN.replace("tiny", "other"));
    let held = open(&root);
    all += &format!("\n\n{}", message(RUN));
    publish(&held, 1, EarlierOutput::Keep);
    fs::write(root.join("signals/a"), "cut short").unwrap();
    let damaged = held.published("completions").unwrap_err().to_string();
    all += &format!(
        "\n\n{}",
        damaged.replace(&root.display().to_string(), "RUNS")
    );
    drop(held);
    fs::write(root.join(RUN_FILE), "name = 1").unwrap();
    all += &format!("\n\n{}", message(RUN));
    fs::remove_file(root.join(RUN_FILE)).unwrap();
    all += &format!("\n\n{}", message(RUN));
    insta::assert_snapshot!(all);
}
