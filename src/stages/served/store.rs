//! Where what a server gave lies: a journal of landed groups, and folders that were published before.
//!
//! A thing that was asked for is a unit, known by its ordinal. Of each there are 8 bytes in memory: where
//! it lies. While a journal is read back there are 16 more, the sorted hashes of the units' names.

use std::path::Path;

use anyhow::{Context as _, ensure};
use potstill_datasets::{
    Completion, Failed, FrameSpan, Journal, Provenance, Table, read_shard, shards,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What the journal holds.
#[derive(Debug, Serialize, Deserialize)]
enum Frame<T> {
    /// Where what comes after it comes from.
    Provenance(Provenance),
    /// What landed together. Whole or not there.
    Landed(Vec<Row<T>>),
}

/// One unit, over: once in a journal, unless a failure is asked for again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Row<T> {
    pub(super) prompt_id: String,
    pub(super) sample_index: u32,
    /// How many requests it took.
    pub(super) attempts: u32,
    pub(super) outcome: Outcome<T>,
}

/// What became of a unit.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Outcome<T> {
    /// It was answered.
    Got(T),
    /// It was not.
    Failed {
        /// A word.
        reason: String,
        /// A sentence.
        message: String,
    },
}

/// Units by the hashes of their names, for finding ordinals.
pub(super) struct Index {
    /// Sorted.
    entries: Vec<(u64, u32)>,
}

impl Index {
    /// Of `count` units in the order of their ordinals.
    ///
    /// # Errors
    /// Where two of them cannot be told apart, or there are more than 2³² − 1.
    pub(super) fn new(
        count: usize,
        units: impl Iterator<Item = anyhow::Result<(String, u32)>>,
    ) -> anyhow::Result<Index> {
        let mut entries = Vec::with_capacity(count);
        for (ordinal, unit) in units.enumerate() {
            let (prompt_id, sample_index) = unit?;
            let ordinal = u32::try_from(ordinal).context("more than 4e9 answers are asked for")?;
            entries.push((hash(&prompt_id, sample_index), ordinal));
        }
        entries.sort_unstable();
        let twice = entries.windows(2).find(|pair| match pair {
            [(a, _), (b, _)] => a == b,
            _ => false,
        });
        ensure!(
            twice.is_none(),
            "two prompts have the same id: run `import` again, which merges them"
        );
        Ok(Index { entries })
    }

    fn len(&self) -> usize {
        self.entries.len()
    }

    fn find(&self, prompt_id: &str, sample_index: u32) -> Option<u32> {
        let hash = hash(prompt_id, sample_index);
        let at = self.entries.binary_search_by_key(&hash, |(h, _)| *h).ok()?;
        self.entries.get(at).map(|(_, ordinal)| *ordinal)
    }
}

/// The first 64 bits of a prompt's id, which is a hash already, with the sample mixed in.
fn hash(prompt_id: &str, sample_index: u32) -> u64 {
    let first = prompt_id
        .get(..16)
        .map(|digits| u64::from_str_radix(digits, 16));
    let id = match first {
        Some(Ok(id)) => id,
        // FNV-1a, for an id that is not ours.
        _ => prompt_id.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        }),
    };
    id.wrapping_add(u64::from(sample_index).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// Where a unit lies, in 8 bytes: 2 bits of kind, and 46 of the frame's offset with 16 of the row in it,
/// or 12 of the folder, 24 of the shard and 24 of its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place(u64);

const OFFSET_BITS: u32 = 46;
const ROW_BITS: u32 = 16;
/// Rows of a frame at most.
const FRAME_ROWS: usize = 1 << ROW_BITS;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Nowhere,
    Answer,
    Failure,
    Published,
}

impl Place {
    const NOWHERE: Place = Place(0);

    fn in_journal(kind: Kind, offset: u64, row: usize) -> anyhow::Result<Place> {
        ensure!(
            offset < 1 << OFFSET_BITS && row < FRAME_ROWS,
            "the journal is larger than places in it can say"
        );
        Ok(Place((kind as u64) << 62 | offset << ROW_BITS | row as u64))
    }

