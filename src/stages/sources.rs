//! Models and data of a run that are not folders on this machine: repositories of the Hugging Face Hub are fetched
//! into its cache, and GGUF files are laid out as folders. Afterwards the settings of the run name local folders, so
//! that no other stage knows where they come from.
//!
//! `sources.json` in the run directory holds the commit of each repository. Later commands use that commit, without a
//! request if its files are in the cache.

mod gguf;
mod shown;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub(crate) use gguf::checkpoint_folder;
use potstill_datasets::range::FilePath;
use potstill_datasets::{read_sealed, replace_file, to_sealed_json};
use potstill_teacher::hub::{Hub, HubError, HubReference, HubSettings, Selection, SnapshotPlan};
use shown::Download;

use crate::progress::Console;
use crate::run_file::{ConfigError, HubSource, Loaded};

/// File of the run directory with the commits of the repositories.
const RECORD: &str = "sources.json";

/// Sources that a command reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needed {
    /// No source.
    Nothing,
    /// The data of `[import]`.
    Data,
    /// Data, teacher and student.
    Everything,
}

/// Files that a command may fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// All files that a source needs. Their commits are recorded in the run directory.
    Whole,
    /// Everything except weights.
    WithoutWeights,
    /// Nothing: absent files are only named.
    Nothing,
}

/// State of the sources after [`resolve`]. Of several sources the last state of this list holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sources {
    /// All files are on this machine.
    Complete,
    /// Weights are absent.
    WithoutWeights,
    /// Files are absent that even a check needs.
    Incomplete,
    /// The user asked to stop.
    Stopped,
}

