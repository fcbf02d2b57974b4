//! Paths that the pages for users and contributors name.

use std::fs;
use std::path::{Path, PathBuf};

use crate::root;

/// Folders of the repository. A code span in a page that begins with one of them is a path.
const FOLDERS: [&str; 13] = [
    ".ci/",
    "benches/",
    "datasets/",
    "docs/",
    "eval/",
    "examples/",
    "kernels/",
    "model/",
    "scripts/",
    "src/",
    "student/",
    "teacher/",
    "tests/",
];

/// Returns the targets of a page's links, and its code spans that begin with a folder of the repository.
fn named_paths(page: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(page).unwrap();
    let targets = text.split("](").skip(1).filter_map(|s| s.split(')').next());
    let links = targets.filter(|target| !target.contains("://") && !target.starts_with('#'));
    let links = links.map(|target| page.parent().unwrap().join(target));
    let spans = text.split('`').skip(1).step_by(2);
    let is_path = |span: &&str| {
        FOLDERS.iter().any(|folder| span.starts_with(folder)) && !span.contains(char::is_whitespace)
    };
    let spans = spans.filter(is_path).map(|span| root().join(span));
    links.chain(spans).collect()
}

#[test]
fn pages_name_existing_paths() {
    let mut missing = Vec::new();
    for page in [
        "README.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/losses.md",
    ] {
        let paths = named_paths(&root().join(page));
        assert!(paths.len() > 2, "no paths were found in {page}");
        missing.extend(paths.into_iter().filter(|path| !path.exists()));
    }
    assert_eq!(missing, Vec::<PathBuf>::new());
}