    fn published(folder: usize, shard: usize, row: usize) -> anyhow::Result<Place> {
        ensure!(
            folder < 1 << 12 && shard < 1 << 24 && row < 1 << 24,
            "a published folder is larger than places in it can say"
        );
        let place = (folder as u64) << 48 | (shard as u64) << 24 | row as u64;
        Ok(Place((Kind::Published as u64) << 62 | place))
    }

    fn kind(self) -> Kind {
        match self.0 >> 62 {
            0 => Kind::Nowhere,
            1 => Kind::Answer,
            2 => Kind::Failure,
            _ => Kind::Published,
        }
    }

    /// Offset of the frame and row in it.
    fn frame(self) -> (u64, usize) {
        let offset = self.0 << 2 >> (2 + ROW_BITS);
        (offset, (self.0 & (FRAME_ROWS as u64 - 1)) as usize)
    }

    /// Folder, shard and row.
    fn row(self) -> (usize, u32, u32) {
        let part = |shift: u32, bits: u32| self.0 >> shift & ((1 << bits) - 1);
        (
            part(48, 12) as usize,
            part(24, 24) as u32,
            part(0, 24) as u32,
        )
    }
}

/// A unit that was read back, and the number of its provenance.
type Found<T> = (Row<T>, usize);

/// Reads a row of a folder: shard and row.
type ReadPublished<'a, T> = dyn FnMut(&mut Folder, u32, u32) -> anyhow::Result<Found<T>> + 'a;

/// A published folder of answers.
struct Folder {
    completions: Table<Completion>,
    /// For each shard, its footer's list as indices into [`Store::provenance`].
    provenance: Vec<Vec<usize>>,
}

/// How many units there are of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) answers: usize,
    pub(super) failures: usize,
    pub(super) missing: usize,
}

impl Tally {
    /// How many units are to be asked for, failures again or not.
    pub(super) fn to_ask(self, retry_failures: bool) -> usize {
        self.missing + if retry_failures { self.failures } else { 0 }
    }
}

/// Everything that is there of a list of units.
pub(super) struct Store<T> {
    journal: Journal,
    folders: Vec<Folder>,
    places: Vec<Place>,
    /// Every provenance that a row may have.
    pub(super) provenance: Vec<Provenance>,
    /// From which offset of the journal on which of them holds.
    eras: Vec<(u64, usize)>,
    /// Rows of units that are not asked for here.
    pub(super) others: usize,
    /// Bytes of a torn group that a crash left.
    pub(super) cut_bytes: u64,
    row: std::marker::PhantomData<T>,
}

impl<T: Serialize + DeserializeOwned> Store<T> {
    /// Opens a journal, or begins one.
    ///
    /// # Errors
    /// Where it is in use, damaged, or not one of ours.
    pub(super) fn open(path: &Path, index: &Index) -> anyhow::Result<Store<T>> {
        let (journal, spans) = Journal::open(path)?;
        let mut store = Store {
            cut_bytes: journal.cut_bytes(),
            journal,
            folders: Vec::new(),
            places: vec![Place::NOWHERE; index.len()],
            provenance: Vec::new(),
            eras: Vec::new(),
            others: 0,
            row: std::marker::PhantomData,
        };
        for span in spans {
            store.replay(span, index)?;
        }
        Ok(store)
    }

    fn replay(&mut self, span: FrameSpan, index: &Index) -> anyhow::Result<()> {
        let rows = match self.journal.read::<Frame<T>>(span)? {
            Frame::Provenance(provenance) => {
                let number = self.number_of(&provenance);
                self.eras.push((span.offset, number));
                return Ok(());
            }
            Frame::Landed(rows) => rows,
        };
        for (at, row) in rows.iter().enumerate() {
            let Some(ordinal) = index.find(&row.prompt_id, row.sample_index) else {
                self.others += 1;
                continue;
            };
            self.put(ordinal, row, span.offset, at)?;
        }
        Ok(())
    }

    /// An answer stays, whatever comes after it; a failure gives way.
    fn put(&mut self, ordinal: u32, row: &Row<T>, offset: u64, at: usize) -> anyhow::Result<()> {
        let kind = match row.outcome {
            Outcome::Got(_) => Kind::Answer,
            Outcome::Failed { .. } => Kind::Failure,
        };
        let place = self.places.get_mut(ordinal as usize);
        let place = place.context("a unit that was not asked for has landed")?;
        if !matches!(place.kind(), Kind::Answer | Kind::Published) {
            *place = Place::in_journal(kind, offset, at)?;
        }
        Ok(())
    }

