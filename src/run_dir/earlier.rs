//! `earlier/`: outputs that were replaced, each in a folder that its stage and the first digits of its key name. Below
//! the folder, files have the same paths as below the run directory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, bail};
use potstill_datasets::{Manifest, read_sealed, write_sealed};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{RunDir, StagePlan, draft_name, rename, short};

/// Folder of the outputs that were replaced.
pub(super) const EARLIER: &str = "earlier";
/// File that an unfinished training has in place of a manifest.
const STARTED_FILE: &str = "started.json";
const MANIFEST_END: &str = "_manifest.json";

/// Content of `started.json`: what an output depends on that is written in its place, such as a training.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Started {
    /// The stage's name.
    pub stage: String,
    /// Folder that describes the output, below the run directory.
    pub home: String,
    /// The key of the output.
    pub key: String,
    /// Settings that the output depends on.
    pub settings: Value,
    /// Content hash of each input.
    pub inputs: BTreeMap<String, String>,
}

impl Started {
    /// The file of a plan's output.
    pub(super) fn of(plan: &StagePlan) -> Started {
        Started {
            stage: plan.stage.clone(),
            home: plan.home.clone(),
            key: plan.key(),
            settings: plan.settings.clone(),
            inputs: plan.inputs.clone(),
        }
    }

    fn of_manifest(manifest: Manifest, home: &str) -> Started {
        Started {
            stage: manifest.stage,
            home: home.to_owned(),
            key: manifest.key,
            settings: manifest.settings,
            inputs: manifest.inputs,
        }
    }

    /// Writes the file into a folder.
    pub(super) fn write(&self, folder: &Path) -> anyhow::Result<()> {
        Ok(write_sealed(&folder.join(STARTED_FILE), self)?)
    }

    /// Reads the file of a folder; `None` if there is none.
    fn read(folder: &Path) -> anyhow::Result<Option<Started>> {
        let path = folder.join(STARTED_FILE);
        // An output may be a file, such as `tuning.json`.
        if !folder.is_dir() {
            return Ok(None);
        }
        let hint = "move its folder away, and the training starts anew";
        Ok(read_sealed(&path, hint)?)
    }
}

/// Output at its place in the run directory.
pub(super) struct Present {
    pub(super) stage: String,
    pub(super) key: String,
    pub(super) outputs: BTreeSet<String>,
    pub(super) has_manifest: bool,
    /// Whether the folder is there that the manifest describes, or the training has a checkpoint.
    pub(super) is_whole: bool,
}

/// Output in `earlier/` with the key that a stage needs.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Folder below the run directory, such as `earlier/collect-0123456789ab`.
    pub name: String,
    /// The manifest; `None` for an unfinished training.
    pub manifest: Option<Manifest>,
}

/// A folder of `earlier/`, as `clean` lists it.
#[derive(Debug)]
pub struct EarlierFolder {
    /// Folder below the run directory.
    pub name: String,
    /// Settings and inputs that the output depends on; `None` if they are not known.
    pub origin: Option<Started>,
    /// Whether the output has a manifest.
    pub is_finished: bool,
}

impl RunDir {
    /// Finds what is published, or being trained, at a place.
    pub(super) fn present(&self, home: &str) -> anyhow::Result<Option<Present>> {
        let folder = self.path(home);
        if let Some(manifest) = Manifest::read(&folder)? {
            return Ok(Some(Present {
                outputs: outputs_of(&manifest, home),
                stage: manifest.stage,
                key: manifest.key,
                has_manifest: true,
                is_whole: folder.exists(),
            }));
        }
        Ok(Started::read(&folder)?.map(|started| Present {
            stage: started.stage,
            key: started.key,
            outputs: BTreeSet::from([home.to_owned()]),
            has_manifest: false,
            is_whole: folder.join("checkpoints").exists(),
        }))
    }

    /// The key of the output that is being written in its place; `None` if there is none.
    ///
    /// # Errors
    /// When `started.json` cannot be read.
    pub fn started_key(&self, home: &str) -> anyhow::Result<Option<String>> {
        Ok(Started::read(&self.path(home))?.map(|started| started.key))
    }

    /// Creates the folder of an output that is written in its place, with a file that has its key. The folder gets its
    /// name when the file is complete.
    ///
    /// # Errors
    /// When the file cannot be written, or the folder exists.
    pub fn start(&self, plan: &StagePlan) -> anyhow::Result<()> {
        self.check_writable()?;
        let draft = self.root.join(draft_name(&plan.stage));
        let begun = draft.join("begun");
        fs::create_dir_all(&begun).with_context(|| format!("cannot create {}", begun.display()))?;
        Started::of(plan).write(&begun)?;
        rename(&begun, &self.path(&plan.home))?;
        fs::remove_dir_all(&draft).with_context(|| format!("cannot delete {}", draft.display()))
    }

    /// Finds the output of a plan in `earlier/`, and checks its files.
    ///
    /// # Errors
    /// When its manifest cannot be read, or a file is not the one that the manifest describes.
    pub fn find_earlier(&self, plan: &StagePlan) -> anyhow::Result<Option<Entry>> {
        let key = plan.key();
        let name = entry_name(&plan.stage, &key);
        let root = self.root.join(&name);
        let folder = root.join(&plan.home);
        if let Some(manifest) = Manifest::read(&folder)? {
            if manifest.key != key {
                return Ok(None);
            }
            check_files(&root, &manifest)?;
            for output in outputs_of(&manifest, &plan.home) {
                self.verified_in(&name, &output)?;
            }
            let manifest = Some(manifest);
            return Ok(Some(Entry { name, manifest }));
        }
        let started = Started::read(&folder)?;
        Ok(started.filter(|started| started.key == key).map(|_| Entry {
            name,
            manifest: None,
        }))
    }

