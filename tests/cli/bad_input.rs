//! Each kind of bad input: its sentence, its exit code, and that what was collected stays.

use std::fs;
use std::process::Command;

use crate::fixture::{Run, VOCABULARY, write_model};

/// What a command says about a fresh run after one thing in it was broken.
fn said(command: &str, broken: impl Fn(&Run)) -> String {
    let run = Run::new();
    broken(&run);
    let said = run.potstill(&[command, "run.toml"]);
    assert_ne!(said.code, 0);
    format!("exit code {}\n{}", said.code, said.stderr)
}

/// `run` must find it too, and say the same.
fn both(broken: impl Fn(&Run)) -> String {
    let checked = said("check", &broken);
    let ran = said("run", &broken);
    let error = |text: &str| text.split("error: ").nth(1).unwrap().to_owned();
    assert_eq!(error(&ran), error(&checked));
    checked
}

#[test]
fn the_run_file() {
    insta::assert_snapshot!("unknown_key", both(|run| run.edit("steps = 6", "step = 6")));
    insta::assert_snapshot!(
        "out_of_range",
        both(|run| run.edit("heldout = 0.4", "heldout = 1.4"))
    );
    insta::assert_snapshot!(
        "no_run_file",
        both(|run| fs::remove_file(run.path("run.toml")).unwrap())
    );
    insta::assert_snapshot!(
        "unset_variable",
        both(|run| run.edit("\"model\"", "\"${POTSTILL_REAL}/model\""))
    );
    insta::assert_snapshot!("another_run", {
        let run = Run::new();
        run.potstill(&["import", "run.toml"]);
        run.edit("name = \"tiny\"", "name = \"other\"");
        let said = run.potstill(&["run", "run.toml", "--run-dir", "runs/tiny"]);
        format!("exit code {}\n{}", said.code, said.stderr)
    });
}

#[test]
fn prompts() {
    insta::assert_snapshot!(
        "missing_file",
        both(|run| fs::remove_file(run.path("prompts.jsonl")).unwrap())
    );
    insta::assert_snapshot!("a_folder", both(|run| run.edit("prompts.jsonl", "model")));
    insta::assert_snapshot!(
        "wrong_column",
        both(|run| run.edit("text = \"text\"", "text = \"question\""))
    );
    insta::assert_snapshot!("empty", both(|run| run.write("prompts.jsonl", "\n")));
    insta::assert_snapshot!(
        "not_json",
        both(|run| run.write("prompts.jsonl", "{\"text\": \"a\"}\n{\"text\"\n"))
    );
    insta::assert_snapshot!(
        "not_utf8",
        both(|run| fs::write(run.path("prompts.jsonl"), b"{\"text\": \"\xff\"}\n").unwrap())
    );
    insta::assert_snapshot!(
        "too_long",
        both(|run| {
            run.write("prompts.jsonl", "{\"text\": \"short\"}\n{\"text\": \"this one is longer than the model can hold\"}\n");
        })
    );
    insta::assert_snapshot!(
        "raising_template",
        both(|run| {
            run.edit("template = \"plain\"", "template = \"strict.jinja\"");
            run.write("strict.jinja", "{% for m in messages %}{% if m.role != 'system' %}{{ raise_exception('Only system messages are allowed') }}{% endif %}{% endfor %}");
        })
    );
}

#[cfg(unix)]
#[test]
fn a_file_without_permission() {
    use std::os::unix::fs::PermissionsExt;
    let run = Run::new();
    let path = run.path("prompts.jsonl");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::read(&path).is_ok() {
        eprintln!("skipped: this user may read everything");
        return;
    }
    let said = run.potstill(&["check", "run.toml"]);
    assert_eq!(said.code, 1);
    assert!(
        said.stderr.contains("prompts.jsonl: Permission denied"),
        "{}",
        said.stderr
    );
}

#[test]
fn the_model() {
    insta::assert_snapshot!("no_model", both(|run| run.edit("\"model\"", "\"modle\"")));
    insta::assert_snapshot!(
        "no_template",
        both(|run| run.edit("template = \"plain\"\n", ""))
    );
    insta::assert_snapshot!(
        "tokenizer_too_large",
        both(|run| {
            write_model(&run.path("model"), VOCABULARY - 9);
        })
    );
    insta::assert_snapshot!(
        "missing_shard",
        both(|run| {
            shard(run);
            fs::remove_file(run.path("model/model-00002-of-00002.safetensors")).unwrap();
        })
    );
    // Only loading reads the weights themselves.
    insta::assert_snapshot!(
        "truncated_weights",
        said("run", |run| {
            let path = run.path("model/model.safetensors");
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        })
    );
}

/// The same weights under an index that names two shards.
fn shard(run: &Run) {
    let dir = run.path("model");
    let model = potstill::model::load(
        &dir,
        potstill::model::DType::F32,
        &potstill::model::Device::flex(),
    )
    .unwrap();
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    let bytes = fs::metadata(dir.join("tokenizer.json")).unwrap().len();
    assert!(bytes > 0);
    potstill::model::save_sharded(&model, &dir, potstill::model::DType::F32, 20_000).unwrap();
    assert!(dir.join("model-00002-of-00002.safetensors").exists());
}

#[test]
fn what_was_collected_stays() {
    let run = Run::new();
    run.potstill(&["import", "run.toml"]);
    run.potstill(&["collect", "run.toml"]);
    let before = run.published();
    fs::write(run.path("model/model.safetensors"), "gone").unwrap();
    let said = run.potstill(&["run", "run.toml"]);
    assert_eq!(said.code, 1, "{}", said.stderr);
    let after = run.published();
    for (name, bytes) in before {
        assert!(after[&name] == bytes, "{name}");
    }
}

#[test]
fn a_held_out_set_of_nothing() {
    insta::assert_snapshot!(
        "no_heldout",
        said("run", |run| run.edit("heldout = 0.4", "heldout = 1e-9"))
    );
    insta::assert_snapshot!(
        "none_finished",
        said("run", |run| run
            .edit("keep = \"all\"", "keep = \"finished\""))
    );
}

/// A disk of its own that is full, where this user may mount one.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(path: std::path::PathBuf, kib: usize) -> Option<SmallDisk> {
        fs::create_dir_all(&path).unwrap();
        let size = format!("size={kib}k");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&path);
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        mounted.then_some(SmallDisk(path))
    }

    fn grow(&self) {
        let mut mount = Command::new("mount");
        mount.args(["-o", "remount,size=64m"]).arg(&self.0);
        assert!(mount.status().unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk() {
    let whole = Run::new();
    whole.run();
    // Sizes at which the journal, the shards and the first checkpoint are what does not fit.
    for kib in [28, 64, 160] {
        let run = Run::new();
        let Some(disk) = SmallDisk::mount(run.path("runs"), kib) else {
            eprintln!("skipped: this user may not mount a small disk");
            return;
        };
        let said = run.potstill(&["run", "run.toml"]);
        assert_eq!(said.code, 1, "{}", said.stderr);
        if kib == 28 {
            insta::assert_snapshot!("full_disk", said.stderr);
        }
        assert!(
            said.stderr.contains("No space left on device"),
            "{}",
            said.stderr
        );
        assert!(
            said.stderr
                .contains("the disk is full: free some space, and `potstill run run.toml` goes on"),
            "{}",
            said.stderr
        );
        disk.grow();
        run.run();
        assert!(run.published() == whole.published(), "{kib} KiB");
    }
}