    fn number_of(&mut self, provenance: &Provenance) -> usize {
        let known = self.provenance.iter().position(|p| p == provenance);
        known.unwrap_or_else(|| {
            self.provenance.push(provenance.clone());
            self.provenance.len() - 1
        })
    }

    /// Whether a unit has to be asked for: it is not there, or it failed and `retry` says to try again.
    pub(super) fn is_missing(&self, ordinal: u64, retry: bool) -> bool {
        match self.kind(ordinal) {
            Kind::Nowhere => true,
            Kind::Failure => retry,
            Kind::Answer | Kind::Published => false,
        }
    }

    fn kind(&self, ordinal: u64) -> Kind {
        let place = self.places.get(ordinal as usize);
        place.map_or(Kind::Nowhere, |place| place.kind())
    }

    pub(super) fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for place in &self.places {
            match place.kind() {
                Kind::Nowhere => tally.missing += 1,
                Kind::Failure => tally.failures += 1,
                Kind::Answer | Kind::Published => tally.answers += 1,
            }
        }
        tally
    }

    /// Bytes of the journal.
    pub(super) fn bytes(&self) -> u64 {
        self.journal.bytes()
    }

    /// Adds what landed, each with its ordinal. When this returns, it is on the disk.
    ///
    /// # Errors
    /// Where the disk refuses; what was there before is whole.
    pub(super) fn add(
        &mut self,
        provenance: &Provenance,
        landed: Vec<(u32, Row<T>)>,
    ) -> anyhow::Result<()> {
        if landed.is_empty() {
            return Ok(());
        }
        let number = self.number_of(provenance);
        if self
            .eras
            .last()
            .is_none_or(|(_, current)| *current != number)
        {
            let frame = Frame::<T>::Provenance(provenance.clone());
            let span = self.journal.append(&frame)?;
            self.eras.push((span.offset, number));
        }
        let mut landed = landed.into_iter().peekable();
        while landed.peek().is_some() {
            let (ordinals, rows): (Vec<u32>, Vec<Row<T>>) =
                landed.by_ref().take(FRAME_ROWS).unzip();
            let frame = Frame::Landed(rows);
            let span = self.journal.append(&frame)?;
            let Frame::Landed(rows) = frame else {
                continue;
            };
            for (at, (ordinal, row)) in ordinals.iter().zip(&rows).enumerate() {
                self.put(*ordinal, row, span.offset, at)?;
            }
        }
        Ok(())
    }

    /// The rows of units that follow one another, each frame being read once, with the number of
    /// their provenance. `None` where one is not there.
    fn read(
        &mut self,
        units: std::ops::Range<usize>,
        published: &mut ReadPublished<'_, T>,
    ) -> anyhow::Result<Vec<Option<Found<T>>>> {
        let mut rows: Vec<Option<Found<T>>> = units.clone().map(|_| None).collect();
        let mut in_journal = Vec::new();
        for (slot, ordinal) in units.enumerate() {
            let place = self.places.get(ordinal).copied();
            match place.map(|p| (p, p.kind())) {
                None | Some((_, Kind::Nowhere)) => {}
                Some((place, Kind::Published)) => {
                    let (folder, shard, row) = place.row();
                    let folder = self.folders.get_mut(folder).context("no such folder")?;
                    if let Some(at) = rows.get_mut(slot) {
                        *at = Some(published(folder, shard, row)?);
                    }
                }
                Some((place, _)) => in_journal.push((place.frame(), slot)),
            }
        }
        in_journal.sort_unstable();
        for of_frame in in_journal.chunk_by(|((a, _), _), ((b, _), _)| a == b) {
            let Some(((offset, _), _)) = of_frame.first() else {
                continue;
            };
            let era = self.eras.partition_point(|(from, _)| from <= offset);
            let era = era.checked_sub(1).and_then(|era| self.eras.get(era));
            let (_, number) = era.context("the journal's first record is not a provenance")?;
            let span = self.journal.span_at(*offset)?;
            let Frame::Landed(frame) = self.journal.read::<Frame<T>>(span)? else {
                anyhow::bail!("the journal changed while it was read");
            };
            let mut frame: Vec<Option<Row<T>>> = frame.into_iter().map(Some).collect();
            for ((_, at), slot) in of_frame {
                let row = frame.get_mut(*at).and_then(Option::take);
                let row = row.context("the journal changed while it was read")?;
                if let Some(slot) = rows.get_mut(*slot) {
                    *slot = Some((row, *number));
                }
            }
        }
        Ok(rows)
    }
}

