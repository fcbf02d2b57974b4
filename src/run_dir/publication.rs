//! Moves between a draft, the place of a stage's output, and `earlier/`.
//!
//! All moves of a publication are written to `plan.json` before the first one is made. A move is made if there is
//! something to move and nothing at its destination, and no move has as its source what another one has as its
//! destination before it. So the list can be carried out again from its beginning after an interruption at any point.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::Context;
use potstill_datasets::{read_sealed, write_sealed};
use serde::{Deserialize, Serialize};

use super::earlier::{EARLIER, Entry, entry_name, outputs_of};
use super::{Access, EarlierOutput, RunDir, StagePlan, draft_name, manifest_name, rename};

pub(super) const PLAN_FILE: &str = "plan.json";

/// Content of `plan.json`: how outputs are moved. Paths are relative to the run directory.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Publication {
    /// Source and destination of each move, in order.
    pub(super) moves: Vec<(String, String)>,
    /// Folder of `earlier/` whose content is moved out.
    pub(super) emptied: Option<String>,
    /// Folders of `earlier/` that get the present output.
    pub(super) kept: Vec<String>,
}

impl RunDir {
    /// Takes output back from `earlier/`; a dry run only assumes it. What is at its place goes to `earlier/`; the names of
    /// these folders are returned.
    ///
    /// # Errors
    /// When a file cannot be renamed.
    pub fn restore(&self, plan: &StagePlan, entry: &Entry) -> anyhow::Result<Vec<String>> {
        let restoration = self.restoration(plan, entry)?;
        match &self.preview {
            Some(preview) if self.access == Access::Look => preview.assume_restored(&restoration),
            _ => {
                self.check_writable()?;
                self.carry_out(&plan.stage, &restoration)?;
            }
        }
        Ok(restoration.kept)
    }

    /// Takes what is at the place of a plan to `earlier/`, for an output that is written in its place. Returns the names
    /// of the folders.
    ///
    /// # Errors
    /// When a file cannot be renamed.
    pub fn move_aside(&self, plan: &StagePlan) -> anyhow::Result<Vec<String>> {
        self.check_writable()?;
        let cleared = self.clear(plan, EarlierOutput::Keep)?;
        if !cleared.moves.is_empty() {
            self.carry_out(&plan.stage, &cleared)?;
        }
        Ok(cleared.kept)
    }

    /// Lists the moves that publish the draft of a stage.
    pub(super) fn publication(
        &self,
        plan: &StagePlan,
        earlier: EarlierOutput,
    ) -> anyhow::Result<Publication> {
        let mut publication = self.clear(plan, earlier)?;
        let draft = draft_name(&plan.stage);
        for output in &plan.outputs {
            let from = format!("{draft}/out/{output}");
            if self.path(&from).exists() {
                publication.moves.push((from, output.clone()));
            }
        }
        let manifest = format!("{draft}/out_manifest.json");
        publication
            .moves
            .push((manifest, manifest_name(&plan.home)));
        Ok(publication)
    }

    /// Lists the moves that take an entry of `earlier/` back to its place.
    pub(super) fn restoration(
        &self,
        plan: &StagePlan,
        entry: &Entry,
    ) -> anyhow::Result<Publication> {
        let mut publication = self.clear(plan, EarlierOutput::Keep)?;
        let mut outputs: BTreeSet<String> = plan.outputs.iter().cloned().collect();
        if let Some(manifest) = &entry.manifest {
            outputs.extend(outputs_of(manifest, &plan.home));
        }
        // The manifest is moved last, so that an output without its files is not published.
        for name in outputs.into_iter().chain([manifest_name(&plan.home)]) {
            let from = format!("{}/{name}", entry.name);
            if self.root.join(&from).exists() {
                publication.moves.push((from, name));
            }
        }
        publication.emptied = Some(entry.name.clone());
        Ok(publication)
    }

