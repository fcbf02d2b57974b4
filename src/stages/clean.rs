//! `clean`: lists the outputs in `earlier/` and unfinished work of other settings, and deletes them with `--yes`.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use potstill_datasets::visible_line;
use serde_json::Value;

use super::sources::{self, Extent, Needed};
use super::{Context, RunOptions, StageOutcome, collect, run_dir_path, score};
use crate::events::{Event, duration};
use crate::progress::{Console, size};
use crate::run_dir::{EarlierFolder, RunDir, Started};
use crate::run_file::Loaded;

/// Longest description of a value in the table, in characters.
const VALUE_CHARACTERS: usize = 40;

/// A folder that can be deleted.
struct Leftover {
    /// Folder below the run directory.
    name: String,
    stage: String,
    is_finished: bool,
    /// The difference from the output that is at its place now.
    difference: String,
    files: Vec<Metadata>,
}

impl Leftover {
    fn bytes(&self) -> u64 {
        self.files.iter().map(Metadata::len).sum()
    }

    /// Time of the newest change of a file, seconds since 1970.
    fn changed(&self) -> u64 {
        let times = self.files.iter().filter_map(|file| file.modified().ok());
        let newest = times.max().unwrap_or(UNIX_EPOCH);
        newest
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs())
    }
}

/// Prints a table of what can be deleted, and deletes it if `delete` is set. What is published now, and the unfinished
/// work of the present settings, is not touched.
///
/// # Errors
/// When the run directory is in use, or a folder cannot be read or deleted.
pub fn clean(
    file: &Path,
    options: &RunOptions,
    delete: bool,
    console: &Console,
) -> anyhow::Result<StageOutcome> {
    let root = run_dir_path(&Loaded::read(file)?, options);
    if !root.exists() {
        console.output(&format!(
            "nothing to delete: {} does not exist",
            root.display()
        ));
        return Ok(StageOutcome::UpToDate);
    }
    let mut context = Context::open(file, options)?;
    let leftovers = leftovers(&mut context)?;
    if leftovers.is_empty() {
        console.output(&format!("nothing to delete in {}", root.display()));
        return Ok(StageOutcome::UpToDate);
    }
    if delete {
        context.dir.check_writable()?;
    }
    let files = leftovers.iter().flat_map(|leftover| &leftover.files);
    let freed = freed(files);
    console.output(&table(&leftovers));
    for leftover in &leftovers {
        let path = root.join(&leftover.name);
        if delete {
            remove(&path)?;
        }
        console.emit(&Event::EarlierOutput {
            stage: leftover.stage.clone(),
            path: path.display().to_string(),
            finished: leftover.is_finished,
            bytes: leftover.bytes(),
            changed_unix_seconds: leftover.changed(),
            difference: leftover.difference.clone(),
            deleted: delete,
        });
    }
    let (folders, freed) = (leftovers.len(), size(freed));
    console.output(&match delete {
        true => format!("deleted {folders} folders, which freed {freed}"),
        false => format!(
            "{freed} in {folders} folders\nhint: `potstill clean {} --yes` deletes them",
            file.display()
        ),
    });
    Ok(match delete {
        true => StageOutcome::Done,
        false => StageOutcome::UpToDate,
    })
}

fn leftovers(context: &mut Context) -> anyhow::Result<Vec<Leftover>> {
    let mut leftovers = Vec::new();
    for folder in context.dir.earlier_folders()? {
        leftovers.push(earlier(&context.dir, folder)?);
    }
    let current = current_work(context);
    for (name, started) in context.dir.unfinished()? {
        let folder = name.rsplit('/').next().unwrap_or_default();
        if current.iter().any(|kept| folder.starts_with(kept)) {
            continue;
        }
        let (stage, difference) = match started {
            Some(started) => {
                let now = context.dir.origin(&started.home)?;
                let difference = difference(now.as_ref(), &started);
                (started.stage, difference)
            }
            None => {
                let stage = folder.strip_prefix("draft-").unwrap_or(folder);
                let why = "it was interrupted, and the stage begins it anew";
                (stage.to_owned(), why.to_owned())
            }
        };
        leftovers.push(Leftover {
            files: files(&context.dir.path(&name))?,
            name,
            stage,
            is_finished: false,
            difference,
        });
    }
    Ok(leftovers)
}

fn earlier(dir: &RunDir, folder: EarlierFolder) -> anyhow::Result<Leftover> {
    let (stage, difference) = match &folder.origin {
        Some(started) => {
            let now = dir.origin(&started.home)?;
            (started.stage.clone(), difference(now.as_ref(), started))
        }
        None => (
            "unknown".to_owned(),
            "its settings are not known".to_owned(),
        ),
    };
    Ok(Leftover {
        files: files(&dir.path(&folder.name))?,
        name: folder.name,
        stage,
        is_finished: folder.is_finished,
        difference,
    })
}

/// The beginnings of the names of folders with unfinished work that the present settings continue. Where they cannot be
/// found out, all work of the stage is kept.
fn current_work(context: &mut Context) -> Vec<String> {
    let dir = context.dir.path("");
    let console = context.console.clone();
    let (needed, extent) = (Needed::Everything, Extent::Nothing);
    // Without its sources the run's keys are not known.
    let is_known = sources::resolve(&mut context.run, &dir, &console, needed, extent).is_ok();
    let name = |found: anyhow::Result<Option<String>>, all: &str| match found {
        Ok(name) if is_known => name,
        _ => Some(all.to_owned()),
    };
    let collect = name(collect::work_folder(context).map(Some), "collect-");
    let score = name(score::work_folder(context), "score-");
    collect.into_iter().chain(score).collect()
}

