//! Models and data from a Hub on loopback.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::fixture::{CommandOutput, Run};
use crate::hub_server::{COMMIT, Fault, HubServer, etag};

const TOKEN: &str = "hf_SecretTokenOfATest";

/// A run whose teacher and data are on a Hub.
struct HubRun {
    run: Run,
    server: HubServer,
}

impl HubRun {
    fn new() -> HubRun {
        let hub = HubRun {
            run: Run::new(),
            server: HubServer::start(),
        };
        for file in fs::read_dir(hub.run.path("model")).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            hub.server.add("org/tiny", &name, fs::read(&path).unwrap());
        }
        hub.server.add("org/tiny", "README.md", "# Tiny");
        let prompts = fs::read(hub.run.path("prompts.jsonl")).unwrap();
        hub.server
            .add("datasets/org/stories", "data/train.jsonl", prompts);
        hub.run.edit("path = \"model\"", "path = \"org/tiny\"");
        let data = "path = \"hf://datasets/org/stories/data/train.jsonl\"";
        hub.run.edit("path = \"prompts.jsonl\"", data);
        hub
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.run.command(arguments);
        command
            .env_remove("HF_HUB_OFFLINE")
            .env("HF_ENDPOINT", self.server.url())
            .env("HF_TOKEN", TOKEN);
        command
    }

    fn potstill(&self, arguments: &[&str]) -> CommandOutput {
        let output = self.run.output(&mut self.command(arguments));
        let text = format!("{}{}", output.stdout, output.stderr);
        assert!(!text.contains(TOKEN), "{text}");
        output
    }

    fn weights(&self) -> String {
        etag(&fs::read(self.run.path("model/model.safetensors")).unwrap())
    }
}

