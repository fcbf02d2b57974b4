//! Advice on settings with which a training fits into memory.

use potstill_datasets::SequenceLength;
use potstill_model::Config;

use crate::adapter::{AdapterBase, AdapterSettings};
use crate::memory::{MemorySurroundings, TrainingMemory};
use crate::precision::Precision;
use crate::settings::TrainSettings;

/// Smallest share of the peak that a change has to save to be advised.
const SMALLEST_SAVING: f64 = 0.01;
/// Smallest `chunk_rows` that is advised: fewer rows make the products of the loss slow.
const FEWEST_CHUNK_ROWS: usize = 32;
/// Shortest `max_length` that is advised, tokens.
const SHORTEST: usize = 64;

/// A change of the settings that lowers the peak of memory, made after those before it in a list.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryAdvice {
    /// The change as in the run file, such as `recompute = true`.
    pub change: String,
    /// The price of the change in time or in the result.
    pub effect: &'static str,
    /// Settings with this change and those before it.
    pub settings: TrainSettings,
    /// Memory with these settings.
    pub memory: TrainingMemory,
}

/// Lists changes of the settings, those of least harm first, until a training fits into `limit` bytes; the last one fits
/// unless nothing does. A change that saves less than a hundredth is left out.
#[must_use]
pub fn memory_advice(
    config: &Config,
    settings: &TrainSettings,
    lengths: &[SequenceLength],
    surroundings: &MemorySurroundings,
    limit: u64,
) -> Vec<MemoryAdvice> {
    let predict =
        |settings: &TrainSettings| TrainingMemory::predict(config, settings, lengths, surroundings);
    let mut list: Vec<MemoryAdvice> = Vec::new();
    let mut now = (settings.clone(), predict(settings));
    for change in CHANGES {
        if now.1.peak() <= limit {
            break;
        }
        let peak = now.1.peak();
        let candidates: Vec<TrainSettings> = (change.values)(&now.0, lengths);
        let fits = |settings: &&TrainSettings| predict(settings).peak() <= limit;
        let first = candidates.iter().find(fits).or(candidates.last());
        let Some(settings) = first.cloned() else {
            continue;
        };
        let memory = predict(&settings);
        // The program itself does not get smaller.
        let [after, before] =
            [memory.peak(), peak].map(|peak| peak.saturating_sub(surroundings.program));
        if after as f64 > before as f64 * (1.0 - SMALLEST_SAVING) {
            continue;
        }
        list.push(MemoryAdvice {
            change: (change.text)(&settings),
            effect: change.effect,
            settings: settings.clone(),
            memory,
        });
        now = (settings, memory);
    }
    list
}

/// A kind of change.
struct Change {
    effect: &'static str,
    /// Settings with smaller and smaller values; empty if the change cannot be made.
    values: fn(&TrainSettings, &[SequenceLength]) -> Vec<TrainSettings>,
    text: fn(&TrainSettings) -> String,
}

/// All changes, those of least harm first.
const CHANGES: [Change; 8] = [
    Change {
        effect: "about a third slower, the same result",
        values: |settings, _| {
            let recompute = true;
            let changed = TrainSettings {
                recompute,
                ..settings.clone()
            };
            [changed]
                .into_iter()
                .filter(|_| !settings.recompute)
                .collect()
        },
        text: |_| "recompute = true".to_owned(),
    },
    Change {
        effect: "the same gradient, in more passes",
        values: |settings, _| {
            halved(settings.micro_batch.min(settings.batch), 1, |micro_batch| {
                TrainSettings {
                    micro_batch,
                    ..settings.clone()
                }
            })
        },
        text: |settings| format!("micro_batch = {}", settings.micro_batch),
    },
    Change {
        effect: "the same gradient, in more passes over the head",
        values: |settings, _| {
            halved(settings.chunk_rows, FEWEST_CHUNK_ROWS, |chunk_rows| {
                TrainSettings {
                    chunk_rows,
                    ..settings.clone()
                }
            })
        },
        text: |settings| format!("chunk_rows = {}", settings.chunk_rows),
    },
    Change {
        effect: "the same gradient, with more padding",
        values: |settings, _| {
            let changed = TrainSettings {
                packing: false,
                ..settings.clone()
            };
            [changed].into_iter().filter(|_| settings.packing).collect()
        },
        text: |_| "packing = false".to_owned(),
    },
    Change {
        effect: "masters, sums and moments stay in f32, products are rounded to bf16",
        values: |settings, _| {
            let changed = TrainSettings {
                precision: Precision::Bf16,
                ..settings.clone()
            };
            let is_wide = settings.precision == Precision::F32;
            [changed].into_iter().filter(|_| is_wide).collect()
        },
        text: |_| "precision = \"bf16\"".to_owned(),
    },
    Change {
        effect: "longer sequences are left out, or cut with `overlong = \"cut\"`",
        values: |settings, lengths| {
            let longest = lengths
                .iter()
                .map(|length| length.tokens)
                .max()
                .unwrap_or(0);
            halved(settings.max_length.min(longest), SHORTEST, |max_length| {
                TrainSettings {
                    max_length,
                    ..settings.clone()
                }
            })
        },
        text: |settings| format!("max_length = {}", settings.max_length),
    },
    Change {
        effect: "only low-rank matrices are trained, and the export merges them",
        values: |settings, _| {
            let changed = TrainSettings {
                adapter: Some(AdapterSettings::default()),
                ..settings.clone()
            };
            [changed]
                .into_iter()
                .filter(|_| settings.adapter.is_none())
                .collect()
        },
        text: |_| "adapter = { rank = 16 }".to_owned(),
    },
    Change {
        effect: "the frozen weights are rounded to 4 bits",
        values: |settings, _| {
            let Some(adapter) = &settings.adapter else {
                return Vec::new();
            };
            let changed = TrainSettings {
                adapter: Some(AdapterSettings {
                    base: Some(AdapterBase::Q4_0),
                    ..adapter.clone()
                }),
                ..settings.clone()
            };
            [changed]
                .into_iter()
                .filter(|_| adapter.base.is_none())
                .collect()
        },
        text: |settings| {
            let rank = settings.adapter.as_ref().map_or(16, |adapter| adapter.rank);
            format!("adapter = {{ rank = {rank}, base = \"q4_0\" }}")
        },
    },
];

/// Settings with half of `value`, a quarter of it, and so on down to `least`.
fn halved(
    value: usize,
    least: usize,
    settings: impl Fn(usize) -> TrainSettings,
) -> Vec<TrainSettings> {
    let mut list = Vec::new();
    let mut value = value;
    while value / 2 >= least {
        value /= 2;
        list.push(settings(value));
    }
    list
}
