//! The sentences of `docs/architecture.md` that can be read off the manifests and the
//! sources.

// Lints know test functions, not the functions they share.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

/// Each crate's folder, and the crates of ours that it may use.
const EDGES: [(&str, &str, &[&str]); 7] = [
    ("datasets", "potstill-datasets", &[]),
    ("kernels", "potstill-kernels", &[]),
    ("model", "potstill-model", &["potstill-kernels"]),
    (
        "teacher",
        "potstill-teacher",
        &["potstill-datasets", "potstill-kernels", "potstill-model"],
    ),
    (
        "student",
        "potstill-student",
        &["potstill-datasets", "potstill-kernels", "potstill-model"],
    ),
    ("eval", "potstill-eval", &["potstill-datasets"]),
    (
        "src",
        "potstill",
        &[
            "potstill-datasets",
            "potstill-eval",
            "potstill-kernels",
            "potstill-model",
            "potstill-student",
            "potstill-teacher",
        ],
    ),
];

/// Libraries that only some crates may name.
const NAMED_BY: [(&[&str], &[&str]); 7] = [
    (
        &["burn"],
        &["potstill-kernels", "potstill-model", "potstill-student"],
    ),
    (&["burn-cubecl", "cubecl"], &["potstill-kernels"]),
    (
        &["arrow", "parquet", "datafusion", "object_store"],
        &["potstill-datasets"],
    ),
    (
        &["reqwest", "hyper", "tokio", "ureq"],
        &["potstill-teacher"],
    ),
    (
        &[
            "anyhow",
            "clap",
            "clap_complete",
            "ctrlc",
            "indicatif",
            "open",
        ],
        &["potstill"],
    ),
    // Settings of the run file, which are types of the crates that read them.
    (
        &["schemars"],
        &[
            "potstill",
            "potstill-datasets",
            "potstill-eval",
            "potstill-student",
            "potstill-teacher",
        ],
    ),
    // Run files, and the teacher's table of providers.
    (&["toml"], &["potstill", "potstill-teacher"]),
];

fn metadata() -> Metadata {
    let mut command = MetadataCommand::new();
    command.manifest_path(root().join("Cargo.toml")).no_deps();
    command.exec().unwrap()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn edges_go_down_only() {
    let metadata = metadata();
    let packages = metadata.workspace_packages();
    assert_eq!(
        packages.len(),
        EDGES.len(),
        "a crate that EDGES does not know"
    );
    for package in packages {
        let name = package.name.as_str();
        let (_, _, allowed) = EDGES.iter().find(|(_, n, _)| *n == name).unwrap();
        for dependency in &package.dependencies {
            let on = dependency.name.as_str();
            assert!(
                !on.starts_with("potstill") || allowed.contains(&on),
                "{name} uses {on}"
            );
        }
    }
}

#[test]
fn libraries_are_named_where_they_belong() {
    for package in metadata().workspace_packages() {
        // Tests may bring a server of their own.
        let named = package.dependencies.iter();
        for dependency in named.filter(|d| d.kind != DependencyKind::Development) {
            for (libraries, allowed) in NAMED_BY {
                let (name, on) = (package.name.as_str(), dependency.name.as_str());
                assert!(
                    !libraries.contains(&on) || allowed.contains(&name),
                    "{name} names {on}"
                );
            }
        }
    }
}

/// A source file of a crate: where it is, and its code without comments, texts and tests.
struct Source {
    folder: &'static str,
    path: PathBuf,
    code: String,
}

impl Source {
    fn names(&self, word: &str) -> bool {
        let part = |c: char| c.is_alphanumeric() || c == '_';
        self.code.match_indices(word).any(|(at, _)| {
            let before = self.code[..at].chars().next_back();
            let after = self.code[at + word.len()..].chars().next();
            !before.is_some_and(part) && !after.is_some_and(part)
        })
    }
}

/// Sources of all crates, less what is compiled for tests only.
fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for (folder, _, _) in EDGES {
        let dir = match folder {
            "src" => root().join("src"),
            crate_folder => root().join(crate_folder).join("src"),
        };
        for path in rust_files(&dir) {
            let is_test = |p: &Path| p.file_stem().is_some_and(|s| s == "tests");
            if is_test(&path) || path.parent().is_some_and(is_test) {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let code = code(text.split("#[cfg(test)]").next().unwrap());
            sources.push(Source { folder, path, code });
        }
    }
    assert!(sources.len() > 40, "the sources were not found");
    sources
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files
}

/// Lines without comments and without the content of texts on one line.
fn code(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let mut in_text = false;
        let mut chars = line.chars().peekable();
        while let Some(c) = chars.next() {
            match (in_text, c) {
                (true, '\\') => drop(chars.next()),
                (_, '"') => in_text = !in_text,
                (true, _) => {}
                (false, '\'') if chars.peek() == Some(&'"') => drop(chars.next()),
                (false, '/') if chars.peek() == Some(&'/') => break,
                (false, c) => out.push(c),
            }
        }
        out.push('\n');
    }
    out
}

