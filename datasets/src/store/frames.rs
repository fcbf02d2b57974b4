//! Frames of a store's journal. A decoded frame is kept until all of its entries were taken.

use serde::{Deserialize, Serialize};

use super::journal::Journal;
use super::record::{Entry, StoredRecord};
use crate::error::Error;
use crate::records::Provenance;

/// A frame of a store's journal.
#[derive(Serialize, Deserialize)]
pub(super) enum Frame<T> {
    /// The provenance of all entries that follow, up to the next frame of this kind.
    Provenance(Provenance),
    /// Entries that completed together.
    Entries(Vec<Entry<T>>),
}

/// Frames are kept up to this many bytes, as journaled; the frame in use is kept even if it is larger.
const CACHE_BYTES: u64 = 32 << 20;

/// Decoded frames whose entries are taken one by one, the least recently used first.
///
/// Units that are read in order find their entries in few frames at a time: those of the requests that were in flight
/// together. So each frame is decoded once, unless entries completed in an order that is far from that of the units.
pub(super) struct FrameCache<T> {
    frames: Vec<CachedFrame<T>>,
}

struct CachedFrame<T> {
    offset: u64,
    /// Length of the frame in the journal.
    bytes: u64,
    /// Entries that have not been taken.
    entries: Vec<Option<Entry<T>>>,
    /// Number of entries that have not been taken.
    left: usize,
}

impl<T> Default for FrameCache<T> {
    fn default() -> Self {
        FrameCache { frames: Vec::new() }
    }
}

impl<T: StoredRecord> FrameCache<T> {
    /// Takes the entry at `row` of the frame at `offset`.
    pub(super) fn take(
        &mut self,
        journal: &mut Journal,
        offset: u64,
        row: usize,
    ) -> Result<Entry<T>, Error> {
        let known = self.frames.iter().rposition(|frame| frame.offset == offset);
        let known = known.map(|at| self.frames.remove(at));
        let has_entry = |frame: &CachedFrame<T>| matches!(frame.entries.get(row), Some(Some(_)));
        let mut frame = match known.filter(has_entry) {
            Some(frame) => frame,
            None => decode(journal, offset)?,
        };
        let entry = frame.entries.get_mut(row).and_then(Option::take);
        let entry = entry.ok_or(Error::StoreChanged)?;
        frame.left -= 1;
        if frame.left > 0 {
            self.frames.push(frame);
            self.trim();
        }
        Ok(entry)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Drops the least recently used frames until the rest fits, but never the last one.
    fn trim(&mut self) {
        let mut bytes: u64 = self.frames.iter().map(|frame| frame.bytes).sum();
        let mut dropped = 0;
        for frame in &self.frames {
            if bytes <= CACHE_BYTES || dropped + 1 == self.frames.len() {
                break;
            }
            bytes -= frame.bytes;
            dropped += 1;
        }
        self.frames.drain(..dropped);
    }
}

fn decode<T: StoredRecord>(journal: &mut Journal, offset: u64) -> Result<CachedFrame<T>, Error> {
    let (span, frame) = journal.read_frame::<Frame<T>>(offset)?;
    let Frame::Entries(entries) = frame else {
        return Err(Error::StoreChanged);
    };
    Ok(CachedFrame {
        offset,
        bytes: u64::from(span.len),
        left: entries.len(),
        entries: entries.into_iter().map(Some).collect(),
    })
}
