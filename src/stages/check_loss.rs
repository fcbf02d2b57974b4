//! `check-loss`: computes the run file's loss with the trainer's own step and compares it with its
//! definition.

use std::path::Path;

use anyhow::bail;
use potstill_datasets::{Signal, Split, manifest_path};
use potstill_model::Device;
use potstill_student::Objective;
use potstill_student::check::{LossCase, LossCheck, check_loss as check, trainer};

use super::rows::SelectedRows;
use super::sources::Needed;
use super::{Context, RunOptions, StageOutcome, device, run_dir_path, start};
use crate::progress::Console;
use crate::run_file::Loaded;

/// Number of sequences of the run that are checked.
const SEQUENCES: usize = 2;
/// Longest sequence of the run that is checked, in tokens, since the definition is slow.
const MAX_TOKENS: usize = 96;
/// Number of the student's parameter tensors whose gradient is compared with finite differences.
const PARAMETERS: usize = 3;

/// Checks the loss on two small random models and, if `train/` is published, on the run's own student and
/// signals. Prints a table of the checks to stdout.
///
/// # Errors
/// When the run file or the device cannot be used. After all checks are printed: when one failed.
pub fn check_loss(
    file: &Path,
    options: &RunOptions,
    console: &Console,
) -> anyhow::Result<StageOutcome> {
    let run = Loaded::read(file)?;
    let device = device(&options.device, &run)?;
    let objective = &run.settings.train.objective;
    let mut failed = 0;
    let random = LossCase::random(objective.temperature, &device)?;
    let softcapped = LossCase::softcapped(objective.temperature, &device)?;
    let mut show = |on: &str, case: &LossCase| -> anyhow::Result<()> {
        console.note(&format!("checking {} on {on}", describe(objective)));
        let checks = check(objective, case, &trainer)?;
        failed += checks.iter().filter(|check| !check.passed()).count();
        console.output(&table(on, &checks));
        Ok(())
    };
    show("a small random model", &random)?;
    show(
        "a small random model with a softcap and padding",
        &softcapped,
    )?;
    let dir = run_dir_path(&run, options);
    if manifest_path(&dir.join("train")).exists() {
        let mut context = Context::open(file, options)?;
        if context.fetch_sources(Needed::Everything)? == StageOutcome::Stopped {
            return Ok(StageOutcome::Stopped);
        }
        match own_case(&context, &device)? {
            Some(case) => show("the run's own student and signals", &case)?,
            None => console.note(&format!(
                "no answer of the run has at most {MAX_TOKENS} tokens, so its own signals are not checked"
            )),
        }
    }
    if failed > 0 {
        bail!("{failed} checks failed, so the computed loss differs from its definition");
    }
    Ok(StageOutcome::Done)
}

/// Describes the terms of a loss whose weights are above 0.
fn describe(objective: &Objective) -> String {
    let mut terms: Vec<String> = objective
        .divergences()
        .iter()
        .map(|term| format!("{} × {}", term.weight, term.divergence.name()))
        .collect();
    if objective.cross_entropy > 0.0 {
        terms.push(format!("{} × cross_entropy", objective.cross_entropy));
    }
    terms.join(" + ")
}

fn table(on: &str, checks: &[LossCheck]) -> String {
    let line = |check: &LossCheck| {
        let verdict = if check.passed() { "ok" } else { "FAILED" };
        format!(
            "{verdict:<8}{:>8.1e}  of {:.0e}  {}",
            check.difference, check.tolerance, check.comparison
        )
    };
    let lines: Vec<String> = checks.iter().map(line).collect();
    format!("on {on}\n{}", lines.join("\n"))
}

/// Builds a case from the student before training and the first answers that are short enough; `None`
/// if no answer is.
fn own_case(context: &Context, on: &Device) -> anyhow::Result<Option<LossCase>> {
    let mut rows = SelectedRows::open(context, Split::Train)?.at_temperature(context)?;
    let mut signals: Vec<Signal> = Vec::new();
    for position in 0..rows.list.len().min(200) {
        let signal = rows.get(position)?;
        if signal.token_ids.len() <= MAX_TOKENS && !signal.rows.is_empty() {
            signals.push(signal);
        }
        if signals.len() == SEQUENCES {
            break;
        }
    }
    if signals.is_empty() {
        return Ok(None);
    }
    let start = |device: &Device| start::start_on(&context.run, 0, device);
    let model = start(&Device::flex())?;
    let on_device = match *on == Device::flex() {
        true => model.clone(),
        false => start(on)?,
    };
    Ok(Some(LossCase {
        model,
        on_device,
        signals,
        parameters: PARAMETERS,
    }))
}