/// Describes the first setting or input by which an output differs from what is at its place now.
fn difference(now: Option<&Started>, then: &Started) -> String {
    let Some(now) = now else {
        return "nothing is in its place now".to_owned();
    };
    if let Some(text) = first_difference("", &then.settings, &now.settings) {
        return text;
    }
    let names = then.inputs.keys().chain(now.inputs.keys());
    let mut names = names.filter(|name| then.inputs.get(*name) != now.inputs.get(*name));
    match names.next() {
        Some(name) => format!("other `{name}`"),
        None => "the same settings and inputs".to_owned(),
    }
}

/// Describes the first difference between two values, in the order of their keys. `key` is the path of both.
fn first_difference(key: &str, then: &Value, now: &Value) -> Option<String> {
    if then == now {
        return None;
    }
    if let (Value::Object(then), Value::Object(now)) = (then, now) {
        let mut names: Vec<&String> = then.keys().chain(now.keys()).collect();
        names.sort();
        return names.into_iter().find_map(|name| {
            let key = match key {
                "" => name.clone(),
                key => format!("{key}.{name}"),
            };
            let of = |fields: &serde_json::Map<String, Value>| fields.get(name).cloned();
            let (then, now) = (of(then), of(now));
            first_difference(&key, &then.unwrap_or_default(), &now.unwrap_or_default())
        });
    }
    let short = |value: &Value| {
        let text = value.to_string();
        (text.chars().count() <= VALUE_CHARACTERS).then_some(text)
    };
    let text = match (short(then), short(now)) {
        (Some(then), Some(now)) => format!("`{key}` is {then}, now {now}"),
        _ => format!("other `{key}`"),
    };
    Some(visible_line(&text).into_owned())
}

fn table(leftovers: &[Leftover]) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_secs());
    let mut rows = vec![["folder", "size", "changed", "difference"].map(str::to_owned)];
    for leftover in leftovers {
        let ago = duration(now.saturating_sub(leftover.changed()) as f64);
        let unfinished = match leftover.is_finished {
            true => "",
            false => "unfinished; ",
        };
        rows.push([
            visible_line(&leftover.name).into_owned(),
            size(leftover.bytes()),
            format!("{ago} ago"),
            format!("{unfinished}{}", leftover.difference),
        ]);
    }
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths = [0, 1, 2].map(width);
    let lines = rows.iter().map(|[folder, size, changed, difference]| {
        let [a, b, c] = widths;
        format!("{folder:a$}  {size:b$}  {changed:c$}  {difference}")
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The files below a folder, or the file itself.
fn files(path: &Path) -> anyhow::Result<Vec<Metadata>> {
    let cannot = || format!("cannot read {}", path.display());
    let metadata = fs::symlink_metadata(path).with_context(cannot)?;
    if !metadata.is_dir() {
        return Ok(vec![metadata]);
    }
    let mut all = Vec::new();
    for entry in fs::read_dir(path).with_context(cannot)? {
        all.append(&mut files(&entry.with_context(cannot)?.path())?);
    }
    Ok(all)
}

fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = match path.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    removed.with_context(|| format!("cannot delete {}", path.display()))
}

/// The bytes that the deletion of files frees. A file with further names stays, such as one of a training that `train`
/// took over from `tune`.
#[cfg(unix)]
fn freed<'a>(files: impl Iterator<Item = &'a Metadata>) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut links: HashMap<(u64, u64), (u64, &Metadata)> = HashMap::new();
    for file in files {
        let found = links.entry((file.dev(), file.ino())).or_insert((0, file));
        found.0 += 1;
    }
    let gone = links.values().filter(|(n, file)| *n >= file.nlink());
    gone.map(|(_, file)| file.len()).sum()
}

/// The bytes of files.
#[cfg(not(unix))]
fn freed<'a>(files: impl Iterator<Item = &'a Metadata>) -> u64 {
    files.map(Metadata::len).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_difference_is_named() {
        let started = |settings: Value, input: &str| Started {
            stage: "train student".to_owned(),
            home: String::new(),
            key: String::new(),
            settings,
            inputs: BTreeMap::from([("completions".to_owned(), input.to_owned())]),
        };
        let then = started(
            json!({ "train": { "batch": 4, "learning_rate": 0.01 } }),
            "a",
        );
        let describe = |settings, input| difference(Some(&started(settings, input)), &then);
        let cases = [
            (
                json!({ "train": { "batch": 4, "learning_rate": 0.02 } }),
                "b",
            ),
            (json!({ "train": { "learning_rate": 0.01 } }), "a"),
            (
                json!({ "train": { "batch": "x".repeat(99), "learning_rate": 0.01 } }),
                "a",
            ),
            (
                json!({ "train": { "batch": "\u{1b}[2J", "learning_rate": 0.01 } }),
                "a",
            ),
            (then.settings.clone(), "b"),
            (then.settings.clone(), "a"),
        ];
        let texts = cases.map(|(settings, input)| describe(settings, input));
        let expected = [
            "`train.learning_rate` is 0.01, now 0.02",
            "`train.batch` is 4, now null",
            "other `train.batch`",
            "`train.batch` is 4, now \"\\u001b[2J\"",
            "other `completions`",
            "the same settings and inputs",
        ];
        assert_eq!(texts, expected);
        assert_eq!(difference(None, &then), "nothing is in its place now");
    }
}
