//! Stage manifests: the files that a stage published, and the settings and inputs they were made from.
//!
//! A manifest lies beside the stage's folder and not in it: polars and Hugging Face `datasets` take every file of a
//! folder for Parquet, also those whose names begin with `_` or `.`. A manifest holds no time and no host, so the same
//! work gives the same bytes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::private::{create_new, create_private};

/// Returns the path of a folder's manifest: `prompts_manifest.json` beside `prompts`, and `_manifest.json` in the run
/// directory for a path that ends in a separator.
pub fn manifest_path(folder: &Path) -> PathBuf {
    with_suffix(folder, "_manifest.json")
}

/// Size and hash of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileHash {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 in lower-case hex.
    pub sha256: String,
}

/// The manifest of a published stage. It is written last, so a folder without a manifest is not published.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Name of the stage.
    pub stage: String,
    /// Version of the files' schema.
    pub schema: u32,
    /// [`stage_key`] of settings and inputs. A stage with the same key is up to date.
    pub key: String,
    /// Settings that the output depends on.
    pub settings: Value,
    /// Inputs by name, each with the content hash of its manifest or file.
    pub inputs: BTreeMap<String, String>,
    /// Published files by path below the run directory, with `/`.
    pub files: BTreeMap<String, FileHash>,
    /// Counts by name, such as `answers`.
    pub counts: BTreeMap<String, u64>,
    /// Figures by name, such as `sampling_z`, which are computed from the published files and are finite.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub measures: BTreeMap<String, f64>,
}

impl Manifest {
    /// Reads the manifest of a folder; `None` if the folder has none.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] if the file is not a manifest.
    pub fn read(folder: &Path) -> Result<Option<Manifest>, Error> {
        let path = manifest_path(folder);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        match serde_json::from_slice(&bytes) {
            Ok(manifest) => Ok(Some(manifest)),
            Err(error) => Err(not_a_manifest(&path, &error)),
        }
    }

    /// Writes the manifest of a folder atomically and syncs the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        let path = manifest_path(folder);
        let mut text =
            serde_json::to_string_pretty(self).map_err(|error| not_a_manifest(&path, &error))?;
        text.push('\n');
        replace_file(&path, text.as_bytes())
    }

    /// Computes the SHA-256 of the manifest as canonical JSON, by which later stages identify their inputs. The measures
    /// are not part of it, because they follow from the files.
    pub fn content_hash(&self) -> String {
        let files = self.files.iter().map(|(name, file)| {
            let mut fields = Map::new();
            fields.insert("bytes".into(), file.bytes.into());
            fields.insert("sha256".into(), file.sha256.as_str().into());
            (name.clone(), Value::Object(fields))
        });
        let counts = self
            .counts
            .iter()
            .map(|(name, count)| (name.clone(), Value::from(*count)));
        let mut fields = Map::new();
        fields.insert("stage".into(), self.stage.as_str().into());
        fields.insert("schema".into(), self.schema.into());
        fields.insert("key".into(), self.key.as_str().into());
        fields.insert("settings".into(), self.settings.clone());
        fields.insert("inputs".into(), strings(&self.inputs));
        fields.insert("files".into(), Value::Object(files.collect()));
        fields.insert("counts".into(), Value::Object(counts.collect()));
        sha256_hex(canonical_json(&Value::Object(fields)).as_bytes())
    }
}

/// Computes the SHA-256 of a stage's name, settings and inputs as canonical JSON. A manifest with this key is up to
/// date.
pub fn stage_key(stage: &str, settings: &Value, inputs: &BTreeMap<String, String>) -> String {
    let mut fields = Map::new();
    fields.insert("stage".into(), stage.into());
    fields.insert("settings".into(), settings.clone());
    fields.insert("inputs".into(), strings(inputs));
    sha256_hex(canonical_json(&Value::Object(fields)).as_bytes())
}

