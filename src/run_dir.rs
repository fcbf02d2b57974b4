//! The run directory, and how a stage publishes into it.
//!
//! The key of a stage's output is a hash of the stage's settings and of its inputs' manifests. Published
//! output with the same key is up to date. Otherwise the stage writes a draft below `.work/`, and
//! [`RunDir::publish`] moves the draft into place: first it writes `plan.json` beside the complete draft,
//! which is the point of no return; then it renames each output, after renaming an earlier one to
//! `NAME.old-N`; the manifest, `NAME_manifest.json`, comes
//! last. If the process is killed in between, the next [`RunDir::open`]
//! finishes the publication, so that readers see either a complete published stage or none.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use potstill_datasets::{
    FileHash, Manifest, SCHEMA_VERSION, create_private_folder, hash_files, manifest_path,
    private_file, replace_file, stage_key,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::run_file::Loaded;

mod ledger;
mod owner;

pub use ledger::{LedgerLine, now};
pub use owner::check_owner;

/// Copy of the run file in its run directory.
const RUN_FILE: &str = "run.toml";
const PLAN_FILE: &str = "plan.json";

/// An open run directory, locked against other processes until it is dropped.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    _lock: File,
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
    /// The earlier output is kept as `NAME.old-N`.
    Keep,
    /// The earlier output is deleted, because the new output contains all of it.
    Replace,
}

/// Content of `plan.json`: how a complete draft is moved into place.
#[derive(Debug, Serialize, Deserialize)]
struct Publication {
    home: String,
    outputs: Vec<String>,
    earlier: EarlierOutput,
    /// The N of `NAME.old-N`.
    number: u32,
}

impl RunDir {
    /// Opens or creates the directory of a run, and finishes a publication that was interrupted.
    ///
    /// # Errors
    /// When the folder belongs to another run, is not a run directory, is in use, or cannot be written.
    pub fn open(root: &Path, run: &Loaded) -> anyhow::Result<RunDir> {
        check_owner(root, run)?;
        let work = root.join(".work");
        create_private_folder(root)
            .and_then(|()| fs::create_dir_all(&work))
            .with_context(|| format!("cannot create the run directory {}", root.display()))?;
        let lock_path = work.join("lock");
        let lock = (private_file().write(true).create(true).truncate(false))
            .open(&lock_path)
            .with_context(|| format!("cannot write {}", lock_path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "another potstill process uses {}\nhint: wait until it ends, or stop it",
                root.display()
            ),
            Err(TryLockError::Error(e)) if e.kind() == std::io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => {
                return Err(e).with_context(|| format!("cannot lock {}", lock_path.display()));
            }
        }
        let dir = RunDir {
            root: root.to_owned(),
            _lock: lock,
        };
        let copy = dir.path(RUN_FILE);
        if fs::read_to_string(&copy).ok().as_deref() != Some(run.text.as_str()) {
            replace_file(&copy, run.text.as_bytes())?;
        }
        for entry in
            fs::read_dir(&work).with_context(|| format!("cannot list {}", work.display()))?
        {
            let draft = entry
                .with_context(|| format!("cannot list {}", work.display()))?
                .path();
            if draft.join(PLAN_FILE).exists() {
                dir.finish(&draft)?;
            }
        }
        Ok(dir)
    }

