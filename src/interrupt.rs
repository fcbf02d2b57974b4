//! Signals. The first Ctrl-C, or signal that asks the process to terminate, requests a stop at the next safe point; the
//! second one exits at once. A limit of file size or of processor time becomes an error or a stop, where the system would
//! kill the process without a word.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use anyhow::Context as _;

use crate::progress::Console;

static PRESSED: AtomicUsize = AtomicUsize::new(0);

/// Whether the soft limit of processor time (`ulimit -S -t`) was reached.
static OUT_OF_TIME: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Handles Ctrl-C, and the signals that ask a process to terminate. May be called once a process. `resume` is the command
/// that continues the work.
///
/// # Errors
/// When the system does not allow a handler.
pub fn watch(console: &Console, resume: &str) -> anyhow::Result<()> {
    let (console, resume) = (console.clone(), resume.to_owned());
    ctrlc::set_handler(move || match PRESSED.fetch_add(1, Ordering::SeqCst) {
        0 => console.note("stopping after the current batch; Ctrl-C again exits at once"),
        _ => {
            console.note(&format!(
                "stopped at once; finished work is kept\nhint: `{resume}` resumes"
            ));
            std::process::exit(1)
        }
    })
    .context("cannot install a handler for Ctrl-C")
}

/// Lets a write that would pass a limit of file size (`ulimit -f`) fail with an error, and a limit of processor time
/// request a stop. The default actions of these signals end the process. A process that aborts, which happens after a
/// message about memory or the stack, ends with exit code 1.
pub fn watch_limits() {
    #[cfg(unix)]
    {
        use signal_hook::consts::{SIGABRT, SIGXCPU, SIGXFSZ};
        // The flag of the file size is not read: with any handler the write itself fails. If the system refuses a
        // handler, its default action remains.
        let _ = signal_hook::flag::register(SIGXFSZ, Arc::default());
        let _ = signal_hook::flag::register(SIGXCPU, OUT_OF_TIME.clone());
        let always = Arc::new(AtomicBool::new(true));
        let _ = signal_hook::flag::register_conditional_shutdown(SIGABRT, 1, always);
    }
}

/// Whether a stop was requested.
pub fn is_requested() -> bool {
    PRESSED.load(Ordering::SeqCst) > 0 || OUT_OF_TIME.load(Ordering::SeqCst)
}

/// [`is_requested`] as the return value of a callback.
pub fn control_flow() -> ControlFlow<()> {
    match is_requested() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}
