//! Pages that are generated from the code. `POTSTILL_UPDATE=1 cargo test --release --workspace
//! --test cli -- docs` updates them.

use std::fs;
use std::path::Path;

use crate::fixture::Run;

/// Checks that a page equals the generated text; with `POTSTILL_UPDATE` set, writes the page.
#[track_caller]
pub(crate) fn check_page(path: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("POTSTILL_UPDATE").is_some() {
        fs::write(&file, text).unwrap();
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == text,
        "{path} is stale: `POTSTILL_UPDATE=1 cargo test --release --workspace --test cli -- docs` updates it"
    );
}

#[test]
fn the_schema_is_current() {
    let output = Run::new().potstill(&["schema"]);
    assert_eq!((output.code, output.stderr.as_str()), (0, ""));
    check_page("potstill.schema.json", &output.stdout);
}

#[test]
fn the_page_of_the_run_file_is_current() {
    check_page("docs/config.md", &potstill::schema::config_page());
}

#[test]
fn the_page_of_events_is_current() {
    check_page("docs/events.md", &potstill::events::page());
}
