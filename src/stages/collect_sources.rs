//! Where answers that are already paid for lie: published shards of the same teacher and
//! settings, and the journal of the collection in hand.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context as _;
use potstill_datasets::{
    Completion, FrameSpan, Journal, Manifest, Prompt, Provenance, Signal, Table, read_shard, shards,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::run_dir::RunDir;

/// An answer, and its distributions where the run file asks for them.
pub(super) type Answer = (Completion, Option<Signal>);

/// Which answer: the prompt's id, and which sample of it.
pub(super) type Unit = (String, u32);

/// What the journal holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Frame {
    /// Where the answers after it come from.
    Provenance(Provenance),
    /// The answers of one batch. Whole or not there.
    Batch(Vec<Answer>),
}

/// Where an answer lies.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// A row of a published folder: number of the folder, shard, row.
    Published(usize, u32, u32),
    /// A frame of the journal, and which of its answers; the frame's provenance.
    Journal(FrameSpan, usize, usize),
}

struct Published {
    completions: Table<Completion>,
    /// Where this run wants them.
    signals: Option<Table<Signal>>,
    /// For each shard, its footer's list as indices into [`Sources::provenance`].
    provenance: Vec<Vec<usize>>,
}

/// All answers that are already paid for.
pub(super) struct Sources {
    journal: Journal,
    published: Vec<Published>,
    places: HashMap<Unit, Place>,
    /// The frame read last: neighbours are asked for one after the other.
    frame: Option<(FrameSpan, Vec<Answer>)>,
    /// Every provenance that a row may have.
    pub(super) provenance: Vec<Provenance>,
    /// The one that new answers have, once it is in the journal.
    current: Option<usize>,
    /// Bytes of a torn batch that a crash left.
    pub(super) cut_bytes: u64,
}

impl Sources {
    /// Opens the journal, and every published folder whose manifest has these `answers`
    /// settings. Where no distributions are wanted, answers that have some serve as well.
    pub(super) fn open(dir: &RunDir, journal: &Path, answers: &Value) -> anyhow::Result<Sources> {
        let (journal, spans) = Journal::open(journal)?;
        let mut sources = Sources {
            cut_bytes: journal.cut_bytes(),
            journal,
            published: Vec::new(),
            places: HashMap::new(),
            frame: None,
            provenance: Vec::new(),
            current: None,
        };
        for span in spans {
            sources.add_frame(span)?;
        }
        let mut homes = vec!["completions".to_owned()];
        homes.extend(dir.old_outputs("completions"));
        for home in homes {
            let same = |m: &Manifest| {
                m.settings
                    .get("answers")
                    .is_some_and(|a| serves(a, answers))
            };
            if Manifest::read(&dir.path(&home))?.as_ref().is_some_and(same) {
                let signals = has_signals(answers);
                sources.add_published(dir, &home, signals)?;
            }
        }
        Ok(sources)
    }

    fn add_frame(&mut self, span: FrameSpan) -> anyhow::Result<()> {
        match self.journal.read::<Frame>(span)? {
            Frame::Provenance(provenance) => {
                self.current = Some(self.index_of(&provenance));
            }
            Frame::Batch(answers) => {
                let current = self.current.context(
                    "the journal's first record is not a provenance: it was not written by `collect`",
                )?;
                for (i, (completion, _)) in answers.into_iter().enumerate() {
                    let unit = (completion.prompt_id, completion.sample_index);
                    self.places.insert(unit, Place::Journal(span, i, current));
                }
            }
        }
        Ok(())
    }

    fn add_published(&mut self, dir: &RunDir, home: &str, signals: bool) -> anyhow::Result<()> {
        let folder = dir.path(home);
        let number = self.published.len();
        for (shard, path) in shards(&folder)?.iter().enumerate() {
            for (row, completion) in read_shard::<Completion>(path)?.enumerate() {
                let completion = completion?;
                let unit = (completion.prompt_id, completion.sample_index);
                let place = Place::Published(number, shard as u32, row as u32);
                self.places.entry(unit).or_insert(place);
            }
        }
        let completions = Table::open(&folder)?;
        let folder = dir.path(&home.replacen("completions", "signals", 1));
        let signals = match signals {
            true => Some(Table::open(&folder)?),
            false => None,
        };
        let lists: Vec<Vec<Provenance>> = completions
            .footers()
            .map(|f| f.provenance.clone())
            .collect();
        let provenance = lists
            .iter()
            .map(|list| list.iter().map(|p| self.index_of(p)).collect())
            .collect();
        self.published.push(Published {
            completions,
            signals,
            provenance,
        });
        Ok(())
    }

