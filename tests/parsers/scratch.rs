//! Files and folders that the targets write their input to.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

thread_local! {
    static FOLDER: RefCell<Option<TempDir>> = const { RefCell::new(None) };
}

/// Returns an empty folder of this thread, in memory where the system has `/dev/shm`. The next call empties it again.
pub fn folder() -> PathBuf {
    FOLDER.with_borrow_mut(|folder| {
        // The old folder goes first, so that at most one exists.
        drop(folder.take());
        let memory = Path::new("/dev/shm");
        let new = match memory.is_dir() && std::env::var_os("TMPDIR").is_none() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        folder.insert(new.unwrap()).path().to_path_buf()
    })
}

/// Writes a file of [`folder`] and returns its path.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Splits an input into texts at the bytes of value 0, which no text of these formats has. A text that is absent is `None`.
pub fn texts<const N: usize>(data: &[u8]) -> [Option<&[u8]>; N] {
    let mut parts = data.splitn(N, |byte| *byte == 0);
    std::array::from_fn(|_| parts.next())
}

/// Checks that an error can be shown: its text is not empty, and does not grow with the input without bounds.
pub fn check_error(error: &dyn std::error::Error) {
    let text = error.to_string();
    assert!(!text.trim().is_empty(), "an error without a text");
    assert!(
        text.len() < 100_000,
        "an error of {} bytes: {}…",
        text.len(),
        text.chars().take(200).collect::<String>()
    );
}

/// Checks as [`check_error`] does, and that the error names a file.
pub fn check_error_names(error: &dyn std::error::Error, file: &str) {
    check_error(error);
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    assert!(text.contains(file), "an error without {file}: {text}");
}
