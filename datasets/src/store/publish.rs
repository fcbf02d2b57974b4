//! Publication: entries of a store as shards, in the order of units.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::entries::Store;
use super::record::{self, Answer, Entry, StoredRecord};
use crate::distributions::Distributions;
use crate::error::Error;
use crate::parquet::{PROMPTS_PER_SHARD, ShardWriter, shard_name, shards};
use crate::reader::read_shard;
use crate::records::{Completion, Failed, FinishReason, NO_SIGNAL, Prompt, Provenance};
use crate::signal::Signal;

/// Folders of the tables that a publication writes; a table without a folder is not written. The folders must exist.
#[derive(Debug, Clone, Default)]
pub struct Tables {
    /// Folder of the answers.
    pub completions: Option<PathBuf>,
    /// Folder of the distributions, one row for each answer. An answer without distributions has an empty row.
    pub signals: Option<PathBuf>,
    /// Whether `signals` has the columns of tail draws.
    pub tail_draws: bool,
    /// Folder of the failures: units without an answer, and answers without distributions.
    pub failures: Option<PathBuf>,
}

/// Counts of a publication.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Published {
    /// Number of units with a record.
    pub answers: usize,
    /// Number of units without a record.
    pub failures: usize,
    /// Number of tokens of the answers, or of distributions where only these are published.
    pub tokens: usize,
    /// Number of answers that ended at the limit on tokens.
    pub truncated: usize,
    /// Number of answers whose distributions could not be made.
    pub without_signal: usize,
    /// Number of rows in the failures' table, by reason.
    pub reasons: BTreeMap<String, usize>,
    /// Reason and message of the first unit without a record.
    pub first_failure: Option<String>,
}

/// Writes the answers of a store: `samples(n)` units for the n-th of `prompts`, in order. A shard holds
/// [`PROMPTS_PER_SHARD`] prompts.
///
/// `complete` may add the signal of an answer that was stored without one; its error is the reason why there is none.
///
/// # Errors
/// [`Error::MissingUnit`] if a unit has no entry; those of [`Store::get`], [`ShardWriter`] and the iterator.
pub fn publish_answers(
    store: &mut Store<Answer>,
    prompts: impl Iterator<Item = Result<Prompt, Error>>,
    samples: &dyn Fn(usize) -> u32,
    tables: &Tables,
    complete: &mut dyn FnMut(&Prompt, &mut Answer) -> Result<(), String>,
) -> Result<Published, Error> {
    let mut publication = Publication::new(tables);
    let mut ordinal = 0;
    for (number, prompt) in prompts.enumerate() {
        let prompt = prompt?;
        if number.is_multiple_of(PROMPTS_PER_SHARD) {
            publication.begin_shard(store.provenance())?;
        }
        for sample_index in 0..samples(number) {
            let entry = entry_of(store, ordinal, &prompt.id, sample_index)?;
            ordinal += 1;
            publication.push_answer(&prompt, entry, complete)?;
        }
    }
    publication.finish()
}

/// Writes the signals of a store, whose units are the rows of the folder `completions`, shard for shard and row for row.
/// `provenance` turns the provenance of answers into that of their signals.
///
/// # Errors
/// As [`publish_answers`].
pub fn publish_signals(
    store: &mut Store<Signal>,
    completions: &Path,
    provenance: &dyn Fn(Provenance) -> Provenance,
    tables: &Tables,
) -> Result<Published, Error> {
    let mut publication = Publication::new(tables);
    let mut ordinal = 0;
    for path in shards(completions)? {
        let rows = read_shard::<Completion>(&path)?;
        let list = rows.footer().provenance.iter().cloned().map(provenance);
        publication.begin_shard(&list.collect::<Vec<_>>())?;
        for completion in rows {
            let completion = completion?;
            let entry = entry_of(
                store,
                ordinal,
                &completion.prompt_id,
                completion.sample_index,
            )?;
            ordinal += 1;
            publication.push_signal_entry(&completion, entry)?;
        }
    }
    publication.finish()
}

fn entry_of<T: StoredRecord>(
    store: &mut Store<T>,
    ordinal: u32,
    prompt_id: &str,
    sample_index: u32,
) -> Result<Entry<T>, Error> {
    let entry = store.get(ordinal)?;
    let entry = entry.filter(|entry| record::unit(entry) == (prompt_id, sample_index));
    entry.ok_or_else(|| Error::MissingUnit {
        prompt_id: prompt_id.to_owned(),
        sample_index,
    })
}

/// A publication in progress.
struct Publication<'a> {
    tables: &'a Tables,
    /// Number of shards begun.
    shards: usize,
    shard: Option<Shard>,
    published: Published,
}

/// Shards of the same number, one of each table that is written.
struct Shard {
    completions: Option<ShardWriter<Completion>>,
    signals: Option<ShardWriter<Signal>>,
    failures: Option<ShardWriter<Failed>>,
}

