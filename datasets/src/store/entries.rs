//! The entries of an ordered list of units.

use std::path::Path;

use super::frames::{Frame, FrameCache};
use super::index::UnitIndex;
use super::journal::{FrameSpan, Journal};
use super::position::{FRAME_ENTRIES, Position, UnitState};
use super::record::{self, Answer, Entry, StoredRecord};
use crate::error::Error;
use crate::parquet::shards;
use crate::reader::{FolderRows, read_shard};
use crate::records::{Completion, Failed, Provenance};
use crate::table::Table;

/// Failures of a published folder that are copied into the journal at a time.
const FAILURES_AT_A_TIME: usize = 1024;

/// Reads a row of a published folder, by shard and row.
type ReadRow<T> = Box<dyn FnMut(u32, u32) -> Result<T, Error>>;

/// A folder that was published before and whose records a store serves.
struct PublishedFolder<T> {
    read: ReadRow<T>,
    /// For each shard, the provenance list of its footer as indices into [`Store::provenance`].
    provenance: Vec<Vec<usize>>,
}

/// Number of units in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Units with a record, in the journal or in a published folder.
    pub records: usize,
    /// Number of the `records` that are in a published folder.
    pub published: usize,
    /// Units that failed.
    pub failures: usize,
    /// Units without an entry.
    pub missing: usize,
}

impl Tally {
    /// Number of units to ask for; with `retry_failures`, failed units are asked for again.
    pub fn to_ask(self, retry_failures: bool) -> usize {
        self.missing + if retry_failures { self.failures } else { 0 }
    }
}

/// Entries of an ordered list of units, in a journal and in folders that were published before.
pub struct Store<T> {
    /// The journal; `None` if the entries are only counted.
    journal: Option<Journal>,
    folders: Vec<PublishedFolder<T>>,
    /// Position of each unit's entry, by ordinal.
    positions: Vec<Position>,
    provenance: Vec<Provenance>,
    /// Offsets in the journal, each with the index of the provenance that holds from there on.
    provenance_from: Vec<(u64, usize)>,
    unlisted: usize,
    frames: FrameCache<T>,
}

impl<T: StoredRecord> Store<T> {
    /// Opens or creates the journal at `path` and finds in it the units of `index`.
    ///
    /// # Errors
    /// As [`Journal::open`] and [`Journal::read`].
    pub fn open(path: &Path, index: &UnitIndex) -> Result<Store<T>, Error> {
        let (journal, spans) = Journal::open(path)?;
        Store::of_journal(Some(journal), spans, index)
    }

    /// Counts the units that the journal at `path` has, if it exists. Nothing is written, and no entry can be read or
    /// added; published folders can be counted too.
    ///
    /// # Errors
    /// As [`Journal::open`] and [`Journal::read`].
    pub fn counted(path: &Path, index: &UnitIndex) -> Result<Store<T>, Error> {
        if !path.exists() {
            return Store::of_journal(None, Vec::new(), index);
        }
        let (journal, spans) = Journal::look(path)?;
        let mut store = Store::of_journal(Some(journal), spans, index)?;
        store.journal = None;
        Ok(store)
    }

    fn of_journal(
        journal: Option<Journal>,
        spans: Vec<FrameSpan>,
        index: &UnitIndex,
    ) -> Result<Store<T>, Error> {
        let mut store = Store {
            journal,
            folders: Vec::new(),
            positions: vec![Position::MISSING; index.len()],
            provenance: Vec::new(),
            provenance_from: Vec::new(),
            unlisted: 0,
            frames: FrameCache::default(),
        };
        for span in spans {
            store.replay(span, index)?;
        }
        Ok(store)
    }

    fn replay(&mut self, span: FrameSpan, index: &UnitIndex) -> Result<(), Error> {
        let entries = match self.journal()?.read::<Frame<T>>(span)? {
            Frame::Provenance(provenance) => {
                let number = self.provenance_index(&provenance);
                self.provenance_from.push((span.offset, number));
                return Ok(());
            }
            Frame::Entries(entries) => entries,
        };
        for (row, entry) in entries.iter().enumerate() {
            let (prompt_id, sample_index) = record::unit(entry);
            match index.find(prompt_id, sample_index) {
                Some(ordinal) => self.note(ordinal, entry, span.offset, row)?,
                None => self.unlisted += 1,
            }
        }
        Ok(())
    }

