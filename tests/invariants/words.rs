//! Words of doc comments and names. `docs/words.md` gives the rules and the glossary.

use std::fs;

use crate::root;
use crate::sources::sources;

/// Words that a doc comment must not start with, because the sentence would have no subject.
const OPENINGS: [&str; 21] = [
    "Of ",
    "That of ",
    "Those of ",
    "By what ",
    "By which ",
    "What ",
    "Which ",
    "Nowhere",
    "Such ",
    "They ",
    "It ",
    "How ",
    "Where ",
    "Whose ",
    "Whoever ",
    "So many ",
    "For which ",
    "In which ",
    "To what ",
    "With what ",
    "As it ",
];

/// Terms that have been replaced by the field's own.
const REPLACED: [&str; 5] = [
    "realised token",
    "accumulation window",
    "way out",
    "doors",
    "way_out",
];

/// The number and the text of each line that starts a doc comment.
fn doc_comments(text: &str) -> Vec<(usize, &str)> {
    let mut comments = Vec::new();
    let mut is_inside = false;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim_start();
        let comment = line.strip_prefix("///").or(line.strip_prefix("//!"));
        comments.extend(
            comment
                .filter(|_| !is_inside)
                .map(|c| (number, c.trim_start())),
        );
        is_inside = comment.is_some();
    }
    comments
}

#[test]
fn doc_comments_start_with_a_sentence_and_use_the_terms_of_the_glossary() {
    let mut found = Vec::new();
    for source in sources() {
        let path = source.path.strip_prefix(root()).unwrap().display();
        let text = fs::read_to_string(&source.path).unwrap();
        for (line, comment) in doc_comments(&text) {
            if OPENINGS.iter().any(|opening| comment.starts_with(opening)) {
                found.push(format!("{path}:{line}: {comment}"));
            }
        }
        for (index, line) in text.lines().enumerate() {
            if REPLACED.iter().any(|term| line.contains(term)) {
                found.push(format!("{path}:{}: {}", index + 1, line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}