fn offenders(of: impl Fn(&Source) -> bool) -> Vec<PathBuf> {
    let found = sources().into_iter().filter(of);
    found
        .map(|s| s.path.strip_prefix(root()).unwrap().to_owned())
        .collect()
}

fn none() -> Vec<PathBuf> {
    Vec::new()
}

#[test]
fn unsafe_is_in_kernels_and_the_listed_file() {
    let listed = root().join("model/src/checkpoint.rs");
    let found = offenders(|s| s.names("unsafe") && s.folder != "kernels" && s.path != listed);
    assert_eq!(found, none());
    assert_eq!(
        offenders(|s| s.code.contains("#[cube") && s.folder != "kernels"),
        none()
    );
}

#[test]
fn only_src_prints_and_there_in_one_file() {
    let words = ["println", "eprintln", "print", "eprint", "dbg"];
    let prints = |s: &Source| words.iter().any(|w| s.code.contains(&format!("{w}!")));
    assert_eq!(offenders(prints), [Path::new("src/progress.rs")]);
}

#[test]
fn only_src_reads_the_environment() {
    let reads = |s: &Source| {
        ["std::env", "env::var", "env::args"]
            .iter()
            .any(|w| s.code.contains(w))
    };
    assert_eq!(offenders(|s| s.folder != "src" && reads(s)), none());
}

#[test]
fn only_the_teacher_opens_a_socket() {
    let opens = |s: &Source| s.code.contains("std::net") || s.code.contains("TcpStream");
    assert_eq!(offenders(|s| s.folder != "teacher" && opens(s)), none());
}

#[test]
fn no_file_is_a_drawer() {
    let drawers = [
        "util", "utils", "common", "helper", "helpers", "manager", "misc",
    ];
    let named = |path: &Path| {
        let stem = path.file_stem().unwrap().to_string_lossy();
        stem.split('_').any(|part| drawers.contains(&part))
    };
    assert_eq!(
        offenders(|s| named(&s.path) || s.path.parent().is_some_and(named)),
        none()
    );
}

#[test]
fn files_stay_readable() {
    assert_eq!(offenders(|s| s.code.lines().count() > 600), none());
    let main = fs::read_to_string(root().join("src/main.rs")).unwrap();
    assert!(main.lines().count() < 60);
}

/// Runs are files, not flags: a hyperparameter belongs into the run file.
#[test]
fn the_command_line_is_frozen() {
    let help = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_potstill"));
        let output = command.args(arguments).arg("--help").output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let flags = |help: &str| -> Vec<String> {
        let words = help.split(|c: char| c.is_whitespace() || c == ',');
        words
            .filter(|w| w.starts_with("--"))
            .map(str::to_owned)
            .collect()
    };
    let commands = [
        "run", "check", "probe", "import", "collect", "score", "grade", "curate", "train",
        "export", "eval",
    ];
    let listed: BTreeMap<&str, Vec<String>> =
        commands.iter().map(|c| (*c, flags(&help(&[c])))).collect();
    let frozen = [
        "--run-dir",
        "--device",
        "--limit",
        "--dry-run",
        "--verbose",
        "--quiet",
        "--json",
        "--help",
    ];
    let (help_flag, rest) = frozen.split_last().unwrap();
    let of_asking = [rest, &["--retry-failures", help_flag]].concat();
    for (command, flags) in listed {
        let asks = ["run", "collect", "score"].contains(&command);
        let expected = if asks { &of_asking[..] } else { &frozen };
        assert_eq!(flags, expected, "potstill {command}");
    }
    let of_report = [rest, &["--open", help_flag]].concat();
    assert_eq!(flags(&help(&["report"])), of_report);
    assert_eq!(
        flags(&help(&["init"])),
        ["--data", "--teacher", "--name", "--force", "--help"]
    );
    assert_eq!(flags(&help(&["render"])), ["--rows", "--run-dir", "--help"]);
    assert_eq!(
        flags(&help(&["check-loss"])),
        ["--run-dir", "--device", "--help"]
    );
    assert_eq!(
        flags(&help(&["bench"])),
        [
            "--python", "--only", "--type", "--tokens", "--device", "--quick", "--json", "--help"
        ]
    );
    for command in ["schema", "completions"] {
        assert_eq!(flags(&help(&[command])), ["--help"]);
    }
    let all = help(&[]);
    let section = all
        .split("Commands:\n")
        .nth(1)
        .unwrap()
        .split("\n\n")
        .next()
        .unwrap();
    let names: Vec<&str> = section
        .lines()
        .map(|line| line.split_whitespace().next().unwrap())
        .collect();
    let others = [
        "report",
        "render",
        "check-loss",
        "bench",
        "schema",
        "completions",
        "help",
    ];
    assert_eq!(names, [&["init"], &commands[..], &others].concat());
}
