//! Target: run files.

use std::path::Path;

use potstill::run_file::parse;

use crate::scratch::check_error_names;

/// Input: a run file. Settings that are read can be written and read again.
pub fn run_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let path = Path::new("/runs/run.toml");
    match parse(path, text) {
        Ok(settings) => {
            let again = toml::to_string(&settings).unwrap();
            let read = parse(path, &again).unwrap();
            assert_eq!(again, toml::to_string(&read).unwrap());
        }
        Err(error) => check_error_names(&error, "run.toml"),
    }
}
