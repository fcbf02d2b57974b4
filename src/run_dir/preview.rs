//! A dry run's picture of the run directory: what stages before would have changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::publication::Publication;

/// The changes that a dry run assumes earlier stages to have made.
#[derive(Debug, Default)]
pub(super) struct Preview {
    state: Mutex<Assumed>,
}

#[derive(Debug, Default)]
struct Assumed {
    /// Places below the run directory, each with the path where its content is now.
    moved: BTreeMap<String, String>,
    /// Homes of the stages that would run, each with the stage's name.
    pending: BTreeMap<String, String>,
    /// Outputs that would be moved to `earlier/`.
    gone: BTreeSet<String>,
}

/// The error of a dry run about an input that another stage would write first.
#[derive(Debug)]
pub struct NotYetWritten {
    /// The stage that would write it.
    pub stage: String,
}

impl std::fmt::Display for NotYetWritten {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` would run first", self.stage)
    }
}

impl std::error::Error for NotYetWritten {}

impl Preview {
    fn state(&self) -> MutexGuard<'_, Assumed> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Assumes that the open moves of an interrupted publication are made.
    pub(super) fn assume_moved<'a>(&self, moves: impl Iterator<Item = (&'a String, &'a String)>) {
        let mut state = self.state();
        for (from, to) in moves {
            state.moved.insert(to.clone(), from.clone());
        }
    }

    /// Assumes that output is taken back from `earlier/`.
    pub(super) fn assume_restored(&self, restoration: &Publication) {
        let Some(entry) = &restoration.emptied else {
            return;
        };
        let from_entry = |from: &str| {
            let rest = from.strip_prefix(entry.as_str());
            rest.is_some_and(|rest| rest.starts_with('/'))
        };
        let mut state = self.state();
        for (from, to) in &restoration.moves {
            match from_entry(from) {
                true => drop(state.moved.insert(to.clone(), from.clone())),
                false => drop(state.gone.insert(from.clone())),
            }
        }
    }

    /// Assumes that a stage runs, and what is at its place is moved as `cleared` says.
    pub(super) fn assume_run(&self, stage: &str, home: &str, cleared: &Publication) {
        let mut state = self.state();
        state.pending.insert(home.to_owned(), stage.to_owned());
        let sources = cleared.moves.iter().map(|(from, _)| from.clone());
        state.gone.extend(sources);
    }

    /// The stage that would write the output of a home first.
    pub(super) fn pending(&self, home: &str) -> Option<String> {
        self.state().pending.get(home).cloned()
    }

    /// Whether the output at a place would be moved away, or a folder that holds it.
    pub(super) fn is_gone(&self, name: &str) -> bool {
        let state = self.state();
        ancestors(name).any(|name| state.gone.contains(name))
            && !ancestors(name).any(|name| state.moved.contains_key(name))
    }

    /// Returns the name under which the content of a place is stored now.
    pub(super) fn resolve(&self, name: &str) -> String {
        let state = self.state();
        for place in ancestors(name) {
            if let Some(now) = state.moved.get(place) {
                return format!("{now}{}", &name[place.len()..]);
            }
        }
        name.to_owned()
    }
}

/// A path and the folders that it is in, the longest first.
fn ancestors(name: &str) -> impl Iterator<Item = &str> {
    let ends = name.rmatch_indices('/').map(|(at, _)| &name[..at]);
    std::iter::once(name).chain(ends)
}