/// Computes the sizes and hashes of all files below a folder, by path with `/`.
///
/// # Errors
/// [`Error::Io`], and [`Error::Invalid`] if a name is not UTF-8.
pub fn hash_files(dir: &Path) -> Result<BTreeMap<String, FileHash>, Error> {
    let mut files = BTreeMap::new();
    let mut folders = vec![(dir.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
            let path = entry.map_err(Error::io("list", &folder))?.path();
            let Some(file_name) = path.file_name().and_then(|name| name.to_str()) else {
                let problem = format!("{} has a name that is not UTF-8", path.display());
                return Err(Error::invalid(problem, "rename it"));
            };
            let name = format!("{prefix}{file_name}");
            if path.is_dir() {
                folders.push((path, format!("{name}/")));
            } else {
                files.insert(name, hash_file(&path)?);
            }
        }
    }
    Ok(files)
}

/// Computes the size and the hash of one file, which is read in blocks.
///
/// # Errors
/// [`Error::Io`], which names the file.
pub fn hash_file(path: &Path) -> Result<FileHash, Error> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let mut hasher = Sha256::new();
    let mut block = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        let count = file.read(&mut block).map_err(Error::io("read", path))?;
        match block.get(..count) {
            None | Some([]) => break,
            Some(part) => hasher.update(part),
        }
        bytes += count as u64;
    }
    Ok(FileHash {
        bytes,
        sha256: hex(&hasher.finalize()),
    })
}

/// Formats JSON with the keys of every object sorted and without spaces, so equal values have equal texts.
pub fn canonical_json(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let sorted: BTreeMap<&String, &Value> = fields.iter().collect();
            let fields = sorted.into_iter().map(|(key, value)| {
                let key = Value::String(key.clone());
                format!("{key}:{}", canonical_json(value))
            });
            format!("{{{}}}", fields.collect::<Vec<_>>().join(","))
        }
        Value::Array(items) => format!(
            "[{}]",
            items
                .iter()
                .map(canonical_json)
                .collect::<Vec<_>>()
                .join(",")
        ),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.to_string(),
    }
}

/// Writes a file that only its owner can read, atomically: writes a temporary file beside it, syncs and renames it, and
/// syncs the folder.
///
/// # Errors
/// [`Error::Io`].
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    replace(path, bytes, create_private)
}

/// As [`replace_file`], with the usual permissions, for files of an exported model.
///
/// # Errors
/// [`Error::Io`].
pub fn replace_shared_file(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    replace(path, bytes, |path| create_new(path, File::options()))
}

fn replace(
    path: &Path,
    bytes: &[u8],
    create: impl FnOnce(&Path) -> std::io::Result<File>,
) -> Result<(), Error> {
    let temporary = temporary_path(path);
    let mut file = create(&temporary).map_err(Error::io("create", &temporary))?;
    file.write_all(bytes)
        .map_err(Error::io("write", &temporary))?;
    publish_file(&file, &temporary, path)
}

/// Syncs a finished file and renames it into place.
pub(crate) fn publish_file(file: &File, temporary: &Path, path: &Path) -> Result<(), Error> {
    file.sync_all().map_err(Error::io("sync", temporary))?;
    fs::rename(temporary, path).map_err(Error::io("rename a finished file to", path))?;
    sync_parent(path)
}

/// Returns the path under which a file is written before it is complete.
pub(crate) fn temporary_path(path: &Path) -> PathBuf {
    with_suffix(path, ".tmp")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Syncs the folder of a new or renamed file, so that the change survives a crash.
pub(crate) fn sync_parent(path: &Path) -> Result<(), Error> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Only Unix can open a folder as a file; on other systems the rename has to suffice.
    if cfg!(unix) {
        File::open(parent)
            .and_then(|folder| folder.sync_all())
            .map_err(Error::io("sync", parent))?;
    }
    Ok(())
}

pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn not_a_manifest(path: &Path, error: &serde_json::Error) -> Error {
    let problem = format!(
        "{} is not a manifest that this Potstill can read: {error}",
        path.display()
    );
    Error::invalid(problem, "delete it and run the stage again")
}

