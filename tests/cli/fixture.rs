//! A run in a temporary folder of its own: a tiny random model whose tokens are bytes, prompts, and a
//! run file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use potstill::model::{Config, DType, Decoder, Device};
use serde_json::json;
use tempfile::TempDir;

pub(crate) const RUN_FILE: &str = r#"[run]
name = "tiny"
seed = 3

[import]
path = "prompts.jsonl"
columns = { text = "text" }

[teacher]
path = "model"
template = "plain"

[collect]
samples = 2
max_new_tokens = 12
batch = 5
signals = { top_k = 6 }

[curate]
keep = "all"
test = 0.4

[student]
layers = { every = 2 }

[train]
steps = 6
batch = 4
micro_batch = 2
learning_rate = 1e-2
checkpoint_every = 2

[eval]
resamples = 100
"#;

/// Number of tokens of the tiny tokenizer: three special tokens and 256 bytes.
pub(crate) const VOCABULARY: usize = 3 + 256;

/// A run in a temporary folder.
pub(crate) struct Run {
    temp: TempDir,
}

/// Exit code and output of a command, without the parts that change from run to run.
pub(crate) struct CommandOutput {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    pub(crate) fn new() -> Run {
        let run = Run {
            temp: tempfile::tempdir().unwrap(),
        };
        write_model(&run.path("model"), VOCABULARY);
        run.write("run.toml", RUN_FILE);
        run.write_prompts(12);
        run
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn write_prompts(&self, count: usize) {
        let line = |i| format!("{}\n", json!({ "text": format!("Story {i}: once") }));
        self.write("prompts.jsonl", &(0..count).map(line).collect::<String>());
    }

    /// Replaces a part of the run file.
    pub(crate) fn edit(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.path("run.toml")).unwrap();
        assert!(text.contains(from), "{from}");
        self.write("run.toml", &text.replace(from, to));
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command
            .current_dir(self.temp.path())
            .args(arguments)
            // No test looks a name up on the real Hub.
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", self.temp.path().join("hf"))
            .env("XDG_CACHE_HOME", self.temp.path().join("cache"))
            .env_remove("POTSTILL_REAL");
        command
    }

    pub(crate) fn potstill(&self, arguments: &[&str]) -> CommandOutput {
        self.output(&mut self.command(arguments))
    }

    /// Runs a command to its end and returns its output.
    pub(crate) fn output(&self, command: &mut Command) -> CommandOutput {
        let output = command.output().unwrap();
        let clean = |bytes: Vec<u8>| self.clean(&String::from_utf8(bytes).unwrap());
        CommandOutput {
            code: output.status.code().unwrap_or(-1),
            stdout: clean(output.stdout),
            stderr: clean(output.stderr),
        }
    }

    pub(crate) fn start(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Runs `potstill run`, which must succeed.
    pub(crate) fn run(&self) -> CommandOutput {
        let output = self.potstill(&["run", "run.toml"]);
        assert_eq!(output.code, 0, "{}", output.stderr);
        output
    }

    /// Replaces the temporary folder and times in a text by placeholders.
    pub(crate) fn clean(&self, text: &str) -> String {
        let text = text.replace(&self.temp.path().display().to_string(), "[DIR]");
        let text = match text.split_once(".work/collect-") {
            None => text,
            Some((before, after)) => format!("{before}.work/collect-[KEY]{}", &after[12..]),
        };
        let mut out = String::new();
        for line in text.lines() {
            let time = line.rfind(", in ").filter(|_| line.ends_with(" s"));
            match time {
                Some(at) => out += &format!("{}, in [TIME]\n", &line[..at]),
                None => out += &format!("{line}\n"),
            }
        }
        out
    }

    /// Returns the content of each file that must not depend on interruptions of the run. That excludes the
    /// ledger, the reports and the metrics, which contain times, and unpublished work.
    pub(crate) fn published(&self) -> BTreeMap<String, Vec<u8>> {
        let root = self.path("runs/tiny");
        let mut files = BTreeMap::new();
        collect_files(&root, &root, &mut files);
        let timeless = |name: &str| {
            !["ledger.jsonl", "requests.jsonl", "report", "_manifest.json"]
                .iter()
                .any(|n| name.starts_with(n))
                && !name.starts_with(".work")
                && !name.ends_with("metrics.jsonl")
                && !name.contains("tfevents")
                && !name.ends_with("state.json")
                && !name.ends_with("/files.json")
        };
        files.retain(|name, _| timeless(name));
        files
    }
}

/// The program that is tested. The environment names it where it was built on another machine.
fn binary() -> PathBuf {
    let named = std::env::var_os("POTSTILL_BINARY");
    named.map_or_else(|| env!("CARGO_BIN_EXE_potstill").into(), PathBuf::from)
}

/// Interrupts a process as Ctrl-C does, and returns its exit code and stderr.
pub(crate) fn interrupt(child: Child) -> (Option<i32>, String) {
    let pid = child.id().to_string();
    let sent = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(sent.success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), stderr)
}

fn collect_files(root: &Path, dir: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect_files(root, &path, files);
        } else {
            let name = path.strip_prefix(root).unwrap().display().to_string();
            files.insert(name, fs::read(&path).unwrap());
        }
    }
}

/// Writes a random two-layer model with `rows` embeddings and the byte tokenizer.
pub(crate) fn write_model(dir: &Path, rows: usize) {
    let config = Config::from_json(&json!({
    "model_type": "llama",
    "vocab_size": rows,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 48,
    "tie_word_embeddings": true,
    "bos_token_id": 1,
    "eos_token_id": [2]
    }))
    .unwrap();
    let model = Decoder::init(&config, 5, DType::F32, &Device::flex()).unwrap();
    potstill::model::save(&model, dir, DType::F32).unwrap();
    write_tokenizer(dir, &["<unk>", "<s>", "</s>"], "</s>");
}

/// Writes a tokenizer whose tokens are the special tokens, followed by the 256 bytes.
pub(crate) fn write_tokenizer(dir: &Path, special: &[&str], eos: &str) {
    let mut vocabulary = serde_json::Map::new();
    for (id, token) in special.iter().enumerate() {
        vocabulary.insert((*token).to_owned(), json!(id));
    }
    for byte in 0..256 {
        vocabulary.insert(format!("<0x{byte:02X}>"), json!(special.len() + byte));
    }
    let added: Vec<_> = special
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({ "id": id, "content": token, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true })
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [{ "type": "ByteFallback" }, { "type": "Fuse" }] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>",
                   "continuing_subword_prefix": null, "end_of_word_suffix": null,
                   "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                   "vocab": vocabulary, "merges": [] },
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let names = json!({ "bos_token": "<s>", "eos_token": eos, "unk_token": "<unk>" });
    fs::write(dir.join("tokenizer_config.json"), names.to_string()).unwrap();
    let id = special.iter().position(|token| *token == eos);
    let generation = json!({ "eos_token_id": id });
    fs::write(dir.join("generation_config.json"), generation.to_string()).unwrap();
}