    fn journal(&mut self) -> Result<&mut Journal, Error> {
        self.journal.as_mut().ok_or(Error::StoreCounted)
    }

    /// Notes the position of an entry. A record is never replaced; a failure gives way to any later entry.
    fn note(
        &mut self,
        ordinal: u32,
        entry: &Entry<T>,
        offset: u64,
        row: usize,
    ) -> Result<(), Error> {
        let Some(position) = self.positions.get_mut(ordinal as usize) else {
            return Err(Error::StoreLimit {
                what: "an entry has an ordinal beyond the last unit",
            });
        };
        if !position.state().has_record() {
            let state = match entry {
                Ok(_) => UnitState::Record,
                Err(_) => UnitState::Failure,
            };
            *position = Position::in_journal(state, offset, row)?;
        }
        Ok(())
    }

    fn provenance_index(&mut self, provenance: &Provenance) -> usize {
        let known = self.provenance.iter().position(|p| p == provenance);
        known.unwrap_or_else(|| {
            self.provenance.push(provenance.clone());
            self.provenance.len() - 1
        })
    }

    /// Every provenance that a record of this store may have: the list for the footers of its shards.
    pub fn provenance(&self) -> &[Provenance] {
        &self.provenance
    }

    /// Number of records in the journal and in published folders whose unit is not in the index, for example because
    /// its prompt was taken out of the data.
    pub fn unlisted(&self) -> usize {
        self.unlisted
    }

    /// Length of the journal in bytes.
    pub fn journal_bytes(&self) -> u64 {
        self.journal.as_ref().map_or(0, Journal::bytes)
    }

    /// Number of bytes of a torn last frame that were cut off when the journal was opened.
    pub fn cut_bytes(&self) -> u64 {
        self.journal.as_ref().map_or(0, Journal::cut_bytes)
    }

    fn state(&self, ordinal: u32) -> UnitState {
        let position = self.positions.get(ordinal as usize);
        position.map_or(UnitState::Missing, |position| position.state())
    }

    /// Whether a unit has to be asked for: it has no entry, or it failed and `retry_failures` is set.
    pub fn is_missing(&self, ordinal: u32, retry_failures: bool) -> bool {
        match self.state(ordinal) {
            UnitState::Missing => true,
            UnitState::Failure => retry_failures,
            UnitState::Record | UnitState::Published => false,
        }
    }

    /// Counts the units by state.
    pub fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for position in &self.positions {
            match position.state() {
                UnitState::Missing => tally.missing += 1,
                UnitState::Failure => tally.failures += 1,
                UnitState::Record => tally.records += 1,
                UnitState::Published => {
                    tally.records += 1;
                    tally.published += 1;
                }
            }
        }
        tally
    }

    /// Adds entries, each with the ordinal of its unit. When this returns, they are on the disk.
    ///
    /// # Errors
    /// As [`Journal::append`], and [`Error::StoreLimit`]; earlier entries stay whole.
    pub fn add(
        &mut self,
        provenance: &Provenance,
        entries: Vec<(u32, Entry<T>)>,
    ) -> Result<(), Error> {
        if entries.is_empty() {
            return Ok(());
        }
        let number = self.provenance_index(provenance);
        let current = self.provenance_from.last().map(|(_, current)| *current);
        if current != Some(number) {
            let frame = Frame::<T>::Provenance(provenance.clone());
            let span = self.journal()?.append(&frame)?;
            self.provenance_from.push((span.offset, number));
        }
        let mut entries = entries.into_iter().peekable();
        while entries.peek().is_some() {
            let (ordinals, entries): (Vec<u32>, Vec<Entry<T>>) =
                entries.by_ref().take(FRAME_ENTRIES).unzip();
            let frame = Frame::Entries(entries);
            let span = self.journal()?.append(&frame)?;
            let Frame::Entries(entries) = frame else {
                continue;
            };
            for (row, (ordinal, entry)) in ordinals.iter().zip(&entries).enumerate() {
                self.note(*ordinal, entry, span.offset, row)?;
            }
        }
        Ok(())
    }

    /// The entry of a unit, or `None` where there is none. The provenance of a record is an index into
    /// [`Store::provenance`].
    ///
    /// Entries that were journaled together are decoded together and kept until each was read once, so reading units in
    /// about the order in which they completed decodes each frame once.
    ///
    /// # Errors
    /// As [`Journal::read`] and [`Table::get`]; [`Error::StoreChanged`] if another process changed the files.
    pub fn get(&mut self, ordinal: u32) -> Result<Option<Entry<T>>, Error> {
        let position = self.positions.get(ordinal as usize).copied();
        let position = position.unwrap_or(Position::MISSING);
        let (mut entry, number) = match position.state() {
            UnitState::Missing => return Ok(None),
            UnitState::Published => self.read_published(position)?,
            UnitState::Record | UnitState::Failure => {
                let (offset, row) = position.frame();
                let from = self
                    .provenance_from
                    .partition_point(|(at, _)| *at <= offset);
                let number = from
                    .checked_sub(1)
                    .and_then(|at| self.provenance_from.get(at));
                let (_, number) = *number.ok_or(Error::StoreChanged)?;
                let journal = self.journal.as_mut().ok_or(Error::StoreCounted)?;
                (self.frames.take(journal, offset, row)?, number)
            }
        };
        if let Ok(record) = &mut entry {
            record.set_provenance(number as u32);
        }
        Ok(Some(entry))
    }

    fn read_published(&mut self, position: Position) -> Result<(Entry<T>, usize), Error> {
        let (folder, shard, row) = position.published_row();
        let folder = self.folders.get_mut(folder).ok_or(Error::StoreChanged)?;
        let record = (folder.read)(shard, row)?;
        let list = folder.provenance.get(shard as usize);
        let number = list.and_then(|list| list.get(record.provenance() as usize));
        let number = *number.ok_or(Error::StoreChanged)?;
        Ok((Ok(record), number))
    }
}