#[test]
fn a_run_fetches_once_and_records_the_commit() {
    let hub = HubRun::new();
    let output = hub.potstill(&["run", "run.toml"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    let fetching = "fetching org/tiny at 0123456789ab: 5 files, ";
    assert!(output.stderr.contains(fetching), "{}", output.stderr);
    assert_eq!(hub.server.count("README.md"), 0);
    let record = fs::read_to_string(hub.run.path("runs/tiny/sources.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["teacher"]["repository"], "org/tiny");
    assert_eq!(record["teacher"]["revision"], "main");
    assert_eq!(record["teacher"]["commit"], COMMIT);
    assert_eq!(record["data"]["files"][0], "data/train.jsonl");
    let card = hub.run.path("runs/tiny/students/student/export/README.md");
    let card = fs::read_to_string(card).unwrap();
    assert!(card.contains("base_model: \"org/tiny\"\n"), "{card}");
    let teacher = format!("- teacher: org/tiny, revision {COMMIT}, potstill");
    assert!(card.contains(&teacher), "{card}");

    let requests = hub.server.seen().len();
    let again = hub.potstill(&["run", "run.toml"]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(again.stderr.contains("nothing to do"), "{}", again.stderr);
    assert_eq!(hub.server.seen().len(), requests, "the Hub was asked again");

    // The same files in a folder make the same run, except for their names in the provenance.
    hub.run.edit("path = \"org/tiny\"", "path = \"model\"");
    hub.run.edit(
        "path = \"hf://datasets/org/stories/data/train.jsonl\"",
        "path = \"train.jsonl\"",
    );
    fs::copy(hub.run.path("prompts.jsonl"), hub.run.path("train.jsonl")).unwrap();
    let local = hub.run.potstill(&["run", "run.toml"]);
    assert!(local.stderr.contains("nothing to do"), "{}", local.stderr);
}

#[test]
fn a_check_and_a_dry_run_fetch_no_weights() {
    let hub = HubRun::new();
    let dry = hub.potstill(&["run", "run.toml", "--dry-run"]);
    assert_eq!(dry.code, 0, "{}", dry.stderr);
    assert!(
        dry.stdout
            .contains("to fetch  org/tiny at 0123456789ab: 5 files, "),
        "{}",
        dry.stdout
    );
    assert!(dry.stdout.contains(" free\n"), "{}", dry.stdout);
    assert_eq!(hub.server.count("resolve"), 0);
    assert!(!hub.run.path("hf").exists());
    let check = hub.potstill(&["check", "run.toml"]);
    assert_eq!(check.code, 0, "{}", check.stderr);
    assert!(
        check
            .stdout
            .contains("to fetch  org/tiny at 0123456789ab: 5 files, "),
        "{}",
        check.stdout
    );
    assert!(
        check
            .stdout
            .contains("teacher   org/tiny at 0123456789ab: 2 layers"),
        "{}",
        check.stdout
    );
    assert_eq!(hub.server.count("model.safetensors"), 0);
    assert_eq!(hub.potstill(&["render", "run.toml"]).code, 0);
    assert_eq!(hub.server.count("model.safetensors"), 0);
}

#[test]
fn init_looks_at_a_model_and_data_of_the_hub() {
    let hub = HubRun::new();
    let data = "hf://datasets/org/stories/data/train.jsonl";
    let arguments = ["init", "new.toml", "--data", data, "--teacher", "org/tiny"];
    let output = hub.potstill(&arguments);
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert_eq!(hub.server.count("model.safetensors"), 0);
    let text = fs::read_to_string(hub.run.path("new.toml")).unwrap();
    assert!(
        text.contains(data) && text.contains("\"org/tiny\""),
        "{text}"
    );
    let check = hub.potstill(&["check", "new.toml"]);
    assert_eq!(check.code, 0, "{}", check.stderr);
    let wrong = hub.potstill(&["init", "x.toml", "--data", data, "--teacher", "org/absent"]);
    assert_eq!(wrong.code, 2, "{}", wrong.stderr);
    assert!(
        wrong.stderr.contains("org/absent does not exist, and"),
        "{}",
        wrong.stderr
    );
}

#[test]
fn a_gguf_file_of_the_hub_is_fetched_whole_and_then_read() {
    let hub = HubRun::new();
    hub.server.add("org/tiny", "tiny-q8.gguf", vec![b'x'; 3000]);
    hub.run
        .edit("path = \"org/tiny\"", "path = \"org/tiny/tiny-q8.gguf\"");
    let check = hub.potstill(&["check", "run.toml"]);
    assert_eq!(check.code, 0, "{}", check.stderr);
    let announced = "to fetch  org/tiny/tiny-q8.gguf at 0123456789ab: 1 file, 3.00 kB";
    assert!(check.stdout.contains(announced), "{}", check.stdout);
    assert_eq!(hub.server.count("tiny-q8.gguf"), 0);
    let run = hub.potstill(&["run", "run.toml"]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stderr.contains("tiny-q8.gguf"), "{}", run.stderr);
    assert_eq!(hub.server.count("cdn/org/tiny"), 1);
    assert!(!hub.run.path("runs/tiny/prompts").exists());
}

#[test]
fn a_killed_download_is_resumed() {
    let hub = HubRun::new();
    let weights = format!("cdn/org/tiny/resolve/{COMMIT}/model.safetensors");
    hub.server
        .fail(&weights, [Fault::Pause(Duration::from_secs(600))]);
    let mut command = hub.command(&["run", "run.toml", "--quiet"]);
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let blobs = hub.run.path("hf/hub/models--org--tiny/blobs");
    let partial = blobs.join(format!("{}.incomplete", hub.weights()));
    let length = || fs::metadata(&partial).map_or(0, |found| found.len());
    for _ in 0..600 {
        if length() > 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let received = length();
    assert!(received > 0 && !blobs.join(hub.weights()).exists());
    let output = hub.potstill(&["collect", "run.toml"]);
    assert_ne!(
        output.code, 0,
        "prompts were imported before they were fetched"
    );
    let output = hub.potstill(&["run", "run.toml"]);
    assert_eq!(output.code, 0, "{}", output.stderr);
    let seen = hub.server.seen();
    let resumed = seen
        .iter()
        .find(|seen| seen.line.contains("cdn/") && seen.range.is_some());
    assert_eq!(resumed.unwrap().range, Some(format!("bytes={received}-")));
}

#[test]
fn names_that_cannot_be_used_are_errors_at_their_keys() {
    let hub = HubRun::new();
    let refused = |from: &str, to: &str| {
        hub.run.edit(from, to);
        let output = hub.potstill(&["check", "run.toml"]);
        hub.run.edit(to, from);
        (output.code, output.stderr)
    };
    let (code, error) = refused("org/tiny", "org/other");
    assert_eq!(code, 2, "{error}");
    assert!(
        error.contains("run.toml:10:") && error.contains("org/other does not exist, and "),
        "{error}"
    );
    assert!(
        error.contains("has no model `org/other`, or it is private"),
        "{error}"
    );
    let (code, error) = refused(
        "template = \"plain\"",
        "revision = \"v9\"\ntemplate = \"plain\"",
    );
    assert_eq!(code, 2, "{error}");
    let (code, error) = refused("path = \"org/tiny\"", "path = \"model\"\nrevision = \"v1\"");
    assert!(code == 2 && error.contains("has no revisions"), "{error}");
    let (code, error) = refused("data/train.jsonl", "data/test.jsonl");
    assert!(
        code == 2 && error.contains("has no file `data/test.jsonl`"),
        "{error}"
    );
    let (code, error) = refused("hf://datasets/org/stories/data", "hf://stories");
    assert!(
        code == 2 && error.contains("hf://datasets/org/name/"),
        "{error}"
    );

    let offline = hub.run.potstill(&["check", "run.toml"]);
    assert_eq!(offline.code, 2, "{}", offline.stderr);
    assert!(
        offline.stderr.contains("HF_HUB_OFFLINE is set"),
        "{}",
        offline.stderr
    );
    hub.server.fail(
        "org/tiny",
        [Fault::Status(403, "X-Error-Code: GatedRepo\r\n")],
    );
    let gated = hub.potstill(&["run", "run.toml"]);
    assert_eq!(gated.code, 1, "{}", gated.stderr);
    assert!(
        gated.stderr.contains("is gated") && gated.stderr.contains("/org/tiny, and HF_TOKEN"),
        "{}",
        gated.stderr
    );
}
