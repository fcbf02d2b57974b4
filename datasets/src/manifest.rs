//! Stage manifests: the files that a stage published, and the settings and inputs they were made from.
//!
//! A manifest lies beside the stage's folder and not in it: polars and Hugging Face `datasets` take every file of a
//! folder for Parquet, also those whose names begin with `_` or `.`. A manifest holds no time and no host, so the same
//! work gives the same bytes.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::canonical::{canonical_json, sha256_hex};
use crate::error::Error;
use crate::files::{FileHash, with_suffix};
use crate::schema::SCHEMA_VERSION;
use crate::sealed::{open_seal, write_sealed};

/// Remedy for a manifest that cannot be used.
const MANIFEST_HINT: &str = "restore the file from a copy; or move it and the outputs beside it away, so that the stage runs again";

/// Returns the path of a folder's manifest: `prompts_manifest.json` beside `prompts`, and `_manifest.json` in the run
/// directory for a path that ends in a separator.
pub fn manifest_path(folder: &Path) -> PathBuf {
    with_suffix(folder, "_manifest.json")
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
    /// Reads the manifest of a folder and checks its own hash; `None` if the folder has none.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] if the file is not a manifest, was changed or damaged, or was written by
    /// another version of Potstill.
    pub fn read(folder: &Path) -> Result<Option<Manifest>, Error> {
        let path = manifest_path(folder);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        check_schema(&path, &bytes)?;
        let invalid = |why: String| {
            let problem = format!("{} {why}", path.display());
            Error::invalid(problem, MANIFEST_HINT)
        };
        let fields = open_seal(&bytes).map_err(invalid)?;
        let manifest = serde_json::from_value(fields);
        manifest
            .map(Some)
            .map_err(|error| invalid(format!("is not a manifest: {error}")))
    }

    /// Writes the manifest of a folder atomically, with its own hash as last field, and syncs the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        write_sealed(&manifest_path(folder), self)
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

/// Refuses a manifest of another version before anything else is expected of it. A file without a version is left to the
/// checks that follow.
fn check_schema(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    #[derive(Deserialize)]
    struct Version {
        schema: u64,
    }
    match serde_json::from_slice::<Version>(bytes) {
        Ok(Version { schema }) => schema_version(path, schema),
        Err(_) => Ok(()),
    }
}

/// Refuses a file with another version of the schema than this Potstill writes.
pub(crate) fn schema_version(path: &Path, schema: u64) -> Result<(), Error> {
    let path = path.display();
    match schema.cmp(&u64::from(SCHEMA_VERSION)) {
        Ordering::Equal => Ok(()),
        Ordering::Greater => Err(Error::invalid(
            format!(
                "{path} was written by a later Potstill: it has schema {schema}, and this one reads schema {SCHEMA_VERSION}"
            ),
            "use the later Potstill; or, if there is none, the file was damaged: restore it from a copy",
        )),
        Ordering::Less => Err(Error::invalid(
            format!(
                "{path} has schema {schema}, which no Potstill ever wrote; this one reads schema {SCHEMA_VERSION}"
            ),
            "the file was changed or damaged: restore it from a copy",
        )),
    }
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
    use crate::files::hash_files;

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

    /// The hash of a manifest covers every field, measures included.
    #[test]
    fn a_flipped_bit_of_a_manifest_is_an_error_with_its_name_or_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("table");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("file"), "abc").unwrap();
        let written = manifest(&folder);
        written.write(&folder).unwrap();
        let path = manifest_path(&folder);
        let bytes = fs::read(&path).unwrap();
        let mut found = 0;
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, &damaged).unwrap();
            match Manifest::read(&folder) {
                Ok(read) => assert_eq!(read.as_ref(), Some(&written), "bit {bit}"),
                Err(error) => {
                    let message = error.to_string();
                    assert!(message.contains("table_manifest.json"), "{message}");
                    found += 1;
                }
            }
        }
        assert!(found > bytes.len() * 6, "{found} of {}", bytes.len() * 8);
    }

    #[test]
    fn another_schema_or_an_unknown_field_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("table");
        fs::create_dir_all(&folder).unwrap();
        let mut other = manifest(&folder);
        let message = |folder: &Path| Manifest::read(folder).unwrap_err().to_string();
        for (schema, problem) in [
            (
                99,
                "was written by a later Potstill: it has schema 99, and this one reads schema 1",
            ),
            (0, "has schema 0, which no Potstill ever wrote"),
        ] {
            other.schema = schema;
            other.write(&folder).unwrap();
            let message = message(&folder);
            assert!(message.contains("table_manifest.json "), "{message}");
            assert!(message.contains(problem), "{message}");
        }
        // The version is refused whatever a later Potstill does with the other fields.
        let path = manifest_path(&folder);
        fs::write(&path, r#"{"schema": 99, "parts": [1]}"#).unwrap();
        assert!(message(&folder).contains("it has schema 99"));
        let mut fields = serde_json::to_value(manifest(&folder)).unwrap();
        fields["note"] = "mine".into();
        write_sealed(&path, &fields).unwrap();
        assert!(message(&folder).contains("unknown field `note`"));
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("\"rows\": 7", "\"rows\": 8")).unwrap();
        assert!(message(&folder).contains("is damaged or was changed"));
    }

    #[test]
    fn a_file_that_is_not_a_manifest_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("");
        let path = dir.path().join("_manifest.json");
        write_sealed(&path, &serde_json::json!({"stage": 1})).unwrap();
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