    /// Path of a file or folder in the run directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Reads the manifest of a published folder and checks that its files exist; `None` if there is none.
    ///
    /// # Errors
    /// When the manifest cannot be read, or a file that it names is absent or has another size.
    pub fn published(&self, home: &str) -> anyhow::Result<Option<Manifest>> {
        let folder = self.path(home);
        // A user who deletes or moves the folder wants the stage to run again.
        let manifest = match folder.exists() {
            true => Manifest::read(&folder)?,
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

    /// Reads the manifest of a folder that an earlier stage must have published.
    ///
    /// # Errors
    /// Those of [`RunDir::published`], and an error when the folder is not published.
    pub fn require(&self, home: &str, stage: &str, run: &Loaded) -> anyhow::Result<Manifest> {
        self.published(home)?.with_context(|| {
            format!(
                "{} is not published yet\nhint: `potstill {stage} {file}` writes it, and `potstill run {file}` runs every stage",
                self.path(home).display(),
                file = run.path.display()
            )
        })
    }

    /// Creates a folder for unpublished work that the next process can continue, and gives its path.
    ///
    /// # Errors
    /// When the folder cannot be created.
    pub fn work_path(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.path(".work").join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    }

    /// Creates an empty folder for a stage's outputs, with a subfolder for each, and gives its path.
    ///
    /// # Errors
    /// When the folder cannot be emptied or created.
    pub fn draft(&self, plan: &StagePlan) -> anyhow::Result<PathBuf> {
        let draft = self.draft_path(&plan.stage);
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

    fn draft_path(&self, stage: &str) -> PathBuf {
        self.path(".work")
            .join(format!("draft-{}", stage.replace(' ', "-")))
    }

    /// Publishes a complete draft, and gives the names under which earlier outputs were kept.
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
        let draft = self.draft_path(&plan.stage);
        let out = draft.join("out");
        let manifest = plan.manifest(hash_files(&out)?, counts, measures);
        manifest.write(&out)?;
        let publication = Publication {
            home: plan.home.clone(),
            outputs: plan.outputs.clone(),
            earlier,
            number: self.next_number(&plan.outputs),
        };
        replace_file(&draft.join(PLAN_FILE), &serde_json::to_vec(&publication)?)?;
        self.finish(&draft)
    }

    /// The smallest N for which no output has a `NAME.old-N`.
    fn next_number(&self, outputs: &[String]) -> u32 {
        let taken = |n: &u32| outputs.iter().any(|o| self.path(&old_name(o, *n)).exists());
        (1..).find(|n| !taken(n)).unwrap_or(1)
    }

    /// Finishes a publication. Each step checks the files first, so that the publication can be interrupted
    /// and repeated at any point.
    fn finish(&self, draft: &Path) -> anyhow::Result<Vec<String>> {
        let plan_path = draft.join(PLAN_FILE);
        let text =
            fs::read(&plan_path).with_context(|| format!("cannot read {}", plan_path.display()))?;
        let publication: Publication = serde_json::from_slice(&text).with_context(|| {
            format!(
                "{} is damaged\nhint: delete its folder and run again",
                plan_path.display()
            )
        })?;
        let manifest = manifest_path(&draft.join("out"));
        let published = manifest_path(&self.path(&publication.home));
        if manifest.exists() && published.exists() {
            let aside = match publication.earlier {
                EarlierOutput::Keep if !publication.home.is_empty() => {
                    let old = old_name(&publication.home, publication.number);
                    manifest_path(&self.path(&old))
                }
                _ => manifest_path(&draft.join("replaced")),
            };
            rename(&published, &aside)?;
        }
        for output in &publication.outputs {
            let (from, to) = (draft.join("out").join(output), self.path(output));
            if !from.exists() {
                continue;
            }
            if to.exists() {
                let aside = match publication.earlier {
                    EarlierOutput::Keep => self.path(&old_name(output, publication.number)),
                    EarlierOutput::Replace => draft.join("replaced").join(output),
                };
                rename(&to, &aside)?;
            }
            rename(&from, &to)?;
        }
        if manifest.exists() {
            rename(&manifest, &published)?;
        }
        let kept: Vec<String> = publication
            .outputs
            .iter()
            .map(|o| old_name(o, publication.number))
            .filter(|o| self.path(o).exists())
            .collect();
        // The plan is deleted first, so that a partly deleted folder is not published again.
        fs::remove_file(&plan_path)
            .and_then(|()| fs::remove_dir_all(draft))
            .with_context(|| format!("cannot delete {}", draft.display()))?;
        Ok(kept)
    }

    /// Renames output to `NAME.old-N` that no publication replaces, such as a student that is trained in
    /// place. Gives the new name.
    ///
    /// # Errors
    /// When the output cannot be renamed.
    pub fn move_aside(&self, output: &str) -> anyhow::Result<String> {
        let old = old_name(output, self.next_number(&[output.to_owned()]));
        let manifest = manifest_path(&self.path(output));
        if manifest.exists() {
            rename(&manifest, &manifest_path(&self.path(&old)))?;
        }
        rename(&self.path(output), &self.path(&old))?;
        Ok(old)
    }

    /// Names of the existing folders `NAME.old-1`, `NAME.old-2`, ….
    pub fn old_outputs(&self, output: &str) -> Vec<String> {
        let names = (1..).map(|n| old_name(output, n));
        names.take_while(|name| self.path(name).exists()).collect()
    }
}

fn old_name(output: &str, number: u32) -> String {
    format!("{output}.old-{number}")
}

fn rename(from: &Path, to: &Path) -> anyhow::Result<()> {
    let parent = to.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent)
        .and_then(|()| fs::rename(from, to))
        .and_then(|()| File::open(parent)?.sync_all())
        .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
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
mod tests {
    use serde_json::json;

    use super::*;

    const RUN: &str = "[run]\nname = \"tiny\"\n[import]\npath = \"p\"\ncolumns = { text = \"t\" }\n[teacher]\npath = \"m\"\n[collect]\nsignals = { top_k = 4 }\n[student]\nlayers = { every = 2 }\n";

    fn loaded(text: &str) -> Loaded {
        let path = PathBuf::from("tiny.toml");
        let settings = crate::run_file::parse(&path, text).unwrap();
        Loaded {
            settings,
            path,
            text: text.to_owned(),
            hub: BTreeMap::new(),
            gguf: BTreeMap::new(),
        }
    }

    /// An open run directory of the tiny run.
    pub(super) fn open(root: &Path) -> RunDir {
        RunDir::open(root, &loaded(RUN)).unwrap()
    }

    fn plan(version: u32) -> StagePlan {
        StagePlan {
            stage: "collect".to_owned(),
            home: "completions".to_owned(),
            outputs: ["signals", "completions", "notes.json"]
                .map(str::to_owned)
                .to_vec(),
            settings: json!({ "version": version }),
            inputs: BTreeMap::new(),
        }
    }

    /// Writes a draft and leaves it unpublished.
    fn draft(dir: &RunDir, version: u32) {
        let out = dir.draft(&plan(version)).unwrap();
        for name in ["signals/a", "completions/a", "notes.json"] {
            fs::write(out.join(name), format!("{version}")).unwrap();
        }
    }

    fn publish(dir: &RunDir, version: u32, earlier: EarlierOutput) -> Vec<String> {
        draft(dir, version);
        dir.publish(&plan(version), earlier, Counts::new(), BTreeMap::new())
            .unwrap()
    }

    fn content(root: &Path, name: &str) -> String {
        fs::read_to_string(root.join(name)).unwrap_or_else(|_| "absent".to_owned())
    }

    #[test]
    fn a_changed_stage_keeps_its_old_output() {
        let temp = tempfile::tempdir().unwrap();
        let dir = RunDir::open(temp.path(), &loaded(RUN)).unwrap();
        assert!(dir.published("completions").unwrap().is_none());
        assert!(publish(&dir, 1, EarlierOutput::Keep).is_empty());
        let manifest = dir.published("completions").unwrap().unwrap();
        assert_eq!(manifest.key, plan(1).key());
        assert_eq!(manifest.files.len(), 3);
        let kept = publish(&dir, 2, EarlierOutput::Keep);
        assert_eq!(
            kept,
            ["signals.old-1", "completions.old-1", "notes.json.old-1"]
        );
        publish(&dir, 3, EarlierOutput::Keep);
        assert_eq!(
            dir.old_outputs("completions"),
            ["completions.old-1", "completions.old-2"]
        );
        let at = |name| content(temp.path(), name);
        assert_eq!(
            [
                at("signals.old-1/a"),
                at("signals.old-2/a"),
                at("signals/a")
            ],
            ["1", "2", "3"]
        );
        assert!(
            Manifest::read(&dir.path("completions.old-1"))
                .unwrap()
                .is_some()
        );
        assert!(publish(&dir, 4, EarlierOutput::Replace).is_empty());
        assert_eq!(dir.old_outputs("completions").len(), 2);
        assert_eq!(content(temp.path(), "notes.json"), "4");
        let left: Vec<_> = fs::read_dir(temp.path().join(".work")).unwrap().collect();
        assert_eq!(left.len(), 1, "the lock alone: {left:?}");
    }

    /// A publication is interrupted after each of its renames in turn.
    #[test]
    fn an_interrupted_publication_is_finished() {
        for steps in 0..=8 {
            let temp = tempfile::tempdir().unwrap();
            let root = temp.path();
            let dir = RunDir::open(root, &loaded(RUN)).unwrap();
            publish(&dir, 1, EarlierOutput::Keep);
            draft(&dir, 2);
            let draft = root.join(".work/draft-collect");
            let out = draft.join("out");
            let manifest = Manifest {
                stage: "collect".to_owned(),
                schema: 1,
                key: plan(2).key(),
                settings: json!({}),
                inputs: BTreeMap::new(),
                files: hash_files(&out).unwrap(),
                counts: Counts::new(),
                measures: BTreeMap::new(),
            };
            manifest.write(&out).unwrap();
            let publication = Publication {
                home: "completions".to_owned(),
                outputs: plan(2).outputs,
                earlier: EarlierOutput::Keep,
                number: 1,
            };
            fs::write(
                draft.join(PLAN_FILE),
                serde_json::to_vec(&publication).unwrap(),
            )
            .unwrap();
            let published = manifest_path(&root.join("completions"));
            let old = manifest_path(&root.join("completions.old-1"));
            let mut moves = vec![(published.clone(), old)];
            for output in plan(2).outputs {
                moves.push((root.join(&output), root.join(old_name(&output, 1))));
                moves.push((out.join(&output), root.join(&output)));
            }
            moves.push((manifest_path(&out), published));
            for (from, to) in moves.into_iter().take(steps) {
                rename(&from, &to).unwrap();
            }
            drop(dir);
            let dir = RunDir::open(root, &loaded(RUN)).unwrap();
            let manifest = dir.published("completions").unwrap().unwrap();
            assert_eq!(manifest.key, plan(2).key(), "after {steps} steps");
            let old = Manifest::read(&root.join("completions.old-1")).unwrap();
            assert_eq!(old.unwrap().key, plan(1).key(), "after {steps} steps");
            for (name, version) in [
                ("signals/a", "2"),
                ("completions.old-1/a", "1"),
                ("notes.json", "2"),
            ] {
                assert_eq!(content(root, name), version, "{name} after {steps} steps");
            }
            assert!(!draft.exists());
        }
    }

    #[test]
    fn a_folder_of_another_run_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("runs");
        let message = |text: &str| {
            let error = RunDir::open(&root, &loaded(text)).unwrap_err();
            error
                .to_string()
                .replace(&root.display().to_string(), "RUNS")
        };
        drop(RunDir::open(&root, &loaded(RUN)).unwrap());
        let mut all = message(&RUN.replace("tiny", "other"));
        let held = RunDir::open(&root, &loaded(RUN)).unwrap();
        all += &format!("\n\n{}", message(RUN));
        publish(&held, 1, EarlierOutput::Keep);
        fs::write(root.join("signals/a"), "cut short").unwrap();
        let damaged = held.published("completions").unwrap_err().to_string();
        all += &format!(
            "\n\n{}",
            damaged.replace(&root.display().to_string(), "RUNS")
        );
        drop(held);
        fs::write(root.join(RUN_FILE), "name = 1").unwrap();
        all += &format!("\n\n{}", message(RUN));
        fs::remove_file(root.join(RUN_FILE)).unwrap();
        all += &format!("\n\n{}", message(RUN));
        insta::assert_snapshot!(all);
    }
}
