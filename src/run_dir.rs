//! The run directory, and how a stage publishes into it.
//!
//! The key of a stage's output is a hash of the stage's settings and of its inputs' manifests. Published
//! output with the same key is up to date. Output with another key is kept in `earlier/`, in a folder that its key
//! names; a stage that needs that key again takes it back from there. Otherwise the stage writes a draft below
//! `.work/`, and [`RunDir::publish`] moves the draft into place: first it writes `plan.json` beside the complete
//! draft, which is the point of no return; then it moves the present output to `earlier/` and the draft to its place;
//! the manifest, `NAME_manifest.json`, comes last. If the process is killed in between, the next [`RunDir::open`]
//! finishes the publication, so that readers see either a complete published stage or none.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use potstill_datasets::{
    FileHash, Manifest, SCHEMA_VERSION, create_private_folder, hash_files, manifest_path,
    private_file, replace_file, stage_key,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::run_file::Loaded;

mod earlier;
mod ledger;
mod owner;
mod preview;
mod publication;
mod verify;

pub use earlier::{EarlierFolder, Entry, Started};
pub use ledger::{LedgerLine, now};
pub use owner::check_owner;
pub use preview::NotYetWritten;
use preview::Preview;
use publication::{PLAN_FILE, Publication, read_plan};
pub use verify::{Verification, Verifier};

/// Copy of the run file in its run directory.
const RUN_FILE: &str = "run.toml";

/// The purpose for which a run directory is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Stages run: the directory is created and locked. A directory that cannot be written is opened to read it.
    Work,
    /// A dry run: nothing is written and no lock is taken.
    Look,
}

/// An open run directory, locked against other processes until it is dropped.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    verifier: Verifier,
    /// `None` if the directory is only read.
    _lock: Option<File>,
    /// Why the directory cannot be written, if it cannot.
    unwritable: Option<String>,
    /// The state that a dry run assumes for the next stages; `None` if stages run.
    preview: Option<Preview>,
    access: Access,
}

/// Counts of a stage by name, such as `answers`.
pub type Counts = BTreeMap<String, u64>;

/// Outputs of a stage, and the settings and inputs that they depend on.
#[derive(Debug, Clone)]
pub struct StagePlan {
    /// The stage's name, such as `collect` or `export student`.
    pub stage: String,
    /// Folder whose manifest describes the stage; empty for the run directory itself.
    pub home: String,
    /// Every folder or file that the stage publishes, relative to the run directory.
    pub outputs: Vec<String>,
    /// Settings that the outputs depend on.
    pub settings: Value,
    /// Content hash of each input.
    pub inputs: BTreeMap<String, String>,
}

impl StagePlan {
    /// The key of the output: a hash of stage, settings and inputs.
    pub fn key(&self) -> String {
        stage_key(&self.stage, &self.settings, &self.inputs)
    }

    /// The manifest of an output with these files, counts and figures.
    pub fn manifest(
        &self,
        files: BTreeMap<String, FileHash>,
        counts: Counts,
        measures: BTreeMap<String, f64>,
    ) -> Manifest {
        Manifest {
            stage: self.stage.clone(),
            schema: SCHEMA_VERSION,
            key: self.key(),
            settings: self.settings.clone(),
            inputs: self.inputs.clone(),
            files,
            counts,
            measures,
        }
    }
}

/// Treatment of earlier output with another key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EarlierOutput {
    /// The earlier output is kept in `earlier/`.
    Keep,
    /// The earlier output is deleted, because the new output contains all of it.
    Replace,
}

impl RunDir {
    /// Opens the directory of a run. For work it is created, and a publication that was interrupted is finished.
    ///
    /// # Errors
    /// When the folder belongs to another run, is not a run directory, is in use, or cannot be created.
    pub fn open(root: &Path, run: &Loaded, access: Access) -> anyhow::Result<RunDir> {
        check_owner(root, run)?;
        let work = root.join(".work");
        let why = "this is a dry run, which writes nothing";
        let lock = match access {
            Access::Look => Err(why.to_owned()),
            Access::Work => lock(root, &work)?,
        };
        let (lock, unwritable) = match lock {
            Ok(lock) => (Some(lock), None),
            Err(why) => (None, Some(why)),
        };
        let dir = RunDir {
            root: root.to_owned(),
            verifier: Verifier::default(),
            preview: unwritable.is_some().then(Preview::default),
            _lock: lock,
            unwritable,
            access,
        };
        let copy = dir.path(RUN_FILE);
        if dir.unwritable.is_none()
            && fs::read_to_string(&copy).ok().as_deref() != Some(run.text.as_str())
        {
            replace_file(&copy, run.text.as_bytes())?;
        }
        dir.finish_publications(&work)?;
        Ok(dir)
    }

