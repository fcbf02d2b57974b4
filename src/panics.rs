//! Panics of the program: each ends the command with an error that says that this is a bug.

use std::any::Any;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::{Mutex, PoisonError};

use anyhow::anyhow;

use crate::progress;

/// Panics that were seen and not yet reported. A panic that a library catches, such as one of a decoder of damaged
/// files, is never reported.
static SEEN: Mutex<Vec<Seen>> = Mutex::new(Vec::new());

/// Largest number of panics that are kept.
const MOST_SEEN: usize = 64;

struct Seen {
    message: String,
    /// File and line, and the name of the thread.
    place: String,
}

/// Keeps messages of panics for [`guard`], instead of printing them at once.
pub fn watch() {
    std::panic::set_hook(Box::new(|info| {
        let message = text(info.payload());
        let place = place(info);
        // This panic cannot be caught: the process ends at once.
        if message.starts_with("panic in a ") {
            let earlier = seen().drain(..).next_back();
            let Seen { message, place } = earlier.unwrap_or(Seen { message, place });
            progress::fail(&describe(&message, &place));
            return;
        }
        let mut seen = seen();
        if seen.len() < MOST_SEEN {
            seen.push(Seen { message, place });
        }
    }));
}

/// Does the work, and turns a panic into an error.
///
/// # Errors
/// Those of the work, and a panic.
pub fn guard<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| {
        let message = text(payload.as_ref());
        let found = seen().drain(..).rfind(|seen| seen.message == message);
        let place = found.map_or("an unknown place".to_owned(), |seen| seen.place);
        Err(anyhow!(describe(&message, &place)))
    })
}

/// Words by which the runtime of a GPU says that an allocation failed: the errors' texts, and their names in Rust.
const GPU_REFUSALS: [&str; 6] = [
    "out of device memory",
    "out-of-memory",
    "can't allocate buffer of size",
    "OutOfMemory",
    "BufferTooBig",
    "OUT_OF_MEMORY",
];

/// Describes a panic for people. Memory of a GPU and a thread that are refused are not bugs, though the libraries panic.
fn describe(message: &str, place: &str) -> String {
    if GPU_REFUSALS.iter().any(|words| message.contains(words)) {
        return format!(
            "the device has not enough memory: {message}\nhint: lower `micro_batch` in [train] (for answers, `batch` in [collect]), or set `recompute = true`; `potstill plan` with `--memory-gb` lists what to lower and by how much"
        );
    }
    if message.contains("failed to spawn thread") || message.contains("ThreadPoolBuildError") {
        return format!(
            "the system refuses to start another thread: {message}\nhint: raise the limit of processes (`ulimit -u`) or of memory (`ulimit -v`), or stop other programs"
        );
    }
    format!(
        "this is a bug in Potstill: {message} ({place})\nhint: report it with this message, the command, and the run file without its keys; version {}",
        env!("CARGO_PKG_VERSION")
    )
}

fn seen() -> std::sync::MutexGuard<'static, Vec<Seen>> {
    SEEN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn text(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

fn place(info: &PanicHookInfo<'_>) -> String {
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("without a name").to_owned();
    match info.location() {
        Some(at) => format!("{}:{}, thread {thread}", at.file(), at.line()),
        None => format!("thread {thread}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{describe, guard};

    #[test]
    fn a_panic_becomes_an_error_that_says_it_is_a_bug() {
        let error = guard::<()>(|| panic!("index {} of {}", 3, 2)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("this is a bug in Potstill: index 3 of 2 ("),
            "{text}"
        );
        assert!(
            text.contains("\nhint: report it with this message"),
            "{text}"
        );
        assert_eq!(guard(|| Ok(1)).unwrap(), 1);
    }

    #[test]
    fn refused_memory_of_a_gpu_is_not_a_bug() {
        let messages = [
            "called `Result::unwrap()` on an `Err` value: out of device memory allocating 12 bytes",
            "An out-of-memory error happened during launch",
            "can't allocate buffer of size: 123",
        ];
        for message in messages {
            let text = describe(message, "x.rs:1");
            assert!(
                text.starts_with("the device has not enough memory: ") && !text.contains("bug"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_refused_thread_is_not_a_bug() {
        let text = describe("failed to spawn thread: Os { code: 11 }", "x.rs:1");
        assert!(
            text.contains("ulimit -u") && !text.contains("bug"),
            "{text}"
        );
    }
}
