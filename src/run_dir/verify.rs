//! Comparison of published files with the manifests that name them, before they are read.
//!
//! A manifest checks itself, and it has the hash of every file that its stage published. A file is hashed once in a
//! process, when it is first opened; a run in which every stage is up to date opens none.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, bail};
use potstill_datasets::{FileHash, Manifest, hash_each, manifest_path};

use super::RunDir;
use crate::progress::size;

const MANIFEST_SUFFIX: &str = "_manifest.json";

/// Amount of verified data, and the time that this took.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Verification {
    /// Number of files.
    pub files: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// Wall time in seconds.
    pub seconds: f64,
}

impl Verification {
    /// The verification as a line for people, `None` if no file was verified.
    pub fn text(&self) -> Option<String> {
        (self.files > 0).then(|| {
            format!(
                "compared {} files ({}) with their manifests in {:.3} s",
                self.files,
                size(self.bytes),
                self.seconds
            )
        })
    }
}

/// Compares files with their manifests, each file once.
#[derive(Debug, Default)]
pub struct Verifier(Mutex<VerifiedFiles>);

#[derive(Debug, Default)]
struct VerifiedFiles {
    /// Files that have been hashed by this process, with the hash that they had.
    hashes: HashMap<PathBuf, FileHash>,
    /// What was verified since the last [`Verifier::take`].
    since: Verification,
}

/// A published file or folder, as its manifest describes it.
struct Described {
    manifest: PathBuf,
    stage: String,
    /// Folder or file that has to be moved away for the stage to run again.
    home: PathBuf,
    files: Vec<(PathBuf, FileHash)>,
}

impl Verifier {
    /// Compares the files at or below `name` with their manifest, unless this process has done so, and returns the path
    /// of `name`. `root` is a run directory, or a folder with the same layout.
    ///
    /// # Errors
    /// When a file is absent or is not the one that was published, when a folder has a Parquet file that its manifest
    /// does not name, and when the manifest cannot be read. The message names the file.
    pub fn open(&self, root: &Path, name: &str) -> anyhow::Result<PathBuf> {
        let path = root.join(name);
        let described = describe(root, name)?;
        let files = described.as_ref().map_or(&[][..], |d| &d.files);
        let named = |path: &Path| files.iter().any(|(file, _)| file == path);
        if let Some(stranger) = tables_in(&path)?.into_iter().find(|p| !named(p)) {
            bail!(
                "{} is in no manifest, so no stage published it\nhint: move it out of the folder",
                stranger.display()
            );
        }
        if let Some(described) = &described {
            self.compare(described)?;
        }
        Ok(path)
    }

    fn compare(&self, described: &Described) -> anyhow::Result<()> {
        // The lock is held while files are hashed, so that two threads do not hash the same file.
        let mut verified = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = |(path, hash): &&(PathBuf, FileHash)| verified.hashes.get(path) != Some(hash);
        let new: Vec<&(PathBuf, FileHash)> = described.files.iter().filter(is_new).collect();
        if new.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        let paths: Vec<PathBuf> = new.iter().map(|(path, _)| path.clone()).collect();
        let hashes = hash_each(&paths).with_context(|| {
            format!("cannot compare files with {}", described.manifest.display())
        })?;
        for ((path, expected), found) in new.into_iter().zip(hashes) {
            if found != *expected {
                bail!(described.problem(path, expected, &found));
            }
            verified.since.files += 1;
            verified.since.bytes += found.bytes;
            verified.hashes.insert(path.clone(), found);
        }
        verified.since.seconds += began.elapsed().as_secs_f64();
        Ok(())
    }

    /// Notes the hashes of files that this process has just written and hashed, by path below `root`.
    pub fn remember(&self, root: &Path, files: &BTreeMap<String, FileHash>) {
        let mut verified = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, hash) in files {
            verified.hashes.insert(root.join(name), hash.clone());
        }
    }

    /// Returns what was verified since the last call.
    pub fn take(&self) -> Verification {
        let mut verified = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut verified.since)
    }
}

