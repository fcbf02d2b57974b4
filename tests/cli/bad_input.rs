//! Messages and exit codes for each kind of bad input; collected answers are kept.

use std::fs;
use std::process::Command;

use crate::fixture::{Run, VOCABULARY, write_model};

/// Returns exit code and stderr of a command in a fresh run that `break_run` has changed.
fn output_after(command: &str, break_run: impl Fn(&Run)) -> String {
    let run = Run::new();
    break_run(&run);
    let output = run.potstill(&[command, "run.toml"]);
    assert_ne!(output.code, 0);
    format!("exit code {}\n{}", output.code, output.stderr)
}

/// Returns the output of `check`, whose error must be the same as that of `run`.
fn check_and_run(break_run: impl Fn(&Run)) -> String {
    let checked = output_after("check", &break_run);
    let ran = output_after("run", &break_run);
    let error = |text: &str| text.split("error: ").nth(1).unwrap().to_owned();
    assert_eq!(error(&ran), error(&checked));
    checked
}

#[test]
fn errors_in_the_run_file() {
    insta::assert_snapshot!(
        "unknown_key",
        check_and_run(|run| run.edit("steps = 6", "step = 6"))
    );
    insta::assert_snapshot!(
        "out_of_range",
        check_and_run(|run| run.edit("test = 0.4", "test = 1.4"))
    );
    insta::assert_snapshot!(
        "no_run_file",
        check_and_run(|run| fs::remove_file(run.path("run.toml")).unwrap())
    );
    insta::assert_snapshot!(
        "unset_variable",
        check_and_run(|run| run.edit("\"model\"", "\"${POTSTILL_REAL}/model\""))
    );
    insta::assert_snapshot!("another_run", {
        let run = Run::new();
        run.potstill(&["import", "run.toml"]);
        run.edit("name = \"tiny\"", "name = \"other\"");
        let output = run.potstill(&["run", "run.toml", "--run-dir", "runs/tiny"]);
        format!("exit code {}\n{}", output.code, output.stderr)
    });
}

#[test]
fn errors_in_the_prompts() {
    insta::assert_snapshot!(
        "missing_file",
        check_and_run(|run| fs::remove_file(run.path("prompts.jsonl")).unwrap())
    );
    insta::assert_snapshot!(
        "a_folder",
        check_and_run(|run| run.edit("prompts.jsonl", "model"))
    );
    insta::assert_snapshot!(
        "wrong_column",
        check_and_run(|run| run.edit("text = \"text\"", "text = \"question\""))
    );
    insta::assert_snapshot!(
        "empty",
        check_and_run(|run| run.write("prompts.jsonl", "\n"))
    );
    insta::assert_snapshot!(
        "not_json",
        check_and_run(|run| run.write("prompts.jsonl", "{\"text\": \"a\"}\n{\"text\"\n"))
    );
    insta::assert_snapshot!(
        "not_utf8",
        check_and_run(
            |run| fs::write(run.path("prompts.jsonl"), b"{\"text\": \"\xff\"}\n").unwrap()
        )
    );
    insta::assert_snapshot!(
        "too_long",
        check_and_run(|run| {
            run.write("prompts.jsonl", "{\"text\": \"short\"}\n{\"text\": \"this one is longer than the model can hold\"}\n");
        })
    );
    insta::assert_snapshot!(
        "raising_template",
        check_and_run(|run| {
            run.edit("template = \"plain\"", "template = \"strict.jinja\"");
            run.write("strict.jinja", "{% for m in messages %}{% if m.role != 'system' %}{{ raise_exception('Only system messages are allowed') }}{% endif %}{% endfor %}");
        })
    );
}

#[cfg(unix)]
#[test]
fn a_prompt_file_without_permission() {
    use std::os::unix::fs::PermissionsExt;
    let run = Run::new();
    let path = run.path("prompts.jsonl");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::read(&path).is_ok() {
        eprintln!("skipped: this user may read all files");
        return;
    }
    let output = run.potstill(&["check", "run.toml"]);
    assert_eq!(output.code, 1);
    assert!(
        output.stderr.contains("prompts.jsonl: Permission denied"),
        "{}",
        output.stderr
    );
}

#[test]
fn errors_in_the_model() {
    insta::assert_snapshot!(
        "no_model",
        check_and_run(|run| run.edit("\"model\"", "\"modle\""))
    );
    insta::assert_snapshot!(
        "no_template",
        check_and_run(|run| run.edit("template = \"plain\"\n", ""))
    );
    insta::assert_snapshot!(
        "tokenizer_too_large",
        check_and_run(|run| {
            write_model(&run.path("model"), VOCABULARY - 9);
        })
    );
    insta::assert_snapshot!(
        "missing_shard",
        check_and_run(|run| {
            write_shards(run);
            fs::remove_file(run.path("model/model-00002-of-00002.safetensors")).unwrap();
        })
    );
    // `check` does not read the weights.
    insta::assert_snapshot!(
        "truncated_weights",
        output_after("run", |run| {
            let path = run.path("model/model.safetensors");
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        })
    );
}

/// Writes the same weights as two shards with an index.
fn write_shards(run: &Run) {
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
fn collected_answers_are_kept_after_a_failure() {
    let run = Run::new();
    run.potstill(&["import", "run.toml"]);
    run.potstill(&["collect", "run.toml"]);
    let before = run.published();
    fs::write(run.path("model/model.safetensors"), "gone").unwrap();
    let output = run.potstill(&["run", "run.toml"]);
    assert_eq!(output.code, 1, "{}", output.stderr);
    let after = run.published();
    for (name, bytes) in before {
        assert!(after[&name] == bytes, "{name}");
    }
}

#[test]
fn one_side_of_the_split_is_empty() {
    insta::assert_snapshot!(
        "no_test",
        output_after("run", |run| run.edit("test = 0.4", "test = 1e-9"))
    );
    insta::assert_snapshot!(
        "none_finished",
        output_after("run", |run| {
            run.edit("keep = \"all\"", "keep = \"finished\"");
            run.edit("max_new_tokens = 12", "max_new_tokens = 1");
        })
    );
}

/// A small disk (tmpfs), for users who may mount one.
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
fn a_run_resumes_after_a_full_disk() {
    let whole = Run::new();
    whole.run();
    // At these sizes, the journal, the shards and the first checkpoint are the first file that does not fit.
    for kib in [28, 64, 160] {
        let run = Run::new();
        let Some(disk) = SmallDisk::mount(run.path("runs"), kib) else {
            eprintln!("skipped: this user may not mount a small disk");
            return;
        };
        let output = run.potstill(&["run", "run.toml"]);
        assert_eq!(output.code, 1, "{}", output.stderr);
        if kib == 28 {
            insta::assert_snapshot!("full_disk", output.stderr);
        }
        assert!(
            output.stderr.contains("No space left on device"),
            "{}",
            output.stderr
        );
        assert!(
            output.stderr.contains(
                "\nhint: the disk is full: free some space; `potstill run run.toml` then resumes"
            ),
            "{}",
            output.stderr
        );
        disk.grow();
        run.run();
        assert!(run.published() == whole.published(), "{kib} KiB");
    }
}