impl Store<Completion> {
    /// Takes up a published folder of the same answers, and the failures beside it.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub(super) fn add_published(
        &mut self,
        completions: &Path,
        failures: &Path,
        index: &Index,
    ) -> anyhow::Result<Vec<(u32, Failed)>> {
        let number = self.folders.len();
        for (shard, path) in shards(completions)?.iter().enumerate() {
            for (row, completion) in read_shard::<Completion>(path)?.enumerate() {
                let completion = completion?;
                let ordinal = index.find(&completion.prompt_id, completion.sample_index);
                let place = ordinal.and_then(|ordinal| self.places.get_mut(ordinal as usize));
                match place {
                    Some(place) if !matches!(place.kind(), Kind::Answer | Kind::Published) => {
                        *place = Place::published(number, shard, row)?;
                    }
                    Some(_) => {}
                    None => self.others += 1,
                }
            }
        }
        let completions = Table::open(completions)?;
        let lists: Vec<Vec<Provenance>> = completions
            .footers()
            .map(|f| f.provenance.clone())
            .collect();
        let provenance = lists
            .iter()
            .map(|list| list.iter().map(|p| self.number_of(p)).collect())
            .collect();
        self.folders.push(Folder {
            completions,
            provenance,
        });
        let mut failed = Vec::new();
        if failures.is_dir() {
            for path in shards(failures)? {
                for failure in read_shard::<Failed>(&path)? {
                    let failure = failure?;
                    let ordinal = index.find(&failure.prompt_id, failure.sample_index);
                    let Some(ordinal) = ordinal else { continue };
                    if self.kind(u64::from(ordinal)) == Kind::Nowhere {
                        failed.push((ordinal, failure));
                    }
                }
            }
        }
        Ok(failed)
    }

    /// The answers and failures of units that follow one another; an answer's provenance is its
    /// number in [`Store::provenance`].
    ///
    /// # Errors
    /// Where the disk refuses, or what is there changed.
    pub(super) fn answers(
        &mut self,
        units: std::ops::Range<usize>,
    ) -> anyhow::Result<Vec<Option<Row<Completion>>>> {
        let rows = self.read(units, &mut |folder, shard, row| {
            let completion = folder.completions.get(shard, row)?;
            let list = folder.provenance.get(shard as usize);
            let number = list.and_then(|list| list.get(completion.provenance as usize));
            let number = *number.context("a row names no provenance")?;
            let row = Row {
                prompt_id: completion.prompt_id.clone(),
                sample_index: completion.sample_index,
                attempts: 0,
                outcome: Outcome::Got(completion),
            };
            Ok((row, number))
        })?;
        let numbered = rows.into_iter().map(|row| {
            row.map(|(mut row, number)| {
                if let Outcome::Got(completion) = &mut row.outcome {
                    completion.provenance = number as u32;
                }
                row
            })
        });
        Ok(numbered.collect())
    }
}

impl Store<potstill_datasets::Signal> {
    /// The distributions of units that follow one another.
    ///
    /// # Errors
    /// Where the disk refuses, or what is there changed.
    pub(super) fn signals(
        &mut self,
        units: std::ops::Range<usize>,
    ) -> anyhow::Result<Vec<Option<Row<potstill_datasets::Signal>>>> {
        let rows = self.read(units, &mut |_, _, _| anyhow::bail!("no such folder"))?;
        Ok(rows
            .into_iter()
            .map(|row| row.map(|(row, _)| row))
            .collect())
    }
}

#[cfg(test)]
mod tests;