    /// Lists the moves that take what is at the place of a stage's outputs to `earlier/`. What has the same key as the
    /// plan, or is contained in the new output, is moved into the draft's folder, which is deleted.
    pub(super) fn clear(
        &self,
        plan: &StagePlan,
        earlier: EarlierOutput,
    ) -> anyhow::Result<Publication> {
        let mut cleared = Publication::default();
        let replaced = format!("{}/replaced", draft_name(&plan.stage));
        let mut left: BTreeSet<String> = plan.outputs.iter().cloned().collect();
        left.retain(|output| self.path(output).exists());
        // An output may belong to another stage's manifest, such as `signals` of `score` where `collect` writes it now.
        let others = plan.outputs.iter().filter(|output| **output != plan.home);
        for home in others.chain([&plan.home]) {
            let Some(present) = self.present(home)? else {
                continue;
            };
            let is_own = *home == plan.home;
            let mut names = present.outputs;
            if is_own {
                names.append(&mut left);
            }
            names.retain(|name| self.path(name).exists());
            let is_contained = is_own && earlier == EarlierOutput::Replace;
            let folder = match present.key == plan.key() || is_contained || !present.is_whole {
                true => replaced.clone(),
                false => entry_name(&present.stage, &present.key),
            };
            if !present.is_whole && present.has_manifest {
                // Without the folder that the manifest describes, nobody can tell what the rest belongs to.
                left.extend(std::mem::take(&mut names));
            }
            if folder != replaced && !names.is_empty() {
                if self.path(&folder).exists() {
                    let double = format!("{replaced}/{folder}");
                    cleared.moves.push((folder.clone(), double));
                }
                cleared.kept.push(folder.clone());
            }
            let manifest = present.has_manifest.then(|| manifest_name(home));
            for name in manifest.into_iter().chain(names) {
                left.remove(&name);
                let to = format!("{folder}/{name}");
                cleared.moves.push((name, to));
            }
        }
        if !left.is_empty() {
            let folder = self.unknown_entry(&plan.stage);
            let moves = left.into_iter().map(|name| {
                let to = format!("{folder}/{name}");
                (name, to)
            });
            cleared.moves.extend(moves);
            cleared.kept.push(folder);
        }
        Ok(cleared)
    }

    /// Returns a name in `earlier/` for output whose settings are not known.
    fn unknown_entry(&self, stage: &str) -> String {
        let name = |n: u32| format!("{EARLIER}/{}-unknown-{n}", stage.replace(' ', "-"));
        let free = (1..).map(name).find(|name| !self.path(name).exists());
        free.unwrap_or_else(|| name(0))
    }

    /// Makes the moves of a publication.
    pub(super) fn carry_out(&self, stage: &str, publication: &Publication) -> anyhow::Result<()> {
        let draft = self.root.join(draft_name(stage));
        fs::create_dir_all(&draft).with_context(|| format!("cannot create {}", draft.display()))?;
        write_sealed(&draft.join(PLAN_FILE), publication)?;
        self.finish(&draft)
    }

    /// Finishes a publication, which may have been interrupted at any point.
    pub(super) fn finish(&self, draft: &Path) -> anyhow::Result<()> {
        let plan_path = draft.join(PLAN_FILE);
        let publication = read_plan(&plan_path)?;
        for (from, to) in self.open_moves(&publication) {
            rename(&self.root.join(from), &self.root.join(to))?;
        }
        if let Some(entry) = &publication.emptied {
            remove_empty(&self.root.join(entry))?;
        }
        // The plan is deleted first, so that a partly deleted folder is not published again.
        fs::remove_file(&plan_path)
            .and_then(|()| fs::remove_dir_all(draft))
            .with_context(|| format!("cannot delete {}", draft.display()))
    }

    /// The moves of a publication that are not made yet.
    pub(super) fn open_moves<'a>(
        &self,
        publication: &'a Publication,
    ) -> impl Iterator<Item = (&'a String, &'a String)> {
        let (root, moves) = (self.root.clone(), publication.moves.iter());
        moves
            .map(|(from, to)| (from, to))
            .filter(move |(from, to)| root.join(from).exists() && !root.join(to).exists())
    }
}

/// Reads a `plan.json`.
pub(super) fn read_plan(path: &Path) -> anyhow::Result<Publication> {
    let hint = "delete its folder and run again";
    read_sealed(path, hint)?.with_context(|| format!("{} is absent", path.display()))
}

/// Deletes a folder and the folders below it, if they hold no file.
fn remove_empty(folder: &Path) -> anyhow::Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    let cannot = || format!("cannot empty {}", folder.display());
    let mut is_empty = true;
    for entry in fs::read_dir(folder).with_context(cannot)? {
        let path = entry.with_context(cannot)?.path();
        if path.is_dir() {
            remove_empty(&path)?;
        }
        is_empty &= !path.exists();
    }
    match is_empty {
        true => fs::remove_dir(folder).with_context(cannot),
        false => Ok(()),
    }
}
