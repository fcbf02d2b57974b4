//! Ctrl-C: the first one requests a stop at the next safe point, the second one exits at once.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;

use crate::progress::Console;

static PRESSED: AtomicUsize = AtomicUsize::new(0);

/// Handles Ctrl-C, and the signals that ask a process to terminate. May be called once a process.
///
/// # Errors
/// When the system does not allow a handler.
pub fn watch(console: &Console) -> anyhow::Result<()> {
    let console = console.clone();
    ctrlc::set_handler(move || match PRESSED.fetch_add(1, Ordering::SeqCst) {
        0 => console.note("stopping after the current batch; Ctrl-C again exits at once"),
        _ => std::process::exit(1),
    })
    .context("cannot install a handler for Ctrl-C")
}

/// Whether a stop was requested.
pub fn is_requested() -> bool {
    PRESSED.load(Ordering::SeqCst) > 0
}

/// [`is_requested`] as the return value of a callback.
pub fn control_flow() -> ControlFlow<()> {
    match is_requested() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}
