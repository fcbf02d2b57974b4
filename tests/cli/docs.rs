//! Pages that are made from the code. `POTSTILL_UPDATE=1 cargo test --release --workspace
//! --test cli -- docs` writes them again.

use std::fs;
use std::path::Path;

use crate::fixture::Run;

/// The page is what the code says, or becomes so.
#[track_caller]
pub(crate) fn is_current(path: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("POTSTILL_UPDATE").is_some() {
        fs::write(&file, text).unwrap();
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == text,
        "{path} is stale: `POTSTILL_UPDATE=1 cargo test --release --workspace --test cli -- docs` writes it again"
    );
}

#[test]
fn the_schema_is_current() {
    let said = Run::new().potstill(&["schema"]);
    assert_eq!((said.code, said.stderr.as_str()), (0, ""));
    is_current("potstill.schema.json", &said.stdout);
}

#[test]
fn the_page_of_the_run_file_is_current() {
    is_current("docs/config.md", &potstill::schema::config_page());
}

#[test]
fn the_page_of_events_is_current() {
    is_current("docs/events.md", &potstill::events::page());
}
