//! `check`: everything that is cheap to find wrong, before anything is computed: the run
//! file, the prompts, both checkpoints but for their weights, every prompt's length.

use std::path::Path;

use anyhow::bail;
use potstill_model::{Config, weight_files};

use super::{Options, Outcome, checkpoint, collect, device, import, run_dir_path, train};
use crate::progress::Talk;
use crate::run_dir::check_owner;
use crate::run_file::{Loaded, RunFile};

/// Checks a run file and what it names, and puts a short plan on stdout.
///
/// # Errors
/// The first thing that a run would stumble over.
pub fn check(file: &Path, options: &Options, talk: &Talk) -> anyhow::Result<Outcome> {
    let run = Loaded::read(file)?;
    device(&options.device)?;
    let dir = run_dir_path(&run, options);
    check_owner(&dir, &run)?;
    let (prompts, duplicates) = import::read(&run, options.limit)?;
    let teacher = checkpoint::teacher(&run)?;
    checkpoint::tokenizer(&teacher)?;
    let longest = collect::check_lengths(&run, &teacher, &prompts)?;
    let student = check_student(&run, &teacher)?;
    let RunFile {
        collect,
        train: settings,
        ..
    } = &run.file;
    let answers = prompts.len() * collect.samples.get();
    talk.data(&format!(
        "run       {} in {}\nprompts   {} ({duplicates} duplicates merged), the longest {longest} tokens\nteacher   {}: {}\ncollect   {answers} answers of at most {} tokens, {} together\nstudent   {student}\ntrain     {} steps of {} sequences, {}\nfine      `potstill run {}` runs it",
        run.file.run.name.as_str(),
        dir.display(),
        prompts.len(),
        teacher.display(),
        shape(&Config::from_dir(&teacher)?),
        collect.max_new_tokens.get(),
        collect.batch.get(),
        settings.steps.get(),
        settings.batch.get(),
        match settings.controls.len() {
            0 => "no controls".to_owned(),
            n => format!("and as many for each of {n} controls"),
        },
        file.display(),
    ));
    Ok(Outcome::UpToDate)
}

fn check_student(run: &Loaded, teacher: &Path) -> anyhow::Result<String> {
    let folder = checkpoint::student(run)?;
    let tokenizer = checkpoint::tokenizer(&folder)?;
    for dir in [teacher, &folder] {
        weight_files(dir)?;
    }
    if tokenizer.fingerprint() != checkpoint::tokenizer(teacher)?.fingerprint() {
        bail!(
            "the tokenizer of the student in {} is not that of the teacher in {}: distributions cannot be carried over; leave `path` of [student] out, or name a checkpoint of the teacher's family",
            folder.display(),
            teacher.display()
        );
    }
    let config = Config::from_dir(&folder)?;
    Ok(
        match (train::start_config(run, &folder)?, run.file.student.every) {
            (Some(config), _) => format!("random, {}", shape(&config)),
            (None, Some(every)) => {
                let layers = config.num_hidden_layers.div_ceil(every.get());
                format!("{}, cut to {layers} layers", folder.display())
            }
            (None, None) => format!("{}: {}", folder.display(), shape(&config)),
        },
    )
}

fn shape(config: &Config) -> String {
    format!(
        "{} layers, width {}, vocabulary {}, context {}",
        config.num_hidden_layers,
        config.hidden_size,
        config.vocab_size,
        config.max_position_embeddings
    )
}
