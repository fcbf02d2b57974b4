//! `check`: finds mistakes that are cheap to find before anything is computed: in the run file, the
//! prompts, the teacher's and the student's checkpoints, and the prompts' lengths. Weights are read only to measure
//! the start of a student that is made from a checkpoint of its local teacher's family.

mod start_kl;
mod tokens;

use std::path::Path;

use anyhow::bail;
use potstill_datasets::{AnswerSource, Imported, Prompt, Split, Tokenizer};
use potstill_model::{Config, Device};
use potstill_student::{Layers, TrainSettings};
use start_kl::start_kl;
use tokens::tokens;

use super::sources::{self, Extent, Needed, Sources};
use super::{
    RunOptions, StageOutcome, checkpoint, collect, device, import, plan, planned, run_dir_path,
    served, start, trainable,
};
use crate::events::Event;
use crate::progress::Console;
use crate::run_dir::check_owner;
use crate::run_file::Loaded;

/// Checks a run file and the files it names, and prints a short plan of the run to stdout.
///
/// # Errors
/// The first mistake that would make a run fail.
pub fn check(file: &Path, options: &RunOptions, console: &Console) -> anyhow::Result<StageOutcome> {
    let mut run = Loaded::read(file)?;
    let device = device(&options.device, &run)?;
    let dir = run_dir_path(&run, options);
    check_owner(&dir, &run)?;
    let extent = match options.dry_run {
        true => Extent::Nothing,
        false => Extent::WithoutWeights,
    };
    let sources = sources::resolve(&mut run, &dir, console, Needed::Everything, extent)?;
    if sources >= Sources::Incomplete {
        console.note(&format!(
            "the rest can be checked when these files are here\nhint: `potstill run {}` fetches them",
            file.display()
        ));
        return Ok(StageOutcome::WouldRun);
    }
    let imported = import::read(&run, options.limit)?;
    trainable::check_rows(&run, &imported.prompts, &imported.answers)?;
    start::check_memory(&run, &device)?;
    let lengths = plan::expected_lengths(&run, &imported)?;
    start::check_training_memory(&run, &device, &lengths)?;
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
            check_teacher(&run, folder, &imported.prompts, console)?
        }
        _ => check_given(&imported)?,
    };
    let student = check_student(&run, teacher.as_deref())?;
    let training = training(&run, &imported);
    console.output(&format!(
        "run       {} in {}\nprompts   {} ({} duplicates merged)\n{answers}\nstudent   {student}\n{training}",
        run.settings.run.name.as_str(),
        dir.display(),
        imported.prompts.len(),
        imported.duplicates,
    ));
    let report = tokens(&run, teacher.as_deref(), &imported.prompts)?;
    report.lines.iter().for_each(|line| console.output(line));
    for text in report.warnings {
        console.emit(&Event::Warning { text });
    }
    if sources == Sources::Complete {
        show_start(&run, &imported.prompts, &device, console)?;
    }
    let is_tested = |id: &str| run.settings.curate.split(run.settings.run.seed, id) == Split::Test;
    let tested = imported.prompts.iter();
    let tested = tested.filter(|prompt| is_tested(&prompt.id)).count();
    if let Some(smallest) = planned::in_deviations(tested, run.settings.train.seeds) {
        console.output(&format!("detects   differences of {smallest}"));
    }
    let collect = &run.settings.collect;
    if run.settings.local().is_some()
        && run.settings.import.answers == AnswerSource::Teacher
        && collect.samples == 1
    {
        console.note("the teacher gives one answer to each prompt\nhint: answers of a local teacher cost only time; `samples = 4` in [collect] gives four to each prompt");
    }
    console.output(&format!(
        "ok        start the run with `potstill run {}`",
        file.display()
    ));
    Ok(StageOutcome::UpToDate)
}

/// Prints how far the start of training is from the teacher, if that can be measured.
fn show_start(
    run: &Loaded,
    prompts: &[Prompt],
    device: &Device,
    console: &Console,
) -> anyhow::Result<()> {
    let Some(kl) = start_kl(run, prompts, device)? else {
        return Ok(());
    };
    console.output(&format!(
        "start     KL from the teacher {:.2} nats per token, over {} tokens of prompts; a uniform distribution has {:.2}",
        kl.start, kl.tokens, kl.uniform
    ));
    if kl.start > kl.uniform {
        let text = far_start(run)?;
        console.emit(&Event::Warning { text });
    }
    Ok(())
}