impl Store<Answer> {
    /// Serves the answers of a published folder as well, with the signals of the folder beside it where one is given.
    /// The journal's records take precedence.
    ///
    /// # Errors
    /// As [`read_shard`](crate::read_shard) and [`Table::open`]; [`Error::StoreLimit`].
    pub fn add_published(
        &mut self,
        completions: &Path,
        signals: Option<&Path>,
        index: &UnitIndex,
    ) -> Result<(), Error> {
        let number = self.folders.len();
        let mut provenance = Vec::new();
        for (shard, path) in shards(completions)?.iter().enumerate() {
            let rows = read_shard::<Completion>(path)?;
            let list = rows.footer().provenance.clone();
            provenance.push(list.iter().map(|p| self.provenance_index(p)).collect());
            for (row, completion) in rows.enumerate() {
                let completion = completion?;
                let ordinal = index.find(&completion.prompt_id, completion.sample_index);
                let position = ordinal.and_then(|ordinal| self.positions.get_mut(ordinal as usize));
                match position {
                    Some(position) if !position.state().has_record() => {
                        *position = Position::published(number, shard, row)?;
                    }
                    Some(_) => {}
                    None => self.unlisted += 1,
                }
            }
        }
        let mut completions = Table::<Completion>::open(completions)?;
        let mut signals = signals.map(Table::open).transpose()?;
        let read = move |shard, row| {
            Ok(Answer {
                completion: completions.get(shard, row)?,
                signal: signals
                    .as_mut()
                    .map(|table| table.get(shard, row))
                    .transpose()?,
            })
        };
        self.folders.push(PublishedFolder {
            read: Box::new(read),
            provenance,
        });
        Ok(())
    }

    /// Copies the failures of a published folder into the journal, for units that have no entry yet, so that these units
    /// are not asked for again. A store that only counts notes them.
    ///
    /// # Errors
    /// As [`read_shard`](crate::read_shard) and [`Store::add`].
    pub fn add_published_failures(
        &mut self,
        failures: &Path,
        provenance: &Provenance,
        index: &UnitIndex,
    ) -> Result<(), Error> {
        let mut entries = Vec::new();
        for failed in FolderRows::<Failed>::open(failures)? {
            let failed = failed?;
            let ordinal = index.find(&failed.prompt_id, failed.sample_index);
            let ordinal = ordinal.filter(|at| self.state(*at) == UnitState::Missing);
            if let (Some(ordinal), None) = (ordinal, &self.journal) {
                self.note(ordinal, &Err(failed), 0, 0)?;
            } else if let Some(ordinal) = ordinal {
                entries.push((ordinal, Err(failed)));
            }
            if entries.len() == FAILURES_AT_A_TIME {
                self.add(provenance, std::mem::take(&mut entries))?;
            }
        }
        self.add(provenance, entries)
    }
}

#[cfg(test)]
mod tests;
