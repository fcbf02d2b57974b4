//! `check-loss`: the run file's loss, by the trainer's own step, held to its definition.

use std::path::Path;

use anyhow::bail;
use potstill_datasets::{Signal, manifest_path};
use potstill_model::Device;
use potstill_student::Objective;
use potstill_student::check::{LossCase, LossCheck, check_loss as check, trainer};

use super::rows::Rows;
use super::{Context, RunOptions, StageOutcome, device, run_dir_path, train};
use crate::progress::Console;
use crate::run_file::Loaded;

/// Sequences of the run's own that are looked at, and the longest, tokens: the definition is slow.
const ROWS: usize = 2;
const LONGEST: usize = 96;
/// Parameters of the run's own student of which numbers are moved.
const PARAMETERS: usize = 3;

/// Checks the loss on a small random model, and on the run's own student and signals where `train/` is
/// published; puts what was found on stdout.
///
/// # Errors
/// What the run file gets wrong; and, once all is shown, a check that failed.
pub fn check_loss(
    file: &Path,
    options: &RunOptions,
    console: &Console,
) -> anyhow::Result<StageOutcome> {
    let run = Loaded::read(file)?;
    let device = device(&options.device)?;
    let objective = &run.file.train.objective;
    let mut failed = 0;
    let random = LossCase::random(objective.temperature, &device)?;
    let mut show = |on: &str, case: &LossCase| -> anyhow::Result<()> {
        console.note(&format!("checking {} on {on}", said(objective)));
        let checks = check(objective, case, &trainer)?;
        failed += checks.iter().filter(|check| !check.passed()).count();
        console.output(&table(on, &checks));
        Ok(())
    };
    show("a small random model", &random)?;
    let dir = run_dir_path(&run, options);
    if manifest_path(&dir.join("train")).exists() {
        let context = Context::open(file, options)?;
        match own(&context, &device)? {
            Some(case) => show("the run's own student and signals", &case)?,
            None => console.note(&format!(
                "no answer of the run has at most {LONGEST} tokens, so its own are not looked at"
            )),
        }
    }
    if failed > 0 {
        bail!("{failed} checks failed: the loss is not computed as it is defined");
    }
    Ok(StageOutcome::Done)
}

/// The weights above 0, in words.
fn said(objective: &Objective) -> String {
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

/// The student as training starts from it, and the shortest of its first answers.
fn own(context: &Context, on: &Device) -> anyhow::Result<Option<LossCase>> {
    let mut rows = Rows::open(context, "train")?.at_temperature(context)?;
    let mut signals: Vec<Signal> = Vec::new();
    for position in 0..rows.list.len().min(200) {
        let signal = rows.get(position)?;
        if signal.token_ids.len() <= LONGEST && !signal.rows.is_empty() {
            signals.push(signal);
        }
        if signals.len() == ROWS {
            break;
        }
    }
    if signals.is_empty() {
        return Ok(None);
    }
    let start = |device: &Device| train::start_on(&context.run, 0, device);
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
