//! Random access to a folder of shards by (shard, row), for a trainer that reads rows in its own order.
//!
//! Row groups are read as a whole. Decoded groups are kept as Arrow data up to 256 MiB, and the least recently used ones
//! are dropped first, so that memory is bounded for folders of any size.

use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;

use crate::error::Error;
use crate::parquet::{Footer, decode, shards};
use crate::reader::{OpenShard, rows_of};
use crate::schema::{Record, sequence_lengths};
use crate::signal::{SequenceLength, Signal};

/// Number of rows whose lengths are read at a time.
const LENGTH_ROWS: usize = 1024;
/// Largest size of the decoded row groups that are kept, in bytes; the group in use is kept even if it is larger.
const CACHE_BYTES: usize = 256 << 20;

/// A folder of shards, open for random access; at most 256 MiB of decoded rows are kept.
pub struct Table<R> {
    dir: PathBuf,
    shards: Vec<OpenShard>,
    /// Decoded groups, the most recently used one last.
    cache: Vec<Group>,
    record: PhantomData<R>,
}

struct Group {
    shard: usize,
    group: usize,
    rows: RecordBatch,
    bytes: usize,
}

impl<R: Record> Table<R> {
    /// Opens all shards of a folder and checks their footers and columns.
    ///
    /// # Errors
    /// As [`shards`] and [`read_footer`](crate::read_footer), and [`Error::InFile`] if the columns are not those of `R`.
    pub fn open(dir: &Path) -> Result<Table<R>, Error> {
        let shards = shards(dir)?
            .iter()
            .map(|path| OpenShard::open::<R>(path))
            .collect::<Result<_, _>>()?;
        Ok(Table {
            dir: dir.to_path_buf(),
            shards,
            cache: Vec::new(),
            record: PhantomData,
        })
    }

    /// Number of rows in all shards.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.footer.rows).sum()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The footers of the shards, in order.
    pub fn footers(&self) -> impl ExactSizeIterator<Item = &Footer> {
        self.shards.iter().map(|shard| &shard.footer)
    }

    /// Reads the row at a position.
    ///
    /// # Errors
    /// [`Error::NoSuchRow`]; [`Error::DamagedShard`] and [`Error::InFile`] naming the shard.
    pub fn get(&mut self, shard: u32, row: u32) -> Result<R, Error> {
        let no_such_row = || Error::NoSuchRow {
            dir: self.dir.clone(),
            shard,
            row,
        };
        let (index, row_in_shard) = (shard as usize, row as usize);
        let file = self.shards.get(index).ok_or_else(no_such_row)?;
        let (group, first_row) = group_of(file, row_in_shard).ok_or_else(no_such_row)?;
        let cached = self
            .cache
            .iter()
            .position(|cached| (cached.shard, cached.group) == (index, group));
        let recent = match cached {
            Some(position) => self.cache.remove(position),
            None => {
                let rows = read_group::<R>(file, group)?;
                let bytes = rows.get_array_memory_size();
                Group {
                    shard: index,
                    group,
                    rows,
                    bytes,
                }
            }
        };
        let one = recent.rows.slice(row_in_shard - first_row, 1);
        self.cache.push(recent);
        trim(&mut self.cache, CACHE_BYTES);
        rows_of(file, &one, row_in_shard)?
            .pop()
            .ok_or_else(no_such_row)
    }
}

impl Table<Signal> {
    /// Reads the lengths of all sequences, by shard and row. Distributions are not decoded.
    ///
    /// # Errors
    /// [`Error::DamagedShard`] and [`Error::InFile`] naming the shard.
    pub fn lengths(&self) -> Result<Vec<Vec<SequenceLength>>, Error> {
        self.shards.iter().map(shard_lengths).collect()
    }
}

fn shard_lengths(shard: &OpenShard) -> Result<Vec<SequenceLength>, Error> {
    let mut batches = shard.columns(&["token_ids", "loss_mask"], LENGTH_ROWS)?;
    let mut lengths = Vec::with_capacity(shard.footer.rows.min(1 << 20));
    while let Some(batch) = decode(&shard.path, || batches.next().transpose())? {
        let of_batch = sequence_lengths(&batch).map_err(|error| error.in_file(&shard.path))?;
        lengths.extend(of_batch);
    }
    match lengths.len() == shard.footer.rows {
        true => Ok(lengths),
        false => Err(shard.ends_early(lengths.len(), shard.footer.rows)),
    }
}

/// Finds the row group that holds a row of a shard, and the group's first row.
fn group_of(shard: &OpenShard, row: usize) -> Option<(usize, usize)> {
    let mut first_row = 0;
    for (index, group) in shard.metadata.metadata().row_groups().iter().enumerate() {
        let rows = usize::try_from(group.num_rows()).ok()?;
        if row < first_row + rows {
            return Some((index, first_row));
        }
        first_row += rows;
    }
    None
}

fn read_group<R: Record>(shard: &OpenShard, group: usize) -> Result<RecordBatch, Error> {
    let metadata = shard.metadata.metadata().row_groups().get(group);
    let rows = metadata
        .and_then(|group| usize::try_from(group.num_rows()).ok())
        .unwrap_or_default();
    // A damaged footer may name any number, but no more than this were written.
    let mut batches = shard.batches(Some(group), rows.min(R::GROUP_ROWS))?;
    match decode(&shard.path, || batches.next().transpose())? {
        Some(batch) if batch.num_rows() == rows => Ok(batch),
        other => Err(shard.ends_early(other.map_or(0, |batch| batch.num_rows()), rows)),
    }
}

/// Drops the least recently used groups until the rest fits, but never the last one.
fn trim(cache: &mut Vec<Group>, budget: usize) {
    let mut kept = 0;
    let mut first = cache.len();
    for group in cache.iter().rev() {
        kept += group.bytes;
        if kept > budget && first < cache.len() {
            break;
        }
        first -= 1;
    }
    cache.drain(..first);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(sizes: &[usize], budget: usize) -> Vec<usize> {
        let schema = crate::Signal::schema();
        let group = |(group, bytes): (usize, &usize)| Group {
            shard: 0,
            group,
            rows: RecordBatch::new_empty(schema.clone()),
            bytes: *bytes,
        };
        let mut cache: Vec<Group> = sizes.iter().enumerate().map(group).collect();
        trim(&mut cache, budget);
        cache.into_iter().map(|group| group.group).collect()
    }

    #[test]
    fn the_least_recently_used_groups_go_first() {
        assert_eq!(kept(&[], 10), [0; 0]);
        assert_eq!(kept(&[4, 3, 3], 10), [0, 1, 2]);
        assert_eq!(kept(&[4, 3, 3, 1], 10), [1, 2, 3]);
        assert_eq!(kept(&[1, 9, 9], 10), [2]);
        assert_eq!(kept(&[1, 99], 10), [1]);
    }
}
