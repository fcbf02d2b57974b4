//! The parsers of foreign bytes on their seeds and on mutations of these. `fuzz/` runs the same targets with libFuzzer.
//!
//! An input that fails is kept in `target/tmp/parsers/`; it belongs into `corpus/` when the fault is mended.

// Clippy allows `unwrap` in test functions, but not in functions that tests share.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr
)]
// `fuzz/` names the targets too.
#![allow(unreachable_pub)]

mod models;
mod mutations;
mod replies;
mod rows;
mod run_file;
mod scratch;
mod seeds;
mod stored;
mod text;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Longest time that a target may take for an input.
const LONGEST: Duration = Duration::from_secs(20);
/// Stack of the thread that runs a target, as that of the program's worker threads.
const STACK_BYTES: usize = 8 << 20;
/// Most memory that a target may take for an input, in kilobytes.
const MOST_MEMORY_KB: u64 = 2 << 20;

/// A target: its name, which is that of its corpus, the function, and the number of mutated inputs.
struct Target {
    name: &'static str,
    run: fn(&[u8]),
    mutations: usize,
}

const fn target(name: &'static str, run: fn(&[u8]), mutations: usize) -> Target {
    Target {
        name,
        run,
        mutations,
    }
}

const TARGETS: [Target; 17] = [
    target("tokenizer", text::tokenizer, 600),
    target("template", text::template, 2000),
    target("json_rows", rows::json_rows, 1000),
    target("csv_rows", rows::csv_rows, 1000),
    target("parquet_rows", rows::parquet_rows, 1000),
    target("tables", stored::tables, 1500),
    target("journal", stored::journal, 500),
    target("journal_records", stored::journal_records, 500),
    target("manifest", stored::manifest, 1000),
    target("request_log", stored::request_log, 1000),
    target("replies", replies::replies, 2000),
    target("error_replies", replies::error_replies, 1000),
    target("run_file", run_file::run_file, 1000),
    target("config", models::config, 1500),
    target("safetensors", models::safetensors, 1000),
    target("weight_index", models::weight_index, 300),
    target("gguf", models::gguf, 1500),
];

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/parsers/corpus")
        .join(target);
    let mut paths: Vec<PathBuf> = match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
        Err(_) => Vec::new(),
    };
    paths.sort();
    let mut corpus = seeds::seeds(target);
    corpus.extend(paths.iter().map(|path| fs::read(path).unwrap()));
    corpus
}

/// The folder of inputs that failed.
fn failures() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("parsers");
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Peak of the process's resident memory since its last reset, in kilobytes; `None` where the system does not say it.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Runs a target on an input. A failure is written down and counted.
fn fails(target: &Target, input: &[u8], began: &Sender<PathBuf>) -> bool {
    let last = failures().join(format!("last-{}", target.name));
    fs::write(&last, input).unwrap();
    // Writing 5 resets the peak. Where that is not allowed, the peak is that of all inputs.
    let _ = fs::write("/proc/self/clear_refs", "5");
    began.send(last.clone()).unwrap();
    let result = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let took_too_much = peak_memory().is_some_and(|peak| peak > MOST_MEMORY_KB);
    if result.is_ok() && !took_too_much {
        return false;
    }
    let hash = crc(input);
    let kept = failures().join(format!("{}-{hash:08x}", target.name));
    fs::rename(last, &kept).unwrap();
    eprintln!(
        "{}: {} bytes fail (memory: {took_too_much}), kept as {}",
        target.name,
        input.len(),
        kept.display()
    );
    true
}

/// FNV-1a, for the name of a file.
fn crc(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// Runs all inputs of a target, and returns their number and that of the failures.
fn run(target: &Target, began: &Sender<PathBuf>) -> (usize, usize) {
    let corpus = corpus(target.name);
    assert!(!corpus.is_empty(), "{} has no seeds", target.name);
    let mut failed = corpus
        .iter()
        .filter(|input| fails(target, input, began))
        .count();
    let mut rng = ChaCha8Rng::seed_from_u64(u64::from(crc(target.name.as_bytes())));
    for _ in 0..target.mutations {
        let seed = &corpus[rng.random_range(0..corpus.len())];
        let input = mutations::mutated(&mut rng, seed, &corpus);
        failed += usize::from(fails(target, &input, began));
    }
    (corpus.len() + target.mutations, failed)
}

/// Runs a target on a thread of its own, and ends the process if an input takes too long.
fn run_watched(target: &'static Target) -> usize {
    let start = Instant::now();
    let (sender, inputs) = channel();
    let work = move || run(target, &sender);
    let thread = thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(work)
        .unwrap();
    let mut input = PathBuf::new();
    loop {
        match inputs.recv_timeout(LONGEST) {
            Ok(next) => input = next,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                eprintln!("{}: {} took over {LONGEST:?}", target.name, input.display());
                std::process::abort();
            }
        }
    }
    let (inputs, failed) = thread.join().unwrap();
    println!(
        "{}: {inputs} inputs, {failed} failures, {:?}",
        target.name,
        start.elapsed()
    );
    failed
}

#[test]
fn no_input_of_the_parsers_panics_hangs_or_takes_memory() {
    let only = std::env::var("POTSTILL_TARGET").ok();
    let chosen = TARGETS
        .iter()
        .filter(|target| only.as_deref().is_none_or(|only| only == target.name));
    let failed: usize = chosen.map(run_watched).sum();
    assert_eq!(failed, 0, "the inputs are in {}", failures().display());
}

/// Writes all seeds to the folder that `POTSTILL_SEEDS` names, for `scripts/fuzz.sh`.
#[test]
fn seeds_are_written_on_request() {
    let Some(folder) = std::env::var_os("POTSTILL_SEEDS") else {
        return;
    };
    for target in &TARGETS {
        let folder = Path::new(&folder).join(target.name);
        fs::create_dir_all(&folder).unwrap();
        for input in corpus(target.name) {
            fs::write(folder.join(format!("{:08x}", crc(&input))), input).unwrap();
        }
    }
}
