//! Rates at which stored distributions are written, read and made into batches, on one thread.
//!
//! `cargo run --release -p potstill -p potstill-student --example signal_rates -- [SHARD]` measures a shard of `signals/`, or without
//! one a shard of synthetic distributions: 512 sequences of 200 positions, k = 64, V = 49,152. It prints the tokens a
//! second of each part and the largest resident memory after it (Linux only).

// Examples print what they measure.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use potstill_datasets::{Provenance, Signal, SignalRow, Table, read_shard, write_shard};
use potstill_student::{Arm, Batch, TrainSettings};

const SEQUENCES: u32 = 512;
const POSITIONS: u32 = 200;
const PROMPT: u32 = 56;
const K: u32 = 64;
const VOCABULARY: u32 = 49_152;
/// Number of sequences of a batch.
const BATCH: usize = 32;
/// Each part is repeated, and the fastest repetition counts.
const REPETITIONS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::temp_dir().join(format!("potstill-signal-rates-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let result = measure(&dir);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn measure(dir: &Path) -> Result<(), Box<dyn Error>> {
    let shard = dir.join("shard-00000.parquet");
    match std::env::args().nth(1).map(PathBuf::from) {
        Some(given) => {
            std::fs::copy(given, &shard)?;
        }
        None => {
            let signals: Vec<Signal> = (0..SEQUENCES).map(synthetic).collect();
            let write = || Ok(write_shard(&shard, &signals, &[provenance()])?);
            rate("write", (SEQUENCES * POSITIONS) as usize, write)?;
        }
    }
    let mut positions = 0;
    let mut sequences = 0;
    for signal in read_shard::<Signal>(&shard)? {
        positions += signal?.rows.len();
        sequences += 1;
    }
    let bytes = std::fs::metadata(&shard)?.len() as f64 / positions as f64;
    println!("{sequences} sequences, {positions} positions, {bytes:.1} bytes a position");
    println!("{:>16}: peak {} MiB", "one pass", peak_mib());

    rate("read_shard", positions, || {
        for signal in read_shard::<Signal>(&shard)? {
            std::hint::black_box(signal?);
        }
        Ok(())
    })?;
    let mut table = Table::<Signal>::open(dir)?;
    let settings = TrainSettings::default();
    let mut all = Vec::new();
    rate("Table::get", positions, || {
        all.clear();
        for row in 0..sequences as u32 {
            all.push(table.get(0, row)?);
        }
        Ok(())
    })?;
    rate("Batch::new", positions, || {
        for signals in all.chunks(BATCH) {
            let signals = signals.to_vec();
            let vocabulary = usize::MAX >> 33;
            let batch = Batch::new(signals, Arm::Student, &settings, 1, vocabulary)?;
            std::hint::black_box(batch);
        }
        Ok(())
    })?;
    rate("loader", positions, || {
        let mut table = Table::<Signal>::open(dir)?;
        for first in (0..sequences).step_by(BATCH) {
            let rows = first..(first + BATCH).min(sequences);
            let signals: Result<Vec<Signal>, _> =
                rows.map(|row| table.get(0, row as u32)).collect();
            let vocabulary = usize::MAX >> 33;
            let batch = Batch::new(signals?, Arm::Student, &settings, 1, vocabulary)?;
            std::hint::black_box(batch);
        }
        Ok(())
    })
}

/// Prints the rate of the fastest of some repetitions.
fn rate(
    name: &str,
    positions: usize,
    mut part: impl FnMut() -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let mut fastest = f64::INFINITY;
    for _ in 0..REPETITIONS {
        let began = Instant::now();
        part()?;
        fastest = fastest.min(began.elapsed().as_secs_f64());
    }
    let (rate, each) = (
        positions as f64 / fastest,
        fastest * 1e9 / positions.max(1) as f64,
    );
    println!(
        "{name:>16}: {:7.3} M tokens/s, {each:7.0} ns a token, peak {} MiB",
        rate / 1e6,
        peak_mib()
    );
    Ok(())
}

/// The largest resident memory of the process so far; 0 where the system does not tell.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}

fn provenance() -> Provenance {
    Provenance {
        teacher: "synthetic".to_owned(),
        revision: String::new(),
        engine: String::new(),
        dtype: "f32".to_owned(),
        tokenizer: String::new(),
        template: String::new(),
        sampling: "{}".to_owned(),
        temperatures: vec![2.0],
        licence: None,
    }
}

/// A sequence whose distributions fall from token to token, with ids all over the vocabulary.
fn synthetic(index: u32) -> Signal {
    let token = |t: u32| (index * 7919 + t * 104_729) % VOCABULARY;
    let row = |t: u32| {
        let steepness = 0.5 + f64::from((t * 31 + index * 17) % 97) / 97.0 * 2.0;
        let weights: Vec<f64> = (0..K)
            .map(|k| (f64::from(k) + 1.0).powf(-1.0 - steepness))
            .collect();
        let tail = 0.02 / steepness;
        let sum: f64 = weights.iter().sum();
        SignalRow {
            // The step is odd and V = 3 · 2^14, so a step that is no multiple of 3 visits each token once.
            ids: (0..K)
                .map(|k| (token(t) + k * 24_571) % VOCABULARY)
                .collect(),
            logprobs: weights
                .iter()
                .map(|weight| (weight / sum * (1.0 - tail)).ln() as f32)
                .collect(),
            tail_logprob: tail.ln() as f32,
            entropy: 1.0,
            log_z_at: vec![Some(0.5)],
            draw_ids: Vec::new(),
            draw_counts: Vec::new(),
        }
    };
    Signal {
        prompt_id: format!("{index:032x}"),
        sample_index: 0,
        token_ids: (0..PROMPT + POSITIONS).map(token).collect(),
        loss_mask: (0..PROMPT + POSITIONS).map(|t| t >= PROMPT).collect(),
        rows: (PROMPT..PROMPT + POSITIONS).map(row).collect(),
        provenance: 0,
    }
}
