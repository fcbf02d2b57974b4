//! Ctrl-C: the first asks for a stop at the next safe place, the second stops at once.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;

use crate::progress::Console;

static PRESSED: AtomicUsize = AtomicUsize::new(0);

/// Watches for Ctrl-C, and for the signals that ask a process to end. Once a process.
///
/// # Errors
/// When the system does not let signals be caught.
pub fn watch(console: &Console) -> anyhow::Result<()> {
    let console = console.clone();
    ctrlc::set_handler(move || match PRESSED.fetch_add(1, Ordering::SeqCst) {
        0 => console.note("stopping after the batch in hand; once more stops at once"),
        _ => std::process::exit(1),
    })
    .context("cannot watch for Ctrl-C")
}

/// Whether a stop was asked for.
pub fn asked() -> bool {
    PRESSED.load(Ordering::SeqCst) > 0
}

/// [`asked`] as what a callback returns.
pub fn flow() -> ControlFlow<()> {
    match asked() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}
