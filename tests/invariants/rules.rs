//! Rules on the content of the sources.

use std::fs;
use std::path::{Path, PathBuf};

use crate::root;
use crate::sources::{Source, sources};

fn files_where(of: impl Fn(&Source) -> bool) -> Vec<PathBuf> {
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
    let listed = root().join("model/src/files.rs");
    let found = files_where(|s| s.names("unsafe") && s.folder != "kernels" && s.path != listed);
    assert_eq!(found, none());
    assert_eq!(
        files_where(|s| s.code.contains("#[cube") && s.folder != "kernels"),
        none()
    );
}

#[test]
fn only_the_programs_print_and_each_in_one_file() {
    let words = ["println!", "eprintln!", "print!", "eprint!", "dbg!"];
    let streams = ["stdout()", "stderr()", "/dev/tty", "/dev/std"];
    let prints = |s: &Source| words.iter().chain(&streams).any(|w| s.code.contains(w));
    assert_eq!(
        files_where(prints),
        [
            Path::new("src/progress.rs"),
            Path::new("benches/src/main.rs")
        ]
    );
}

#[test]
fn only_the_programs_read_the_environment() {
    let reads = |s: &Source| {
        ["std::env", "env::var", "env::args"]
            .iter()
            .any(|w| s.code.contains(w))
    };
    let library = |s: &Source| !["src", "benches"].contains(&s.folder);
    assert_eq!(files_where(|s| library(s) && reads(s)), none());
}

#[test]
fn only_the_teacher_opens_a_socket() {
    let opens = |s: &Source| s.code.contains("std::net") || s.code.contains("TcpStream");
    assert_eq!(files_where(|s| s.folder != "teacher" && opens(s)), none());
}

#[test]
fn no_file_has_a_catch_all_name() {
    let catch_all = [
        "util", "utils", "common", "helper", "helpers", "manager", "misc",
    ];
    let named = |path: &Path| {
        let stem = path.file_stem().unwrap().to_string_lossy();
        stem.split('_').any(|part| catch_all.contains(&part))
    };
    assert_eq!(
        files_where(|s| named(&s.path) || s.path.parent().is_some_and(named)),
        none()
    );
}

#[test]
fn files_have_at_most_600_lines() {
    assert_eq!(files_where(|s| s.code.lines().count() > 600), none());
    let main = fs::read_to_string(root().join("src/main.rs")).unwrap();
    assert!(main.lines().count() < 60);
}