fn strings(map: &BTreeMap<String, String>) -> Value {
    Value::Object(
        map.iter()
            .map(|(key, value)| (key.clone(), value.as_str().into()))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(dir: &Path) -> Manifest {
        let settings = serde_json::json!({"b": [1, 2.5, null], "a": {"y": "ü\"", "x": true}});
        let inputs = BTreeMap::from([("prompts".to_owned(), "abc".to_owned())]);
        Manifest {
            stage: "collect".into(),
            schema: 1,
            key: stage_key("collect", &settings, &inputs),
            settings,
            inputs,
            files: hash_files(dir).unwrap(),
            counts: BTreeMap::from([("rows".to_owned(), 7)]),
            measures: BTreeMap::from([("sampling_z".to_owned(), -1.25)]),
        }
    }

    #[test]
    fn a_written_manifest_is_read_back_with_the_same_hash() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("table");
        assert_eq!(Manifest::read(&folder).unwrap(), None);
        fs::create_dir_all(folder.join("deep/er")).unwrap();
        fs::write(folder.join("deep/er/file"), "abc").unwrap();
        let written = manifest(&folder);
        written.write(&folder).unwrap();
        let read = Manifest::read(&folder).unwrap().unwrap();
        assert_eq!(read, written);
        assert_eq!(read.content_hash(), written.content_hash());
        // The manifest is beside the folder, and no temporary file is left in it.
        assert!(dir.path().join("table_manifest.json").exists());
        assert_eq!(manifest(&folder), written);
        let files: Vec<_> = written.files.into_iter().collect();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(
            files,
            [(
                "deep/er/file".to_owned(),
                FileHash {
                    bytes: 3,
                    sha256: abc.into()
                }
            )]
        );
    }

    #[test]
    fn every_field_and_not_the_order_of_keys_affects_the_hash() {
        let dir = tempfile::tempdir().unwrap();
        let base = manifest(dir.path());
        let changes: [fn(&mut Manifest); 7] = [
            |m| m.stage.push('x'),
            |m| m.schema += 1,
            |m| m.key.push('x'),
            |m| m.settings["a"]["x"] = false.into(),
            |m| drop(m.inputs.insert("x".into(), "y".into())),
            |m| {
                drop(m.files.insert(
                    "x".into(),
                    FileHash {
                        bytes: 1,
                        sha256: "y".into(),
                    },
                ))
            },
            |m| m.counts.extend([("x".into(), 1)]),
        ];
        for change in changes {
            let mut changed = base.clone();
            change(&mut changed);
            assert_ne!(changed.content_hash(), base.content_hash());
        }
        let mut turned = base.clone();
        turned.settings = serde_json::json!({"a": {"x": true, "y": "ü\""}, "b": [1, 2.5, null]});
        assert_eq!(turned.content_hash(), base.content_hash());
        assert_eq!(
            stage_key("collect", &turned.settings, &turned.inputs),
            base.key
        );
        assert_ne!(stage_key("score", &base.settings, &base.inputs), base.key);
    }

    #[test]
    fn canonical_json_sorts_and_has_no_spaces() {
        let value = serde_json::json!({"b": [1, {"d": null, "c": "\n"}], "a": -0.5});
        assert_eq!(
            canonical_json(&value),
            r#"{"a":-0.5,"b":[1,{"c":"\n","d":null}]}"#
        );
    }

    #[test]
    fn a_file_that_is_not_a_manifest_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("");
        fs::write(dir.path().join("_manifest.json"), "{\"stage\": 1}").unwrap();
        let message = Manifest::read(&root).unwrap_err().to_string();
        assert!(
            message.contains("/_manifest.json is not a manifest"),
            "{message}"
        );
        let message = hash_files(&dir.path().join("none"))
            .unwrap_err()
            .to_string();
        assert!(
            message.starts_with("cannot list ") && message.ends_with("none"),
            "{message}"
        );
    }
}
