//! `check`: finds mistakes that are cheap to find before anything is computed: in the run file, the
//! prompts, the teacher's and the student's checkpoints (except for their weights), and the prompts'
//! lengths.

use std::path::Path;

use anyhow::bail;
use potstill_datasets::{AnswerSource, Imported, Prompt, Tokenizer};
use potstill_model::{Config, weight_files};
use potstill_student::TrainSettings;

use super::{
    RunOptions, StageOutcome, checkpoint, collect, device, import, run_dir_path, served, train,
};
use crate::progress::Console;
use crate::run_dir::check_owner;
use crate::run_file::Loaded;

/// Checks a run file and the files it names, and prints a short plan of the run to stdout.
///
/// # Errors
/// The first mistake that would make a run fail.
pub fn check(file: &Path, options: &RunOptions, console: &Console) -> anyhow::Result<StageOutcome> {
    let run = Loaded::read(file)?;
    device(&options.device)?;
    let dir = run_dir_path(&run, options);
    check_owner(&dir, &run)?;
    let imported = import::read(&run, options.limit)?;
    let teacher = match &run.settings.teacher {
        Some(_) => checkpoint::teacher_tokenizer_folder(&run)?,
        None => None,
    };
    let answers = match &teacher {
        _ if run.settings.served().is_some() => {
            let asked = served::check(&run, &imported)?;
            match run.settings.import.answers {
                AnswerSource::Teacher => asked,
                AnswerSource::Given => format!("{}\n{asked}", check_given(&imported)?),
            }
        }
        Some(folder) if run.settings.import.answers == AnswerSource::Teacher => {
            check_teacher(&run, folder, &imported.prompts)?
        }
        _ => check_given(&imported)?,
    };
    let student = check_student(&run, teacher.as_deref())?;
    let settings = &run.settings.train;
    console.output(&format!(
        "run       {} in {}\nprompts   {} ({} duplicates merged)\n{answers}\nstudent   {student}\ntrain     {} steps of {} sequences, {}\nok        start the run with `potstill run {}`",
        run.settings.run.name.as_str(),
        dir.display(),
        imported.prompts.len(),
        imported.duplicates,
        settings.steps,
        settings.batch,
        controls_and_seeds(settings),
        file.display(),
    ));
    Ok(StageOutcome::UpToDate)
}

/// Describes which controls and seeds are trained beside the student.
fn controls_and_seeds(train: &TrainSettings) -> String {
    let controls = match train.controls.len() {
        0 => "no controls".to_owned(),
        n => format!("and as many for each of {n} controls"),
    };
    match train.seeds {
        1 => controls,
        seeds => format!("{controls}, each with {seeds} seeds"),
    }
}

/// Checks that the teacher's tokenizer fits its model and that every prompt fits into its context.
fn check_teacher(run: &Loaded, folder: &Path, prompts: &[Prompt]) -> anyhow::Result<String> {
    checkpoint::tokenizer(folder)?;
    let prompts_read = prompts.iter().cloned().map(Ok);
    let longest = collect::check_lengths(run, folder, prompts_read)?;
    let collect = &run.settings.collect;
    Ok(format!(
        "teacher   {}: {}\ncollect   {} answers of at most {} tokens, {} at a time; the longest prompt has {longest} tokens",
        folder.display(),
        shape(&Config::from_dir(folder)?),
        prompts.len() * collect.samples,
        collect.max_new_tokens,
        collect.batch,
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
        if run.settings.local().is_some() {
            weight_files(teacher)?;
        }
        let must_match = run.settings.local().is_some() || run.settings.has_signals();
        if must_match && tokenizer.fingerprint() != Tokenizer::from_dir(teacher)?.fingerprint() {
            bail!(
                "the student's tokenizer in {} differs from the teacher's in {}, so the student cannot learn from the teacher's distributions\nhint: remove `path` of [student], or name a checkpoint of the teacher's family",
                folder.display(),
                teacher.display()
            );
        }
    }
    checkpoint::template(run, &folder)?;
    let config = Config::from_dir(&folder)?;
    if let Some(config) = train::start_config(run, &folder)? {
        return Ok(format!("random weights, {}", shape(&config)));
    }
    weight_files(&folder)?;
    Ok(match run.settings.student.every {
        Some(every) => {
            let layers = config.num_hidden_layers.div_ceil(every);
            format!("{}, layers pruned to {layers}", folder.display())
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
