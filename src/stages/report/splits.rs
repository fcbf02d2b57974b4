//! Sizes of the splits and near-duplicates between them, read from what `curate` wrote.

use potstill_datasets::{FolderRows, NearDuplicate, Prompt, Split};
use potstill_eval::{SimilarPrompts, SplitFacts, SplitSize};

use crate::stages::{Context, curate, import};

/// Number of near-duplicates that the report shows.
const SHOWN: usize = 5;

/// Reads the sizes of the splits, and the first near-duplicates.
pub(super) fn splits(context: &Context) -> anyhow::Result<SplitFacts> {
    let mut sizes = Vec::new();
    for split in Split::ALL {
        let size = curate::split_counts(context, split)?;
        sizes.push(SplitSize {
            split,
            prompts: size.prompts,
            sequences: size.sequences,
        });
    }
    let folder = context.dir.verified("near_duplicates")?;
    let rows = FolderRows::<NearDuplicate>::open(&folder)?;
    let mut found: Vec<NearDuplicate> = rows.collect::<Result<_, _>>()?;
    found.sort_by_key(|near| near.split != Split::Test);
    let in_test = found.iter().filter(|near| near.split == Split::Test);
    Ok(SplitFacts {
        sizes,
        near_duplicates: found.len() as u64,
        near_duplicates_in_test: in_test.count() as u64,
        similar: similar(context, &found[..found.len().min(SHOWN)])?,
    })
}

/// Looks up the texts of near-duplicates.
fn similar(context: &Context, found: &[NearDuplicate]) -> anyhow::Result<Vec<SimilarPrompts>> {
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let prompts = import::published_by_id(&context.dir.verified("prompts")?)?;
    let text = |id: &str| prompts.get(id).map_or_else(String::new, text);
    let similar = found.iter().map(|near| SimilarPrompts {
        split: near.split,
        prompt: text(&near.prompt_id),
        train_prompt: text(&near.train_prompt_id),
        similarity: near.similarity,
    });
    Ok(similar.collect())
}

/// Returns the last message of a prompt, which is the one that differs from prompt to prompt.
fn text(prompt: &Prompt) -> String {
    let last = prompt.messages.last();
    last.map_or_else(String::new, |message| message.content.clone())
}