    /// The folders of `earlier/` with outputs of a stage, below the run directory, in the order of their names.
    ///
    /// # Errors
    /// When `earlier/` cannot be listed.
    pub fn earlier_outputs(&self, stage: &str) -> anyhow::Result<Vec<String>> {
        let start = format!("{EARLIER}/{}-", stage.replace(' ', "-"));
        let mut names = self.earlier_names()?;
        names.retain(|name| name.starts_with(&start));
        Ok(names)
    }

    /// All folders of `earlier/`, in the order of their names. What a damaged folder holds is not known.
    ///
    /// # Errors
    /// When `earlier/` cannot be listed.
    pub fn earlier_folders(&self) -> anyhow::Result<Vec<EarlierFolder>> {
        let names = self.earlier_names()?.into_iter();
        let folders = names.map(|name| {
            let found = find_origin(&self.root.join(&name)).ok().flatten();
            EarlierFolder {
                is_finished: found.as_ref().is_some_and(|(_, is_finished)| *is_finished),
                origin: found.map(|(origin, _)| origin),
                name,
            }
        });
        Ok(folders.collect())
    }

    /// Folders below `.work/` with unfinished work, each with what the work depends on, if that is known.
    ///
    /// # Errors
    /// When `.work/` cannot be listed.
    pub fn unfinished(&self) -> anyhow::Result<Vec<(String, Option<Started>)>> {
        let mut names = self.list(".work")?;
        names.retain(|name| self.root.join(name).is_dir());
        let names = names.into_iter();
        let with_origin = names.map(|name| {
            let started = Started::read(&self.root.join(&name)).ok().flatten();
            (name, started)
        });
        Ok(with_origin.collect())
    }

    fn earlier_names(&self) -> anyhow::Result<Vec<String>> {
        self.list(EARLIER)
    }

    /// The entries of a folder, below the run directory, in the order of their names.
    fn list(&self, name: &str) -> anyhow::Result<Vec<String>> {
        let folder = self.root.join(name);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(|| format!("cannot list {}", folder.display())),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
            names.push(format!("{name}/{}", entry.file_name().to_string_lossy()));
        }
        names.sort();
        Ok(names)
    }

    /// Returns the settings and inputs that the output at a place depends on; `None` if nothing is there.
    ///
    /// # Errors
    /// When its manifest cannot be read.
    pub fn origin(&self, home: &str) -> anyhow::Result<Option<Started>> {
        let folder = self.path(home);
        match Manifest::read(&folder)?.filter(|_| folder.exists()) {
            Some(manifest) => Ok(Some(Started::of_manifest(manifest, home))),
            None => Started::read(&folder),
        }
    }
}

/// Finds out what a folder of `earlier/` holds, and whether it is finished: the manifest, or the file of a training, that
/// is nearest to its root.
fn find_origin(root: &Path) -> anyhow::Result<Option<(Started, bool)>> {
    let mut folders = VecDeque::from([root.to_owned()]);
    while let Some(folder) = folders.pop_front() {
        if let Some(started) = Started::read(&folder)? {
            return Ok(Some((started, false)));
        }
        let cannot = || format!("cannot list {}", folder.display());
        for entry in fs::read_dir(&folder).with_context(cannot)? {
            let path = entry.with_context(cannot)?.path();
            let text = path.to_string_lossy().into_owned();
            if let Some(described) = text.strip_suffix(MANIFEST_END).map(Path::new)
                && let Some(manifest) = Manifest::read(described)?
            {
                let home = described.strip_prefix(root).unwrap_or(described);
                let origin = Started::of_manifest(manifest, &home.to_string_lossy());
                return Ok(Some((origin, true)));
            }
            if path.is_dir() {
                folders.push_back(path);
            }
        }
    }
    Ok(None)
}

/// Checks that the files of a manifest are below `root`.
fn check_files(root: &Path, manifest: &Manifest) -> anyhow::Result<()> {
    for (name, hash) in &manifest.files {
        let path = root.join(name);
        let found = fs::metadata(&path).map(|m| m.len()).ok();
        if found != Some(hash.bytes) {
            bail!(
                "{} is {}, but its manifest says {} bytes\nhint: delete {}, and `{}` runs again",
                path.display(),
                found.map_or("absent".to_owned(), |bytes| format!("{bytes} bytes long")),
                hash.bytes,
                root.display(),
                manifest.stage
            );
        }
    }
    Ok(())
}

/// The folder in `earlier/` of a stage's output with this key.
pub(super) fn entry_name(stage: &str, key: &str) -> String {
    format!("{EARLIER}/{}-{}", stage.replace(' ', "-"), short(key))
}

/// The folders and files that a manifest describes: those beside its home folder.
pub(super) fn outputs_of(manifest: &Manifest, home: &str) -> BTreeSet<String> {
    let base = home
        .rsplit_once('/')
        .map_or(String::new(), |(base, _)| format!("{base}/"));
    let names = manifest.files.keys().filter_map(|file| {
        let rest = file.strip_prefix(&base)?;
        let first = rest.split('/').next()?;
        Some(format!("{base}{first}"))
    });
    names.collect()
}
