//! Names of types.

use std::collections::BTreeMap;

use crate::root;
use crate::sources::sources;

/// The type that a line declares.
fn declared_type(line: &str) -> Option<&str> {
    let mut declaration = line.trim_start();
    for visibility in ["pub ", "pub(crate) ", "pub(super) "] {
        declaration = declaration.strip_prefix(visibility).unwrap_or(declaration);
    }
    // An indented `type` belongs to a trait.
    let keywords = ["struct ", "enum ", "trait "].into_iter();
    let aliases = (!line.starts_with(' ')).then_some("type ");
    let mut names = keywords.chain(aliases);
    let name = names.find_map(|keyword| declaration.strip_prefix(keyword))?;
    name.split(|c: char| !c.is_alphanumeric() && c != '_')
        .next()
}

#[test]
fn type_names_are_unique_within_a_crate() {
    let mut found: BTreeMap<(&str, String), Vec<String>> = BTreeMap::new();
    for source in sources() {
        let path = source.path.strip_prefix(root()).unwrap().display();
        for name in source.code.lines().filter_map(declared_type) {
            let key = (source.folder, name.to_owned());
            found.entry(key).or_default().push(path.to_string());
        }
    }
    found.retain(|_, paths| paths.len() > 1);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn declarations_are_recognised() {
    assert_eq!(declared_type("pub(crate) struct Case<T> {"), Some("Case"));
    assert_eq!(declared_type("    enum Head {"), Some("Head"));
    assert_eq!(declared_type("type Cell = u8;"), Some("Cell"));
    assert_eq!(declared_type("    type Item = u8;"), None);
    assert_eq!(declared_type("let structure = 1;"), None);
}