/// Describes the trainings. Their number of sequences is known only after `curate`, unless all answers are kept.
fn training(run: &Loaded, imported: &Imported) -> String {
    let file = &run.settings;
    let (train, seed) = (&file.train, file.run.seed);
    let is_trained_on = |id: &str| file.curate.split(seed, id) == Split::Train;
    let sequences = match file.import.answers {
        AnswerSource::Teacher => {
            let prompts = imported.prompts.iter();
            prompts.filter(|p| is_trained_on(&p.id)).count() * file.collect.samples
        }
        AnswerSource::Given => {
            let answers = imported.answers.iter();
            answers.filter(|a| is_trained_on(&a.prompt_id)).count()
        }
    };
    let rates = train.rates(file.student.default_learning_rate());
    let schedule = train.schedule(sequences, rates.first().copied().unwrap_or_default());
    let steps = match train.steps {
        Some(steps) => format!("{steps} steps"),
        None => format!("up to {} steps", schedule.steps),
    };
    let rates: Vec<String> = rates.iter().map(|rate| format!("{rate:e}")).collect();
    let rate = match rates.as_slice() {
        [rate] => format!("learning rate {rate}"),
        rates => format!("learning rates {} to choose from on dev", rates.join(", ")),
    };
    format!(
        "train     {steps} of {} sequences ({} of warm-up), {rate}, {}",
        train.batch,
        schedule.warmup_steps,
        controls_and_seeds(train)
    )
}

/// Warns that the start is further from the teacher than the uniform distribution is.
fn far_start(run: &Loaded) -> anyhow::Result<String> {
    let layers = Config::from_dir(&checkpoint::student(run)?)?.num_hidden_layers();
    let hint = match &run.settings.student.layers {
        Some(_) => format!(
            "keep layers of both ends, such as `layers = {}` in [student]",
            Layers::half(layers)
        ),
        None => "name another checkpoint in `path` of [student]".to_owned(),
    };
    Ok(format!(
        "the start of training is further from the teacher than a uniform distribution is\nhint: {hint}"
    ))
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
fn check_teacher(
    run: &Loaded,
    folder: &Path,
    prompts: &[Prompt],
    console: &Console,
) -> anyhow::Result<String> {
    checkpoint::tokenizer(folder)?;
    let prompts_read = prompts.iter().cloned().map(Ok);
    let checked = collect::check_prompts(run, folder, prompts_read)?;
    let longest = checked.longest;
    if let Some(text) = checked.bos_problem {
        console.emit(&Event::Warning { text });
    }
    let collect = &run.settings.collect;
    Ok(format!(
        "teacher   {}: {}\ncollect   {} answers of at most {} tokens, {} at a time; the longest prompt has {longest} tokens",
        checkpoint::name(run, folder),
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
            checkpoint::check_weights(run, teacher)?;
        }
        let must_match = run.settings.local().is_some() || run.settings.has_signals();
        if must_match && tokenizer.fingerprint() != Tokenizer::from_dir(teacher)?.fingerprint() {
            bail!(
                "the student's tokenizer in {} differs from the teacher's in {}, so the student cannot learn from the teacher's distributions\nhint: remove `path` of [student], or name a checkpoint of the teacher's family",
                checkpoint::name(run, &folder),
                checkpoint::name(run, teacher)
            );
        }
    }
    checkpoint::student_template(run, &folder)?;
    let config = start::config(run)?;
    if run.settings.student.random.is_some() {
        return Ok(format!("random weights, {}", shape(&config)));
    }
    checkpoint::check_weights(run, &folder)?;
    let whole = Config::from_dir(&folder)?;
    let layers = match start::pruned_layers(run, &whole)? {
        Some(layers) => format!(
            "{}, {} of {} layers: {layers:?}",
            checkpoint::name(run, &folder),
            layers.len(),
            whole.num_hidden_layers()
        ),
        None => format!("{}: {}", checkpoint::name(run, &folder), shape(&config)),
    };
    Ok(match run.settings.student.intermediate_size {
        Some(width) => format!("{layers}; {width} neurons in each feed-forward layer"),
        None => layers,
    })
}

fn shape(config: &Config) -> String {
    let left_out = match config.prediction_layers() {
        0 => String::new(),
        count => format!("; {count} more for multi-token prediction, if stored, is left out"),
    };
    format!(
        "{} layers, width {}, vocabulary {}, context {}{left_out}",
        config.num_hidden_layers(),
        config.hidden_size,
        config.vocab_size,
        config.max_position_embeddings
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn layers_for_multi_token_prediction_are_mentioned() {
        let mut json = json!({
            "model_type": "deepseek_v3", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 2, "num_attention_heads": 1, "num_nextn_predict_layers": 1,
        });
        let text = shape(&Config::from_json(&json).unwrap());
        let expected = "2 layers, width 8, vocabulary 8, context 4096; 1 more for multi-token prediction, if stored, is left out";
        assert_eq!(text, expected);
        json["num_nextn_predict_layers"] = 0.into();
        let text = shape(&Config::from_json(&json).unwrap());
        assert!(text.ends_with("context 4096"), "{text}");
    }
}