    fn index_of(&mut self, provenance: &Provenance) -> usize {
        let known = self.provenance.iter().position(|p| p == provenance);
        known.unwrap_or_else(|| {
            self.provenance.push(provenance.clone());
            self.provenance.len() - 1
        })
    }

    /// Whether an answer is there.
    pub(super) fn has(&self, unit: &Unit) -> bool {
        self.places.contains_key(unit)
    }

    /// How many answers are in published folders.
    pub(super) fn in_published(&self) -> usize {
        self.places
            .values()
            .filter(|p| matches!(p, Place::Published(..)))
            .count()
    }

    /// Whether everything that is there is among `units`.
    pub(super) fn all_in(&self, units: &std::collections::HashSet<Unit>) -> bool {
        self.places.keys().all(|unit| units.contains(unit))
    }

    /// Adds a batch. When this returns, it is on the disk.
    pub(super) fn add(
        &mut self,
        provenance: &Provenance,
        answers: Vec<Answer>,
    ) -> anyhow::Result<()> {
        let index = self.index_of(provenance);
        if self.current != Some(index) {
            self.journal
                .append(&Frame::Provenance(provenance.clone()))?;
            self.current = Some(index);
        }
        let units: Vec<Unit> = answers
            .iter()
            .map(|(c, _)| (c.prompt_id.clone(), c.sample_index))
            .collect();
        let span = self.journal.append(&Frame::Batch(answers))?;
        for (i, unit) in units.into_iter().enumerate() {
            self.places.insert(unit, Place::Journal(span, i, index));
        }
        Ok(())
    }

    /// An answer, its provenance being an index into [`Sources::provenance`].
    pub(super) fn get(&mut self, prompt: &Prompt, sample_index: u32) -> anyhow::Result<Answer> {
        let place = self.places.get(&(prompt.id.clone(), sample_index)).copied();
        let place =
            place.with_context(|| format!("no answer {sample_index} of prompt {}", prompt.id))?;
        let (mut completion, mut signal, provenance) = match place {
            Place::Published(number, shard, row) => {
                let folder = self.published.get_mut(number).context("no such folder")?;
                let completion = folder.completions.get(shard, row)?;
                let signals = folder.signals.as_mut();
                let signal = signals.map(|s| s.get(shard, row)).transpose()?;
                let list = folder.provenance.get(shard as usize);
                let index = list
                    .and_then(|l| l.get(completion.provenance as usize))
                    .copied();
                (
                    completion,
                    signal,
                    index.context("a row names no provenance")?,
                )
            }
            Place::Journal(span, i, provenance) => {
                if self.frame.as_ref().is_none_or(|(held, _)| *held != span) {
                    let Frame::Batch(answers) = self.journal.read(span)? else {
                        anyhow::bail!("the journal changed while it was read");
                    };
                    self.frame = Some((span, answers));
                }
                let answers = self.frame.as_ref().map(|(_, answers)| answers);
                let (completion, signal) = answers
                    .and_then(|a| a.get(i))
                    .cloned()
                    .context("the journal changed")?;
                (completion, signal, provenance)
            }
        };
        completion.provenance = provenance as u32;
        if let Some(signal) = &mut signal {
            signal.provenance = provenance as u32;
        }
        Ok((completion, signal))
    }
}

/// Whether answers of these settings hold all that is asked for.
fn serves(there: &Value, wanted: &Value) -> bool {
    let without_signals = |answers: &Value| {
        let mut answers = answers.clone();
        if let Some(fields) = answers.as_object_mut() {
            fields.remove("signals");
        }
        answers
    };
    there == wanted || !has_signals(wanted) && without_signals(there) == without_signals(wanted)
}

fn has_signals(answers: &Value) -> bool {
    answers.get("signals").is_some_and(|s| !s.is_null())
}
