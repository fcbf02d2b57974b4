//! `check`: everything that is cheap to find wrong, before anything is computed: the run
//! file, the prompts, both checkpoints but for their weights, every prompt's length.

use std::path::Path;

use anyhow::bail;
use potstill_datasets::{AnswerSource, Imported, Prompt, Tokenizer};
use potstill_model::{Config, weight_files};
use potstill_student::Settings;

use super::{
    RunOptions, StageOutcome, checkpoint, collect, device, import, run_dir_path, served, train,
};
use crate::progress::Console;
use crate::run_dir::check_owner;
use crate::run_file::Loaded;

/// Checks a run file and what it names, and puts a short plan on stdout.
///
/// # Errors
/// The first thing that a run would stumble over.
pub fn check(file: &Path, options: &RunOptions, console: &Console) -> anyhow::Result<StageOutcome> {
    let run = Loaded::read(file)?;
    device(&options.device)?;
    let dir = run_dir_path(&run, options);
    check_owner(&dir, &run)?;
    let imported = import::read(&run, options.limit)?;
    let teacher = match &run.file.teacher {
        Some(_) => checkpoint::teachers_text(&run)?,
        None => None,
    };
    let answers = match &teacher {
        _ if run.file.served().is_some() => {
            let asked = served::check(&run, &imported)?;
            match run.file.import.answers {
                AnswerSource::Teacher => asked,
                AnswerSource::Given => format!("{}\n{asked}", check_given(&imported)?),
            }
        }
        Some(folder) if run.file.import.answers == AnswerSource::Teacher => {
            check_teacher(&run, folder, &imported.prompts)?
        }
        _ => check_given(&imported)?,
    };
    let student = check_student(&run, teacher.as_deref())?;
    let settings = &run.file.train;
    console.output(&format!(
        "run       {} in {}\nprompts   {} ({} duplicates merged)\n{answers}\nstudent   {student}\ntrain     {} steps of {} sequences, {}\nfine      `potstill run {}` runs it",
        run.file.run.name.as_str(),
        dir.display(),
        imported.prompts.len(),
        imported.duplicates,
        settings.steps,
        settings.batch,
        others(settings),
        file.display(),
    ));
    Ok(StageOutcome::UpToDate)
}

/// What is trained beside the student, in words.
fn others(train: &Settings) -> String {
    let controls = match train.controls.len() {
        0 => "no controls".to_owned(),
        n => format!("and as many for each of {n} controls"),
    };
    match train.seeds {
        1 => controls,
        seeds => format!("{controls}, the student and `sft` with {seeds} seeds"),
    }
}

/// The teacher's tokenizer, and that every prompt fits its context.
fn check_teacher(run: &Loaded, folder: &Path, prompts: &[Prompt]) -> anyhow::Result<String> {
    checkpoint::tokenizer(folder)?;
    let prompts_read = prompts.iter().cloned().map(Ok);
    let longest = collect::check_lengths(run, folder, prompts_read)?;
    let collect = &run.file.collect;
    Ok(format!(
        "teacher   {}: {}\ncollect   {} answers of at most {} tokens, {} together; the longest prompt has {longest}",
        folder.display(),
        shape(&Config::from_dir(folder)?),
        prompts.len() * collect.samples.get(),
        collect.max_new_tokens.get(),
        collect.batch.get(),
    ))
}

fn check_given(imported: &Imported) -> anyhow::Result<String> {
    collect::check_answered(imported)?;
    Ok(format!("answers   {} of the data", imported.answers.len()))
}

fn check_student(run: &Loaded, teacher: Option<&Path>) -> anyhow::Result<String> {
    let folder = checkpoint::student(run)?;
    let tokenizer = checkpoint::tokenizer(&folder)?;
    if let Some(teacher) = teacher {
        if run.file.local().is_some() {
            weight_files(teacher)?;
        }
        let matters = run.file.local().is_some() || run.file.has_signals();
        if matters && tokenizer.fingerprint() != Tokenizer::from_dir(teacher)?.fingerprint() {
            bail!(
                "the tokenizer of the student in {} is not that of the teacher in {}: distributions cannot be carried over; leave `path` of [student] out, or name a checkpoint of the teacher's family",
                folder.display(),
                teacher.display()
            );
        }
    }
    checkpoint::template(run, &folder)?;
    let config = Config::from_dir(&folder)?;
    if let Some(config) = train::start_config(run, &folder)? {
        return Ok(format!("random, {}", shape(&config)));
    }
    weight_files(&folder)?;
    Ok(match run.file.student.every {
        Some(every) => {
            let layers = config.num_hidden_layers.div_ceil(every);
            format!("{}, cut to {layers} layers", folder.display())
        }
        None => format!("{}: {}", folder.display(), shape(&config)),
    })
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