    /// Finishes the publications that were interrupted. A directory that is only read is looked at as if they were.
    fn finish_publications(&self, work: &Path) -> anyhow::Result<()> {
        let entries = match fs::read_dir(work) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e).with_context(|| format!("cannot list {}", work.display())),
        };
        for entry in entries {
            let draft = entry.with_context(|| format!("cannot list {}", work.display()))?;
            let draft = draft.path();
            let plan = draft.join(PLAN_FILE);
            match &self.preview {
                _ if !plan.exists() => {}
                Some(preview) => preview.assume_moved(self.open_moves(&read_plan(&plan)?)),
                None => self.finish(&draft)?,
            }
        }
        Ok(())
    }

    /// Checks that the directory may be written.
    ///
    /// # Errors
    /// When it cannot be written, with the reason.
    pub fn check_writable(&self) -> anyhow::Result<()> {
        match &self.unwritable {
            None => Ok(()),
            Some(why) => bail!(
                "the run directory {} cannot be written: {why}\nhint: make it writable, or choose another folder with `--run-dir DIR`",
                self.root.display()
            ),
        }
    }

    /// Path of a file or folder in the run directory. In a dry run, output that would be taken back from `earlier/` is
    /// found there.
    pub fn path(&self, name: &str) -> PathBuf {
        match &self.preview {
            Some(preview) => self.root.join(preview.resolve(name)),
            None => self.root.join(name),
        }
    }

    /// Reads the manifest of a published folder and checks that its files exist; `None` if there is none.
    ///
    /// # Errors
    /// When the manifest cannot be read, or a file that it names is absent or has another size.
    pub fn published(&self, home: &str) -> anyhow::Result<Option<Manifest>> {
        let preview = self.preview.as_ref();
        if preview.is_some_and(|p| p.is_gone(home) || p.pending(home).is_some()) {
            return Ok(None);
        }
        let folder = self.path(home);
        // A user who deletes or moves the folder wants the stage to run again.
        let manifest = match folder.exists() {
            true => Manifest::read(&self.described_by(home))?,
            false => None,
        };
        let Some(manifest) = manifest else {
            return Ok(None);
        };
        for (name, hash) in &manifest.files {
            let path = self.path(name);
            let found = fs::metadata(&path).map(|m| m.len()).ok();
            if found != Some(hash.bytes) {
                let found =
                    found.map_or("absent".to_owned(), |bytes| format!("{bytes} bytes long"));
                bail!(
                    "{} is {found}, but {} says {} bytes\nhint: restore the file, or move {} away so that `{}` runs again",
                    path.display(),
                    manifest_path(&folder).display(),
                    hash.bytes,
                    folder.display(),
                    manifest.stage
                );
            }
        }
        Ok(Some(manifest))
    }

    /// The folder beside which the manifest of a home is. In a dry run the manifest may be taken back without the home,
    /// which for `tune` also holds the trainings.
    fn described_by(&self, home: &str) -> PathBuf {
        let manifest = self.path(&manifest_name(home));
        let name = manifest.to_string_lossy();
        let folder = name.strip_suffix("_manifest.json");
        folder.map_or_else(|| self.path(home), PathBuf::from)
    }

    /// Reads the manifest of a folder that an earlier stage must have published.
    ///
    /// # Errors
    /// Those of [`RunDir::published`], and an error when the folder is not published: in a dry run [`NotYetWritten`] if a
    /// stage before would write it.
    pub fn require(&self, home: &str, stage: &str, run: &Loaded) -> anyhow::Result<Manifest> {
        if let Some(stage) = self.preview.as_ref().and_then(|p| p.pending(home)) {
            return Err(NotYetWritten { stage }.into());
        }
        self.published(home)?.with_context(|| {
            format!(
                "{} is not published yet\nhint: `potstill {stage} {file}` writes it, and `potstill run {file}` runs every stage",
                self.path(home).display(),
                file = run.path.display()
            )
        })
    }

    /// Creates a folder for unpublished work that the next process can continue, and gives its path. The work depends on
    /// the settings of the plan.
    ///
    /// # Errors
    /// When the folder cannot be created.
    pub fn work_path(&self, name: &str, plan: &StagePlan) -> anyhow::Result<PathBuf> {
        self.check_writable()?;
        let path = self.path(".work").join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Started::of(plan).write(&path)?;
        Ok(path)
    }

    /// Creates an empty folder for a stage's outputs, with a subfolder for each, and gives its path.
    ///
    /// # Errors
    /// When the folder cannot be emptied or created.
    pub fn draft(&self, plan: &StagePlan) -> anyhow::Result<PathBuf> {
        self.check_writable()?;
        let draft = self.root.join(draft_name(&plan.stage));
        if draft.exists() {
            fs::remove_dir_all(&draft)
                .with_context(|| format!("cannot empty {}", draft.display()))?;
        }
        let out = draft.join("out");
        for output in &plan.outputs {
            let folder = match Path::new(output).extension() {
                None => out.join(output),
                Some(_) => out.join(output).parent().unwrap_or(&out).to_owned(),
            };
            fs::create_dir_all(&folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        Ok(out)
    }

    /// Publishes a complete draft, and returns the folders below the run directory in which earlier output is kept.
    ///
    /// # Errors
    /// When a file cannot be read, written or renamed.
    pub fn publish(
        &self,
        plan: &StagePlan,
        earlier: EarlierOutput,
        counts: Counts,
        measures: BTreeMap<String, f64>,
    ) -> anyhow::Result<Vec<String>> {
        let out = self.root.join(draft_name(&plan.stage)).join("out");
        let manifest = plan.manifest(hash_files(&out)?, counts, measures);
        manifest.write(&out)?;
        let publication = self.publication(plan, earlier)?;
        self.carry_out(&plan.stage, &publication)?;
        self.remember(&manifest.files);
        Ok(publication.kept)
    }

    /// Assumes in a dry run that a stage runs, and returns the folders that would get what is at its place.
    ///
    /// # Errors
    /// When a manifest cannot be read.
    pub fn assume_run(
        &self,
        plan: &StagePlan,
        earlier: EarlierOutput,
    ) -> anyhow::Result<Vec<String>> {
        let Some(preview) = &self.preview else {
            return Ok(Vec::new());
        };
        let cleared = match preview.is_gone(&plan.home) {
            true => Publication::default(),
            false => self.clear(plan, earlier)?,
        };
        preview.assume_run(&plan.stage, &plan.home, &cleared);
        Ok(cleared.kept)
    }
}

/// Creates and locks the directory. The inner error says why the directory of an earlier run cannot be written.
fn lock(root: &Path, work: &Path) -> anyhow::Result<Result<File, String>> {
    let lock_path = work.join("lock");
    let mut options = private_file();
    options.write(true).create(true).truncate(false);
    let created = create_private_folder(root)
        .and_then(|()| fs::create_dir_all(work))
        .and_then(|()| options.open(&lock_path));
    let file = match created {
        Ok(file) => file,
        Err(e) if is_refused(&e) && root.join(RUN_FILE).is_file() => return Ok(Err(e.to_string())),
        Err(e) => {
            return Err(e)
                .with_context(|| format!("cannot create the run directory {}", root.display()));
        }
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => bail!(
            "another potstill process uses {}\nhint: wait until it ends, or stop it",
            root.display()
        ),
        Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {}
        Err(TryLockError::Error(e)) => {
            return Err(e).with_context(|| format!("cannot lock {}", lock_path.display()));
        }
    }
    Ok(Ok(file))
}

fn is_refused(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
    )
}

/// The folder of a stage's draft, below the run directory.
fn draft_name(stage: &str) -> String {
    format!(".work/draft-{}", stage.replace(' ', "-"))
}

/// Renames a file or folder, creates the folder that it gets into, and syncs that folder.
fn rename(from: &Path, to: &Path) -> anyhow::Result<()> {
    let parent = to.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent)
        .and_then(|()| fs::rename(from, to))
        .and_then(|()| File::open(parent)?.sync_all())
        .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
}

/// Name of a home's manifest, below the run directory.
fn manifest_name(home: &str) -> String {
    format!("{home}_manifest.json")
}

/// The first twelve digits of a key, for names of folders.
pub fn short(key: &str) -> &str {
    key.get(..12).unwrap_or(key)
}

/// Settings as JSON.
///
/// # Errors
/// When a value cannot be represented in JSON, which no table of the run file has.
pub fn settings_of(value: &impl Serialize) -> anyhow::Result<Value> {
    serde_json::to_value(value).context("cannot write settings as JSON")
}

#[cfg(test)]
mod tests;