impl Described {
    fn problem(&self, path: &Path, expected: &FileHash, found: &FileHash) -> String {
        let how = match found.bytes == expected.bytes {
            true => format!(
                "its SHA-256 is {}, and {} says {}",
                found.sha256,
                self.manifest.display(),
                expected.sha256
            ),
            false => format!(
                "it is {} bytes long, and {} says {}",
                found.bytes,
                self.manifest.display(),
                expected.bytes
            ),
        };
        format!(
            "{} was changed or damaged after `{}` published it: {how}\nhint: restore the file from a copy, or move {} away so that `{}` runs again",
            path.display(),
            self.stage,
            self.home.display(),
            self.stage
        )
    }
}

/// Finds the manifest that names the files at or below `name`; `None` if no manifest does.
fn describe(root: &Path, name: &str) -> anyhow::Result<Option<Described>> {
    let own = Path::new(name).ancestors().filter_map(|p| p.to_str());
    let own: Vec<String> = own.map(str::to_owned).collect();
    let mut failed = None;
    // A table may be published together with another one, whose folder has the manifest.
    for home in own
        .iter()
        .filter(|home| !home.is_empty())
        .cloned()
        .chain(homes_in(root)?)
    {
        let manifest = match Manifest::read(&root.join(&home)) {
            Ok(Some(manifest)) => manifest,
            Ok(None) => continue,
            // A damaged manifest of another table does not prevent the reading of this one.
            Err(error) => {
                failed.get_or_insert(error);
                continue;
            }
        };
        let inside = |file: &str| {
            let rest = file.strip_prefix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let files = manifest.files.into_iter().filter(|(file, _)| inside(file));
        let files: Vec<_> = files.map(|(file, hash)| (root.join(file), hash)).collect();
        if !files.is_empty() || home == name {
            let place = if home.is_empty() { name } else { home.as_str() };
            return Ok(Some(Described {
                manifest: manifest_path(&root.join(&home)),
                stage: manifest.stage,
                home: root.join(place),
                files,
            }));
        }
    }
    match failed {
        Some(error) => Err(error.into()),
        None => Ok(None),
    }
}

/// Lists the outputs that have a manifest in a folder; the empty name is that of the folder itself.
fn homes_in(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut homes = Vec::new();
    for name in names_in(root)? {
        homes.extend(name.strip_suffix(MANIFEST_SUFFIX).map(str::to_owned));
    }
    homes.sort();
    Ok(homes)
}

/// Lists the Parquet files of a folder; none if it is a file, or does not exist.
fn tables_in(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(Vec::new());
    }
    let names = names_in(path)?.into_iter();
    let tables = names.filter(|name| name.ends_with(".parquet"));
    Ok(tables.map(|name| path.join(name)).collect())
}

