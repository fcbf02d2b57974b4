//! Published prompts one at a time, so that memory does not grow with their number.

use std::path::{Path, PathBuf};

use potstill_datasets::{Prompt, Rows, read_footer, read_shard, shards};

/// The prompts of a folder, in order, a batch in memory at a time.
pub(super) struct Prompts {
    shards: std::vec::IntoIter<PathBuf>,
    rows: Option<Rows<Prompt>>,
}

impl Prompts {
    pub(super) fn open(dir: &Path) -> anyhow::Result<Prompts> {
        Ok(Prompts {
            shards: shards(dir)?.into_iter(),
            rows: None,
        })
    }
}

impl Iterator for Prompts {
    type Item = anyhow::Result<Prompt>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(prompt) = self.rows.as_mut().and_then(Iterator::next) {
                return Some(prompt.map_err(Into::into));
            }
            match read_shard::<Prompt>(&self.shards.next()?) {
                Ok(rows) => self.rows = Some(rows),
                Err(error) => return Some(Err(error.into())),
            }
        }
    }
}

/// How many prompts a folder has.
pub(super) fn count(dir: &Path) -> anyhow::Result<usize> {
    let mut count = 0;
    for shard in shards(dir)? {
        count += read_footer(&shard)?.rows;
    }
    Ok(count)
}
