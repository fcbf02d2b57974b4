//! The sources of all crates.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{CRATES, root};

/// A source file: the folder of its crate, its path, and its code without comments, strings and tests.
pub(crate) struct Source {
    pub(crate) folder: &'static str,
    pub(crate) path: PathBuf,
    pub(crate) code: String,
}

impl Source {
    pub(crate) fn names(&self, word: &str) -> bool {
        let part = |c: char| c.is_alphanumeric() || c == '_';
        self.code.match_indices(word).any(|(at, _)| {
            let before = self.code[..at].chars().next_back();
            let after = self.code[at + word.len()..].chars().next();
            !before.is_some_and(part) && !after.is_some_and(part)
        })
    }
}

/// Reads the sources of all crates, without code that is compiled only for tests.
pub(crate) fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for (folder, _, _) in CRATES {
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

/// Removes comments, and the content of strings that end on their line.
fn code(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let mut in_string = false;
        let mut chars = line.chars().peekable();
        while let Some(c) = chars.next() {
            match (in_string, c) {
                (true, '\\') => drop(chars.next()),
                (_, '"') => in_string = !in_string,
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