impl<'a> Publication<'a> {
    fn new(tables: &'a Tables) -> Publication<'a> {
        Publication {
            tables,
            shards: 0,
            shard: None,
            published: Published::default(),
        }
    }

    fn begin_shard(&mut self, provenance: &[Provenance]) -> Result<(), Error> {
        self.finish_shard()?;
        let name = shard_name(self.shards);
        let path = |folder: &Option<PathBuf>| folder.as_ref().map(|folder| folder.join(&name));
        let Tables {
            completions,
            signals,
            tail_draws,
            failures,
        } = self.tables;
        self.shard = Some(Shard {
            completions: path(completions)
                .map(|path| ShardWriter::new(&path, provenance))
                .transpose()?,
            signals: path(signals)
                .map(|path| ShardWriter::begin(&path, provenance, *tail_draws))
                .transpose()?,
            failures: path(failures)
                .map(|path| ShardWriter::new(&path, &[]))
                .transpose()?,
        });
        self.shards += 1;
        Ok(())
    }

    fn finish_shard(&mut self) -> Result<(), Error> {
        let Some(shard) = self.shard.take() else {
            return Ok(());
        };
        shard.completions.map(ShardWriter::finish).transpose()?;
        shard.failures.map(ShardWriter::finish).transpose()?;
        shard.signals.map(ShardWriter::finish).transpose()?;
        Ok(())
    }

    fn finish(mut self) -> Result<Published, Error> {
        self.finish_shard()?;
        Ok(self.published)
    }

    fn shard(&mut self) -> Result<&mut Shard, Error> {
        self.shard.as_mut().ok_or(Error::StoreChanged)
    }

    fn push_answer(
        &mut self,
        prompt: &Prompt,
        entry: Entry<Answer>,
        complete: &mut dyn FnMut(&Prompt, &mut Answer) -> Result<(), String>,
    ) -> Result<(), Error> {
        let mut answer = match entry {
            Ok(answer) => answer,
            Err(failed) => return self.push_failure(failed),
        };
        self.published.answers += 1;
        self.published.tokens += answer.tokens();
        let is_truncated = answer.completion.finish_reason == FinishReason::Length;
        self.published.truncated += usize::from(is_truncated);
        if self.tables.signals.is_some() {
            let completed = complete(prompt, &mut answer);
            let signal = completed.and_then(|()| {
                let signal = answer.signal.take();
                signal.ok_or_else(|| "the answer was stored without distributions".to_owned())
            });
            match signal {
                Ok(signal) => self.push_signal(signal)?,
                Err(message) => self.push_without_signal(&answer.completion, message)?,
            }
        }
        match &mut self.shard()?.completions {
            Some(completions) => completions.push(answer.completion),
            None => Ok(()),
        }
    }

    fn push_signal_entry(
        &mut self,
        completion: &Completion,
        entry: Entry<Signal>,
    ) -> Result<(), Error> {
        match entry {
            Ok(mut signal) => {
                self.published.answers += 1;
                self.published.tokens += signal.tokens();
                signal.set_provenance(completion.provenance);
                self.push_signal(signal)
            }
            Err(failed) => {
                self.push_signal(empty_signal(completion))?;
                self.push_failure(failed)
            }
        }
    }

    fn push_signal(&mut self, signal: Signal) -> Result<(), Error> {
        match &mut self.shard()?.signals {
            Some(signals) => signals.push(signal),
            None => Ok(()),
        }
    }

    fn push_without_signal(
        &mut self,
        completion: &Completion,
        message: String,
    ) -> Result<(), Error> {
        self.published.without_signal += 1;
        self.push_signal(empty_signal(completion))?;
        self.push_failure_row(Failed {
            prompt_id: completion.prompt_id.clone(),
            sample_index: completion.sample_index,
            reason: NO_SIGNAL.to_owned(),
            message,
        })
    }

    fn push_failure(&mut self, failed: Failed) -> Result<(), Error> {
        self.published.failures += 1;
        if self.published.first_failure.is_none() {
            self.published.first_failure = Some(format!("{}: {}", failed.reason, failed.message));
        }
        self.push_failure_row(failed)
    }

    fn push_failure_row(&mut self, failed: Failed) -> Result<(), Error> {
        let count = self.published.reasons.entry(failed.reason.clone());
        *count.or_default() += 1;
        match &mut self.shard()?.failures {
            Some(failures) => failures.push(failed),
            None => Ok(()),
        }
    }
}

/// A row without distributions, which keeps later rows in their places. `curate` leaves its answer out.
fn empty_signal(completion: &Completion) -> Signal {
    Signal {
        prompt_id: completion.prompt_id.clone(),
        sample_index: completion.sample_index,
        token_ids: Vec::new(),
        loss_mask: Vec::new(),
        rows: Distributions::default(),
        provenance: completion.provenance,
    }
}