fn names_in(folder: &Path) -> anyhow::Result<Vec<String>> {
    let cannot = || format!("cannot list {}", folder.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(cannot)? {
        let name = entry.with_context(cannot)?.file_name();
        names.extend(name.to_str().map(str::to_owned));
    }
    Ok(names)
}

impl RunDir {
    /// Path of a published file or folder, whose files have been compared with their manifest.
    ///
    /// # Errors
    /// As [`Verifier::open`].
    pub fn verified(&self, name: &str) -> anyhow::Result<PathBuf> {
        let place = self.preview.as_ref().map(|p| p.resolve(name));
        let folder = place.as_ref().and_then(|place| place.strip_suffix(name));
        self.verified_in(folder.unwrap_or_default(), name)
    }

    /// As [`verified`](RunDir::verified), for outputs with the usual layout in a folder of the run directory.
    ///
    /// # Errors
    /// As [`Verifier::open`].
    pub fn verified_in(&self, folder: &str, name: &str) -> anyhow::Result<PathBuf> {
        self.verifier.open(&self.root.join(folder), name)
    }

    /// Notes the hashes of files that this process has just published.
    pub fn remember(&self, files: &BTreeMap<String, FileHash>) {
        self.verifier.remember(&self.root, files);
    }

    /// Returns what was verified since the last call.
    pub fn take_verification(&self) -> Verification {
        self.verifier.take()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::StagePlan;
    use super::*;
    use crate::run_dir::Counts;

    /// A run directory with a stage that published two tables and a file.
    fn published() -> tempfile::TempDir {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path();
        for (name, text) in [
            ("completions/shard-00000.parquet", "completions"),
            ("signals/shard-00000.parquet", "signals"),
            ("students/student/checkpoints/step-1/state.json", "state"),
            ("notes.json", "notes"),
        ] {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        publish(
            root,
            "completions",
            &["completions/", "signals/", "notes.json"],
        );
        publish(root, "students/student", &["students/student/"]);
        temp
    }

    fn publish(root: &Path, home: &str, outputs: &[&str]) {
        let plan = StagePlan {
            stage: "collect".to_owned(),
            home: home.to_owned(),
            outputs: Vec::new(),
            settings: json!({}),
            inputs: BTreeMap::new(),
        };
        let mut files = potstill_datasets::hash_files(root).unwrap();
        files.retain(|name, _| outputs.iter().any(|output| name.starts_with(output)));
        let manifest = plan.manifest(files, Counts::new(), BTreeMap::new());
        manifest.write(&root.join(home)).unwrap();
    }

    const NAMES: [(&str, &str); 4] = [
        ("completions", "completions/shard-00000.parquet"),
        ("signals", "signals/shard-00000.parquet"),
        ("notes.json", "notes.json"),
        (
            "students/student/checkpoints/step-1",
            "students/student/checkpoints/step-1/state.json",
        ),
    ];

    #[test]
    fn a_flipped_bit_of_any_published_file_is_an_error_with_its_name() {
        let temp = published();
        let root = temp.path();
        for (name, file) in NAMES {
            let path = root.join(file);
            let bytes = fs::read(&path).unwrap();
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                fs::write(&path, damaged).unwrap();
                let error = Verifier::default().open(root, name).unwrap_err();
                let error = error.to_string();
                assert!(
                    error.contains(file) && error.contains("was changed or damaged"),
                    "{error}"
                );
            }
            for damaged in [&bytes[1..], &[]] {
                fs::write(&path, damaged).unwrap();
                let error = Verifier::default().open(root, name).unwrap_err();
                assert!(error.to_string().contains("bytes long, and "), "{error}");
            }
            fs::remove_file(&path).unwrap();
            let error = Verifier::default().open(root, name).unwrap_err();
            let error = format!("{error:#}");
            assert!(error.contains(file), "{error}");
            fs::write(&path, bytes).unwrap();
            assert_eq!(
                Verifier::default().open(root, name).unwrap(),
                root.join(name)
            );
        }
    }

    #[test]
    fn a_file_is_hashed_once_unless_its_manifest_changes() {
        let temp = published();
        let root = temp.path();
        let verifier = Verifier::default();
        for _ in 0..3 {
            verifier.open(root, "signals").unwrap();
        }
        let taken = verifier.take();
        assert_eq!((taken.files, taken.bytes), (1, 7));
        assert!(
            taken.text().unwrap().starts_with("compared 1 files (7 B)"),
            "{taken:?}"
        );
        assert_eq!(verifier.take(), Verification::default());
        fs::write(root.join("signals/shard-00000.parquet"), "another").unwrap();
        publish(
            root,
            "completions",
            &["completions/", "signals/", "notes.json"],
        );
        verifier.open(root, "signals").unwrap();
        assert_eq!(verifier.take().files, 1);
    }

    #[test]
    fn a_table_that_no_manifest_names_is_refused() {
        let temp = published();
        let root = temp.path();
        let stranger = root.join("signals/shard-00001.parquet");
        fs::write(&stranger, "more").unwrap();
        let error = Verifier::default().open(root, "signals").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("shard-00001.parquet is in no manifest"),
            "{error}"
        );
        fs::remove_file(manifest_path(&root.join("completions"))).unwrap();
        let error = Verifier::default().open(root, "completions").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("shard-00000.parquet is in no manifest"),
            "{error}"
        );
        // A folder without tables may be in no manifest.
        fs::create_dir(root.join("unscored")).unwrap();
        Verifier::default().open(root, "unscored").unwrap();
    }

    /// A damaged manifest is named where it is the one that describes the files.
    #[test]
    fn a_damaged_manifest_is_named() {
        let temp = published();
        let root = temp.path();
        let path = manifest_path(&root.join("completions"));
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("\"bytes\": 7", "\"bytes\": 8")).unwrap();
        let error = Verifier::default().open(root, "signals").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("completions_manifest.json is damaged"),
            "{error}"
        );
        Verifier::default()
            .open(root, "students/student/checkpoints/step-1")
            .unwrap();
    }
}