/// A source that the run file names.
struct Named {
    /// Name in `sources.json`.
    name: &'static str,
    key: [&'static str; 2],
    path: FilePath,
    revision: Option<String>,
    /// Files to fetch if the source is a repository.
    selection: Selection,
}

/// Makes the settings of a run name local folders. `dir` is the run directory, which need not exist.
///
/// # Errors
/// A repository, revision or file that the Hub does not have, as [`ConfigError`]; failures of the connection and of the
/// file system.
pub(crate) fn resolve(
    run: &mut Loaded,
    dir: &Path,
    console: &Console,
    needed: Needed,
    extent: Extent,
) -> anyhow::Result<Sources> {
    let mut state = Sources::Complete;
    let record = read_record(dir)?;
    for named in named(run, needed) {
        let Some(mut reference) = reference(run, &named)? else {
            continue;
        };
        if let Some(revision) = &named.revision {
            reference.revision = Some(revision.clone());
        }
        let selection = named.selection.clone();
        let recorded = record.get(named.name);
        let found = match repository(&reference, selection, recorded, console, extent) {
            Err(HubError::Stopped) => return Ok(Sources::Stopped),
            found => found.map_err(|error| failure(run, &named, error))?,
        };
        state = state.max(found.state);
        if let Some((source, folder)) = found.source {
            run.hub.insert(named.name.to_owned(), source);
            set_path(run, named.name, folder);
        }
    }
    if needed == Needed::Everything {
        gguf::lay_out(run)?;
    }
    if extent == Extent::Whole {
        let merged: BTreeMap<_, _> = record.iter().chain(&run.hub).collect();
        let text = to_sealed_json(&merged)?.into_bytes();
        let path = dir.join(RECORD);
        if !run.hub.is_empty() && std::fs::read(&path).ok().as_ref() != Some(&text) {
            replace_file(&path, &text)?;
        }
    }
    Ok(state)
}

/// The sources that a command needs, as the run file names them.
fn named(run: &Loaded, needed: Needed) -> Vec<Named> {
    let mut sources = Vec::new();
    if needed != Needed::Nothing {
        sources.push(Named {
            name: "data",
            key: ["import", "path"],
            path: run.settings.import.path.clone(),
            revision: None,
            selection: Selection::File(String::new()),
        });
    }
    if needed != Needed::Everything {
        return sources;
    }
    if let Some(teacher) = &run.settings.teacher {
        let table = [
            ("teacher", "path", &teacher.path, Selection::Checkpoint),
            (
                "tokenizer",
                "tokenizer",
                &teacher.tokenizer,
                Selection::Tokenizer,
            ),
        ];
        for (name, key, path, selection) in table {
            sources.extend(path.clone().map(|path| Named {
                name,
                key: ["teacher", key],
                path,
                revision: teacher.revision.clone(),
                selection,
            }));
        }
    }
    let student = &run.settings.student;
    sources.extend(student.path.clone().map(|path| Named {
        name: "student",
        key: ["student", "path"],
        path,
        revision: student.revision.clone(),
        selection: match student.random {
            Some(_) => Selection::WithoutWeights,
            None => Selection::Checkpoint,
        },
    }));
    sources
}

/// The repository that a source names; `None` for a local folder or file, which wins if it exists.
fn reference(run: &Loaded, named: &Named) -> anyhow::Result<Option<HubReference>> {
    let written = named.path.written();
    if named.path.as_path().exists() {
        if named.revision.is_some() {
            let what = format!(
                "{} is on this machine and has no revisions\nhint: leave `revision` out",
                named.path.as_path().display()
            );
            return Err(run.problem(&[named.key[0], "revision"], what).into());
        }
        return Ok(None);
    }
    match named.name {
        "data" => {
            let reference = HubReference::dataset(written).transpose();
            reference.map_err(|e| run.problem(&named.key, e.to_string()).into())
        }
        _ => Ok(HubReference::model(written)),
    }
}

/// A repository that was looked for.
struct Found {
    state: Sources,
    /// The pinned repository and the local folder or file; `None` if it is not on this machine.
    source: Option<(HubSource, PathBuf)>,
}

/// Finds a repository in the cache, or fetches it.
fn repository(
    reference: &HubReference,
    selection: Selection,
    recorded: Option<&HubSource>,
    console: &Console,
    extent: Extent,
) -> Result<Found, HubError> {
    let variable = |name: &str| std::env::var(name).ok();
    let settings = HubSettings::from_variables(variable, std::env::home_dir())?;
    let revision = reference.revision.as_deref().unwrap_or("main");
    let selection = match &reference.file {
        Some(file) => Selection::File(file.clone()),
        None => selection,
    };
    let found = |source: HubSource, state| {
        let folder = source.folder.clone();
        let path = reference
            .file
            .as_ref()
            .map_or(folder.clone(), |file| folder.join(file));
        Found {
            state,
            source: Some((source, path)),
        }
    };
    let name = reference.written();
    let is_same = |source: &&HubSource| source.repository == name && source.revision == revision;
    let recorded = recorded.filter(is_same);
    if let Some(source) =
        recorded.and_then(|source| fetched(&settings, reference, &selection, source))
    {
        return Ok(found(source, Sources::Complete));
    }
    let mut download = Download::new(console, &name);
    let hub = Hub::new(&settings)?;
    let asked = recorded.map_or(revision, |source| &source.commit);
    let plan = hub.plan(&reference.repository, asked, &selection, &mut |event| {
        download.shown(event)
    })?;
    let (plan, state) = permitted(plan, extent, &selection, &mut download);
    let Some(plan) = plan else {
        return Ok(Found {
            state,
            source: None,
        });
    };
    let snapshot = hub.fetch(plan, &mut |event| download.shown(event))?;
    download.finished();
    let source = HubSource {
        revision: revision.to_owned(),
        commit: snapshot.commit,
        files: snapshot.files,
        folder: snapshot.folder,
        repository: name.clone(),
    };
    Ok(found(source, state))
}

/// The recorded source with its folder, if all of its files are in the cache.
fn fetched(
    settings: &HubSettings,
    reference: &HubReference,
    selection: &Selection,
    source: &HubSource,
) -> Option<HubSource> {
    let is_enough = *selection != Selection::Checkpoint || source.has_weights();
    let HubSource { commit, files, .. } = source;
    let folder = Hub::fetched(settings, &reference.repository, commit, files)?;
    is_enough.then(|| HubSource {
        folder,
        ..source.clone()
    })
}

/// The part of a plan that may be fetched; `None` if nothing may be fetched and something is absent.
fn permitted(
    plan: SnapshotPlan,
    extent: Extent,
    selection: &Selection,
    download: &mut Download<'_>,
) -> (Option<SnapshotPlan>, Sources) {
    if plan.missing().0 == 0 {
        return (Some(plan), Sources::Complete);
    }
    // A data set is what a check reads.
    let is_data =
        matches!(selection, Selection::File(file) if !file.to_ascii_lowercase().ends_with(".gguf"));
    match extent {
        Extent::Whole => {
            download.announce(&plan, true);
            (Some(plan), Sources::Complete)
        }
        Extent::WithoutWeights if is_data => {
            download.announce(&plan, true);
            (Some(plan), Sources::Complete)
        }
        Extent::WithoutWeights => {
            let weights = plan.clone().missing();
            let small = plan.clone().without_weights();
            if weights == small.missing() {
                return (Some(small), Sources::Complete);
            }
            download.announce(&plan, false);
            match selection {
                Selection::File(_) => (None, Sources::Incomplete),
                _ => (Some(small), Sources::WithoutWeights),
            }
        }
        Extent::Nothing => {
            download.announce(&plan, false);
            (None, Sources::Incomplete)
        }
    }
}

/// An error of the Hub's client at the key that names the repository.
fn failure(run: &Loaded, named: &Named, error: HubError) -> anyhow::Error {
    let what = match (&error, named.name) {
        (HubError::Settings(what), _) => return ConfigError::plain(what.clone()).into(),
        (_, "data") => error.to_string(),
        _ => format!(
            "{} does not exist, and {error}",
            named.path.as_path().display()
        ),
    };
    if is_configuration(&error) {
        return run.problem(&named.key, what).into();
    }
    let [table, key] = named.key;
    let written = named.path.written();
    let context = format!("cannot fetch `{written}`, the `{key}` of [{table}]");
    anyhow::Error::new(error).context(context)
}

/// Whether an error is one of the run file, or of a name in it.
fn is_configuration(error: &HubError) -> bool {
    error.is_about_the_name() || matches!(error, HubError::NotCached { .. })
}

/// Fetches the model (without weights) or the file of data that a text names, for `init`, and returns its folder or
/// file. `None` if the text does not name one of the Hub.
///
/// # Errors
/// As [`resolve`].
pub(crate) fn from_hub(written: &str, console: &Console) -> anyhow::Result<Option<PathBuf>> {
    let reference = match HubReference::dataset(written) {
        _ if Path::new(written).exists() => None,
        Some(reference) => Some(reference.map_err(|e| ConfigError::plain(e.to_string()))?),
        None => HubReference::model(written),
    };
    let Some(reference) = reference else {
        return Ok(None);
    };
    let extent = match &reference.file {
        Some(_) => Extent::Whole,
        None => Extent::WithoutWeights,
    };
    let found = repository(&reference, Selection::WithoutWeights, None, console, extent);
    let found = found.map_err(|error| match is_configuration(&error) {
        true => ConfigError::plain(format!("{written} does not exist, and {error}")).into(),
        false => anyhow::Error::new(error).context(format!("cannot fetch `{written}`")),
    })?;
    Ok(found.source.map(|(_, path)| path))
}

fn read_record(dir: &Path) -> anyhow::Result<BTreeMap<String, HubSource>> {
    let path = dir.join(RECORD);
    let hint = "delete it; the next command looks the revisions up again";
    Ok(read_sealed(&path, hint)?.unwrap_or_default())
}

/// Lets the settings name a local folder or file.
fn set_path(run: &mut Loaded, name: &str, path: PathBuf) {
    let settings = &mut run.settings;
    let path = FilePath::from(path);
    match (name, &mut settings.teacher) {
        ("data", _) => settings.import.path = path,
        ("student", _) => settings.student.path = Some(path),
        ("teacher", Some(teacher)) => teacher.path = Some(path),
        ("tokenizer", Some(teacher)) => teacher.tokenizer = Some(path),
        _ => {}
    }
}
